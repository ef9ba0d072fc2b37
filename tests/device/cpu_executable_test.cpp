// Executables as a whole: one compile for all row counts, the same bits on every path, memory, and refused batches.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "device/cpu_harness.h"

namespace caravan::device::cpu::test {
namespace {

using ::testing::HasSubstr;

constexpr int kEmbd = 64, kHeads = 4, kHeadsKv = 2, kHeadDim = 16, kFf = 96, kVocab = 50;

// Two llama-like layers with a tied output matrix.
Model small_model(DType dtype) {
  Model model;
  model.add_random("token_embd", dtype, {kEmbd, kVocab, 1, 1}, 50);
  for (const std::string layer : {"0.", "1."}) {
    const unsigned seed = layer == "0." ? 60 : 70;
    model.add_random(layer + "norm", DType::f32, {kEmbd, 1, 1, 1}, seed);
    model.add_random(layer + "q", dtype, {kEmbd, kEmbd, 1, 1}, seed + 1, 0.1F);
    model.add_random(layer + "k", dtype, {kEmbd, kHeadsKv * kHeadDim, 1, 1}, seed + 2, 0.1F);
    model.add_random(layer + "v", dtype, {kEmbd, kHeadsKv * kHeadDim, 1, 1}, seed + 3, 0.1F);
    model.add_random(layer + "o", dtype, {kEmbd, kEmbd, 1, 1}, seed + 4, 0.1F);
    model.add_random(layer + "gate", dtype, {kEmbd, kFf, 1, 1}, seed + 5, 0.1F);
    model.add_random(layer + "up", dtype, {kEmbd, kFf, 1, 1}, seed + 6, 0.1F);
    model.add_random(layer + "down", dtype, {kFf, kEmbd, 1, 1}, seed + 7, 0.1F);
  }
  return model;
}

ValueId layer(Builder& b, int index, ValueId x) {
  const std::string name = std::to_string(index) + ".";
  const auto heads = [&](const char* matrix, int n, ValueId h) {
    return b.reshape(b.mul_mat(b.matrix(name + matrix, {kEmbd, n * kHeadDim}), h), {kHeadDim, n, kRows});
  };
  const ValueId h = b.rms_norm(x, b.vector(name + "norm", {kEmbd}), 1e-5F);
  const graph::RopeParams rope{.n_rot = kHeadDim};
  const ValueId q = b.rope(heads("q", kHeads, h), b.positions(), rope);
  const ValueId k = b.rope(heads("k", kHeadsKv, h), b.positions(), rope);
  const ValueId attended = b.paged_attention(q, k, heads("v", kHeadsKv, h), {.scale = 0.25F, .layer = index});
  x = b.add(x, b.mul_mat(b.matrix(name + "o", {kEmbd, kEmbd}), attended));
  const ValueId y = b.rms_norm(x, b.vector(name + "norm", {kEmbd}), 1e-5F);
  const ValueId gate = b.mul_mat(b.matrix(name + "gate", {kEmbd, kFf}), y);
  const ValueId up = b.mul_mat(b.matrix(name + "up", {kEmbd, kFf}), y);
  return b.add(x, b.mul_mat(b.matrix(name + "down", {kFf, kEmbd}), b.swiglu(gate, up)));
}

Graph small_graph(const Model& model) {
  Builder b(model.tensors);
  ValueId x = b.get_rows(b.embedding("token_embd", {kEmbd, kVocab}), b.tokens());
  for (int i = 0; i < 2; ++i) x = layer(b, i, x);
  b.output("hidden", x);
  b.output("logits", b.mul_mat(b.matrix("token_embd", {kEmbd, kVocab}), b.select_output_rows(x)));
  return b.finish();
}

CacheSpec small_cache(DType dtype = DType::f16) {
  CacheSpec spec;
  spec.groups = {{"full", {{kHeadsKv, kHeadDim, kHeadDim}, {kHeadsKv, kHeadDim, kHeadDim}}, 24}};
  spec.block_tokens = 16;
  spec.dtype_k = spec.dtype_v = dtype;
  return spec;
}

// Tokens [begin, end) of one sequence of made-up text; every row's logits.
void append(Batch& batch, int32_t slot, int32_t begin, int32_t end) {
  batch.groups.resize(1);
  while (batch.groups[0].tables.size() < 2) batch.groups[0].tables.emplace_back();
  auto& table = batch.groups[0].tables[static_cast<size_t>(slot)];
  for (auto block = static_cast<int32_t>(table.size()); block <= 160 / 16; ++block) table.push_back(2 * block + slot);
  for (int32_t token = begin; token < end; ++token) {
    batch.tokens.push_back((token * 7 + slot * 3) % kVocab);
    batch.positions.push_back(token);
    batch.token_index.push_back(token);
    batch.slots.push_back(slot);
    batch.groups[0].from.push_back(0);
    batch.groups[0].to.push_back(token + 1);
    batch.output_rows.push_back(static_cast<int32_t>(batch.n_rows++));
  }
}

Batch text(int32_t slot, int32_t begin, int32_t end) {
  Batch batch;
  append(batch, slot, begin, end);
  return batch;
}

struct Loaded {
  CpuDevice device;
  std::shared_ptr<Cache> cache;
  std::unique_ptr<Executable> executable;
  Loaded(DType dtype, int n_threads, Isa isa = best_isa(), int64_t max_rows = 64) : device(n_threads, isa, 0) {
    const Model model = small_model(dtype);
    const Graph graph = small_graph(model);
    cache = device.create_cache(small_cache());
    executable = device.compile(graph, model.load(device, graph), cache, {max_rows, max_rows, 0});
  }
};

TEST(CpuExecutable, ServesFiveHundredRandomRowCountsWithOneCompile) {
  Loaded loaded(DType::q8_0, 2);
  std::mt19937 random(80);
  for (int step = 0; step < 500; ++step) {
    const auto n = static_cast<int32_t>(step % 10 == 0 ? 64 : random() % 16 + 1);
    const auto begin = static_cast<int32_t>(random() % 90);
    Batch batch = text(static_cast<int32_t>(random() % 2), begin, begin + n);
    while (!batch.output_rows.empty() && random() % 2 == 0) batch.output_rows.pop_back();
    run(*loaded.executable, batch);
  }
  EXPECT_EQ(loaded.device.n_compiled(), 1U);
}

TEST(CpuExecutable, GivesTheSameBitsOnEveryThreadCountIsaAndCutOfTheBatch) {
  for (const DType dtype : {DType::f32, DType::f16, DType::q8_0, DType::q4_0}) {
    SCOPED_TRACE(tensor::dtype_name(dtype));
    Loaded first(dtype, 1);
    const auto expected = run(*first.executable, text(0, 0, 40));
    const auto check = [&](Loaded& loaded, const std::vector<int32_t>& chunks) {
      for (const int32_t chunk : chunks) {
        std::vector<float> logits;
        for (int32_t begin = 0; begin < 40; begin += chunk) {
          // A mate of another sequence before and after.
          const int32_t end = std::min(begin + chunk, 40);
          Batch batch;
          append(batch, 1, begin, begin + 3);
          append(batch, 0, begin, end);
          append(batch, 1, begin + 3, begin + 5);
          const auto y = run(*loaded.executable, batch)[1];
          logits.insert(logits.end(), y.begin() + 3 * kVocab, y.begin() + (3 + end - begin) * kVocab);
        }
        EXPECT_EQ(logits, expected[1]) << "chunks of " << chunk;
      }
    };
    for (const int n_threads : {1, 2, 3, 5}) {
      Loaded loaded(dtype, n_threads);
      check(loaded, {40, 17});
    }
    for (const Isa isa : supported_isas()) {
      SCOPED_TRACE(isa_name(isa));
      Loaded loaded(dtype, 1, isa);
      check(loaded, {17, 1});
    }
  }
}

TEST(CpuExecutable, AgreesWithItsLowering) {
  const Model model = small_model(DType::f16);
  const Graph graph = small_graph(model);
  Loaded fused(DType::f16, 2);
  CpuDevice device(2, best_isa(), 0);
  const Graph core = graph::lower(graph);
  const auto lowered =
      device.compile(core, model.load(device, core), device.create_cache(small_cache()), {64, 64, 200});
  for (const auto& [begin, end] : {std::pair{0, 30}, {30, 31}, {31, 60}}) {
    Batch batch = text(0, begin, end);
    append(batch, 1, begin, end);
    // Both compute in f32 over the same rounded K and V; what differs is the order of sums inside attention.
    EXPECT_LT(nmse(run(*lowered, batch)[1], run(*fused.executable, batch)[1]), 1e-10);
  }
}

TEST(CpuExecutable, ComputesOnlyTheOutputsThatAreWanted) {
  Loaded loaded(DType::q8_0, 2);
  const Batch batch = text(0, 0, 20);
  const auto all = run(*loaded.executable, batch);
  Loaded other(DType::q8_0, 2);
  RunInput input;
  const std::vector<BlockTable> tables{batch.groups[0].tables[0]};
  const std::vector<GroupInput> groups{{batch.groups[0].from, batch.groups[0].to, tables}};
  std::vector<float> logits(all[1].size());
  const auto run_wanting = [&](std::vector<std::span<float>> outputs) {
    input.n_rows = batch.n_rows;
    input.tokens = batch.tokens;
    input.positions = batch.positions;
    input.slots = batch.slots;
    input.token_index = batch.token_index;
    input.groups = groups;
    input.output_rows = batch.output_rows;
    input.outputs = outputs;
    other.executable->run(input);
  };
  run_wanting({{}, logits});
  EXPECT_EQ(logits, all[1]);
  // Nothing wanted: the cache is still written.
  Loaded third(DType::q8_0, 2);
  run_wanting({{}, {}});
  EXPECT_EQ(run(*other.executable, text(0, 20, 21)), run(*loaded.executable, text(0, 20, 21)));
}

TEST(CpuExecutable, RefusesBatchesThatBreakTheContract) {
  Loaded loaded(DType::q8_0, 2);
  struct Case {
    std::string_view expected;
    std::function<void(Batch&)> damage;
  };
  const std::vector<Case> cases{
      {"batch of 65 rows, expected 1 to 64", [](Batch& b) { append(b, 0, 3, 65); }},
      {"batch of 0 rows", [](Batch& b) { b.n_rows = 0; }},
      {"tokens has 2 entries, expected 3", [](Batch& b) { b.tokens.pop_back(); }},
      {"positions has", [](Batch& b) { b.positions.clear(); }},
      {"slots has", [](Batch& b) { b.slots.pop_back(); }},
      {"visible_to has", [](Batch& b) { b.groups[0].to.pop_back(); }},
      {"token 50 is not within 0..49", [](Batch& b) { b.tokens[1] = kVocab; }},
      {"token -1", [](Batch& b) { b.tokens[1] = -1; }},
      {"output row 3 is not within 0..2", [](Batch& b) { b.output_rows[2] = 3; }},
      {"65 output rows, expected at most 64", [](Batch& b) { b.output_rows.assign(65, 0); }},
      {"row 1, cache group 0: no slot 2", [](Batch& b) { b.slots[1] = 2; }},
      {"no slot -1", [](Batch& b) { b.slots[1] = -1; }},
      {"has no block", [](Batch& b) { b.token_index[2] = 1000; }},
      {"token index -4", [](Batch& b) { b.token_index[2] = -4; }},
      {"has no block", [](Batch& b) { b.groups[0].tables[0][0] = kNoBlock; }},
      {"has no block", [](Batch& b) { b.groups[0].tables[0][0] = 24; }},
      {"visible tokens [2, 1)", [](Batch& b) { b.groups[0].from[0] = 2; }},
      {"visible tokens [-1, 1)", [](Batch& b) { b.groups[0].from[0] = -1; }},
      {"has no block", [](Batch& b) { b.groups[0].to[0] = 16 * 11 + 1; }},
      {"0 cache groups", [](Batch& b) { b.groups.clear(); }},
  };
  for (const Case& c : cases) {
    Batch batch = text(0, 0, 3);
    c.damage(batch);
    try {
      run(*loaded.executable, batch);
      ADD_FAILURE() << "accepted: " << c.expected;
    } catch (const RequestError& error) {
      EXPECT_THAT(error.what(), HasSubstr(c.expected));
    }
  }
  EXPECT_NO_THROW(run(*loaded.executable, text(0, 0, 3)));
}

TEST(CpuExecutable, AllowsFreedBlocksBeforeTheWindow) {
  Loaded loaded(DType::q8_0, 2);
  run(*loaded.executable, text(0, 0, 40));
  Batch batch = text(0, 40, 41);
  batch.groups[0].tables[0][0] = kNoBlock;
  EXPECT_THROW(run(*loaded.executable, batch), RequestError);
  batch.groups[0].from[0] = 16;
  EXPECT_NO_THROW(run(*loaded.executable, batch));
}

// ---- Compiling and memory ------------------------------------------------------------------------------------------

TEST(CpuDevice, ForetellsTheBytesItWillTake) {
  const Model model = small_model(DType::q4_0);
  const Graph graph = small_graph(model);
  CpuDevice device(2, best_isa(), uint64_t{64} << 20);
  const uint64_t free = device.info().memory_free;
  EXPECT_EQ(free, uint64_t{64} << 20);
  uint64_t weight_bytes = 0;
  for (const auto& spec : graph.weights) weight_bytes += device.weight_bytes(spec);
  const uint64_t scratch = device.scratch_bytes(graph, small_cache(), {64, 64, 0});
  {
    const auto weights = model.load(device, graph);
    EXPECT_EQ(weights->size_bytes(), weight_bytes);
    const auto cache = device.create_cache(small_cache());
    EXPECT_EQ(cache->size_bytes(), device.cache_bytes(small_cache()));
    const auto executable = device.compile(graph, weights, cache, {64, 64, 0});
    EXPECT_EQ(executable->scratch_bytes(), scratch);
    EXPECT_EQ(device.info().memory_free, free - weight_bytes - cache->size_bytes() - scratch);
  }
  EXPECT_EQ(device.info().memory_free, free);
}

TEST(CpuDevice, NeedsNoScratchForWhatOnlyAnOutputHolds) {
  Model model;
  model.add_random("w", DType::f32, {64, 1000, 1, 1}, 85);
  const auto scratch = [&](bool read_again) {
    Builder b(model.tensors);
    const ValueId y = b.tanh(b.scale(b.mul_mat(b.matrix("w", {64, 1000}), b.hidden(64)), 2));
    b.output("y", y);
    if (read_again) b.output("z", b.relu(y));
    const CpuDevice device(1, best_isa(), 0);
    return device.scratch_bytes(b.finish(), {}, {32, 1, 0});
  };
  EXPECT_LT(scratch(false), 32U * 1000 * 4);
  EXPECT_GE(scratch(true), 32U * 1000 * 4);
  const auto x = random_values(64 * 8, 86);
  const auto outputs = [&](bool read_again) {
    Builder b(model.tensors);
    const ValueId y = b.tanh(b.scale(b.mul_mat(b.matrix("w", {64, 1000}), b.hidden(64)), 2));
    b.output("y", y);
    if (read_again) b.output("z", b.relu(y));
    return compute(b.finish(), model, hidden_batch(x, 64), 3);
  };
  EXPECT_EQ(outputs(false)[0], outputs(true)[0]);
  EXPECT_EQ(outputs(true)[1].size(), outputs(true)[0].size());
}

TEST(CpuDevice, RefusesWhatDoesNotFitUnderItsCap) {
  CpuDevice device(1, best_isa(), 10000);
  EXPECT_NO_THROW(device.create_weights({{"w", DType::f32, {32, 64, 1, 1}, graph::WeightRole::matrix}}));
  try {
    device.create_weights({{"w", DType::f32, {64, 64, 1, 1}, graph::WeightRole::matrix}});
    FAIL() << "no error";
  } catch (const ResourceError& error) {
    EXPECT_STREQ(error.what(), "weights: need 16384 bytes of memory, have 10000");
  }
  EXPECT_THROW(device.create_cache(small_cache()), ResourceError);
}

TEST(CpuDevice, RefusesToCompileWithoutTheGraphsWeightsOrCache) {
  const Model model = small_model(DType::q8_0);
  const Graph graph = small_graph(model);
  CpuDevice device(1, best_isa(), 0);
  const auto weights = model.load(device, graph);
  const auto cache = device.create_cache(small_cache());
  const RunLimits limits{8, 8, 0};
  EXPECT_THROW(device.compile(graph, nullptr, cache, limits), FormatError);
  EXPECT_THROW(device.compile(graph, weights, nullptr, limits), FormatError);
  CacheSpec spec = small_cache();
  spec.groups[0].layers.pop_back();
  EXPECT_THROW(device.compile(graph, weights, device.create_cache(spec), limits), FormatError);
  spec = small_cache();
  spec.groups[0].layers[1].n_head_kv = 1;
  EXPECT_THROW(device.compile(graph, weights, device.create_cache(spec), limits), FormatError);
  Graph other = graph;
  other.weights[0].dtype = DType::f32;
  EXPECT_THROW(device.compile(other, weights, cache, limits), FormatError);
  EXPECT_EQ(device.n_compiled(), 0U);
}

TEST(CpuDevice, RefusesCachesThatTheKernelsCannotHold) {
  CpuDevice device(1, best_isa(), 0);
  const auto refuse = [&](const std::function<void(CacheSpec&)>& change) {
    CacheSpec spec = small_cache();
    change(spec);
    EXPECT_THROW(device.create_cache(spec), NotSupportedError);
    EXPECT_THROW(device.cache_block_bytes(spec, 0), NotSupportedError);
  };
  refuse([](CacheSpec& spec) { spec.dtype_v = DType::q4_0; });
  refuse([](CacheSpec& spec) { spec.block_tokens = 24; });
  refuse([](CacheSpec& spec) { spec.block_tokens = 0; });
  refuse([](CacheSpec& spec) { spec.groups[0].layers[0].head_dim_k = 12; });
}

// ---- Weights -------------------------------------------------------------------------------------------------------

TEST(CpuWeights, TakesBytesInPiecesOfAnySize) {
  for (const DType dtype :
       {DType::f32, DType::f16, DType::q8_0, DType::q4_0, DType::q4_k, DType::q6_k, DType::mxfp4, DType::q3_k}) {
    SCOPED_TRACE(tensor::dtype_name(dtype));
    Model model;
    model.add_random("w", dtype, {256, 37, 3, 1}, 90);
    std::vector<graph::WeightSpec> specs;
    for (const auto role : {graph::WeightRole::matrix, graph::WeightRole::vector, graph::WeightRole::embedding})
      specs.push_back({"w", dtype, {256, 37, 3, 1}, role});
    const auto account = std::make_shared<MemoryAccount>(0);
    CpuWeightSet whole(specs, account), pieces(specs, account);
    const std::span<const std::byte> bytes = model.bytes["w"];
    std::mt19937 random(91);
    for (size_t i = 0; i < specs.size(); ++i) {
      whole.upload(i, 0, bytes);
      for (size_t offset = 0; offset < bytes.size();) {
        const size_t n = std::min<size_t>(bytes.size() - offset, random() % 3 == 0 ? random() % 40000 : random() % 50);
        pieces.upload(i, offset, bytes.subspan(offset, n));
        offset += n;
      }
      EXPECT_TRUE(std::equal(whole.data(i), whole.data(i) + cpu_weight_bytes(specs[i]), pieces.data(i)))
          << to_string(specs[i].role);
    }
    whole.finish();
    pieces.finish();
    const auto* values = reinterpret_cast<const float*>(whole.data(1));
    EXPECT_TRUE(std::equal(model.values["w"].begin(), model.values["w"].end(), values));
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), whole.data(2)));
  }
}

TEST(CpuWeights, RefusesBytesOutOfOrderPastTheEndOrMissing) {
  const auto account = std::make_shared<MemoryAccount>(0);
  CpuWeightSet weights({{"w", DType::f32, {8, 4, 1, 1}, graph::WeightRole::matrix}}, account);
  const std::vector<std::byte> bytes(129);
  const std::span<const std::byte> all = bytes;
  EXPECT_THROW(weights.upload(0, 4, all.first(4)), FormatError);
  weights.upload(0, 0, all.first(100));
  EXPECT_THROW(weights.upload(0, 100, all.first(29)), FormatError);
  EXPECT_THROW(weights.finish(), FormatError);
  weights.upload(0, 100, all.first(28));
  EXPECT_NO_THROW(weights.finish());
}

TEST(CpuWeights, RefusesShapesAndTypesItCannotHold) {
  using graph::WeightRole;
  EXPECT_THROW(cpu_weight_bytes({"w", DType::q4_0, {48, 4, 1, 1}, WeightRole::matrix}), FormatError);
  EXPECT_THROW(cpu_weight_bytes({"w", DType::f32, {0, 4, 1, 1}, WeightRole::matrix}), FormatError);
  EXPECT_THROW(cpu_weight_bytes({"w", DType::f32, {int64_t{1} << 40, int64_t{1} << 40, 1, 1}, WeightRole::matrix}),
               FormatError);
  EXPECT_THROW(cpu_weight_bytes({"w", DType::i32, {256, 4, 1, 1}, WeightRole::matrix}), NotSupportedError);
  const auto account = std::make_shared<MemoryAccount>(0);
  const graph::WeightSpec spec{"w", DType::f32, {8, 4, 1, 1}, WeightRole::matrix};
  EXPECT_THROW(CpuWeightSet({spec, spec}, account), FormatError);
}

}  // namespace
}  // namespace caravan::device::cpu::test
