// Paged attention against double precision, against its lowering, and against itself in other batches.
#include <gtest/gtest.h>

#include "device/cpu_harness.h"
#include "tensor/half.h"

namespace caravan::device::cpu::test {
namespace {

struct Shape {
  int head_dim_k, head_dim_v, n_head, n_head_kv;
  int window;  // 0: all earlier tokens
  float softcap;
  bool sinks;
  DType dtype;
  int block_tokens;
};

std::string name_of(const Shape& s) {
  return "k" + std::to_string(s.head_dim_k) + " v" + std::to_string(s.head_dim_v) + " heads " +
         std::to_string(s.n_head) + "/" + std::to_string(s.n_head_kv) + " window " + std::to_string(s.window) +
         " softcap " + std::to_string(s.softcap) + (s.sinks ? " sinks " : " ") +
         std::string(tensor::dtype_name(s.dtype)) + " block " + std::to_string(s.block_tokens);
}

constexpr Shape kShapes[] = {
    {64, 64, 4, 4, 0, 0, false, DType::f32, 32},  {64, 64, 8, 2, 0, 0, false, DType::f16, 32},
    {32, 32, 6, 2, 7, 0, false, DType::f16, 16},  {128, 128, 4, 1, 0, 0, false, DType::q8_0, 64},
    {96, 64, 4, 2, 0, 30, false, DType::f32, 16}, {8, 8, 8, 4, 0, 0, false, DType::f32, 32},
    {64, 64, 4, 2, 20, 5, true, DType::f16, 32},  {256, 256, 2, 1, 40, 0, true, DType::q8_0, 16},
    {40, 24, 3, 3, 0, 0, false, DType::f16, 128}, {80, 64, 13, 1, 0, 0, true, DType::f16, 16},
};

int width(const Shape& s) { return s.n_head * s.head_dim_k + s.n_head_kv * (s.head_dim_k + s.head_dim_v); }
float scale_of(const Shape& s) { return 1 / std::sqrt(static_cast<float>(s.head_dim_k)); }

// One attention whose q, k and v are slices of the hidden rows.
Graph attention_graph(const Shape& s, const Model& model) {
  Builder b(model.tensors);
  const ValueId x = b.scale(b.hidden(width(s)), 1);
  const int q_width = s.n_head * s.head_dim_k, k_width = s.n_head_kv * s.head_dim_k;
  const ValueId q = b.reshape(b.cont(b.slice(x, 0, 0, q_width)), {s.head_dim_k, s.n_head, kRows});
  const ValueId k = b.reshape(b.cont(b.slice(x, 0, q_width, k_width)), {s.head_dim_k, s.n_head_kv, kRows});
  const ValueId v = b.reshape(b.cont(b.slice(x, 0, q_width + k_width, s.n_head_kv * s.head_dim_v)),
                              {s.head_dim_v, s.n_head_kv, kRows});
  const ValueId sinks = s.sinks ? b.vector("sinks", {s.n_head}) : graph::kNoValue;
  b.output("y", b.paged_attention(q, k, v, {.scale = scale_of(s), .softcap = s.softcap}, sinks));
  return b.finish();
}

Model attention_model(const Shape& s) {
  Model model;
  model.add_random("sinks", DType::f32, {s.n_head, 1, 1, 1}, 40);
  return model;
}

CacheSpec cache_spec(const Shape& s, int64_t n_blocks) {
  CacheSpec spec;
  spec.groups = {{"full", {{s.n_head_kv, s.head_dim_k, s.head_dim_v}}, n_blocks}};
  spec.block_tokens = s.block_tokens;
  spec.dtype_k = spec.dtype_v = s.dtype;
  return spec;
}

// Sequences with their hidden rows, and where their blocks are.
struct Sequences {
  Shape shape;
  std::vector<int32_t> lengths;
  std::vector<std::vector<float>> hidden;
  std::vector<std::vector<int32_t>> tables;
  int64_t n_blocks = 0;

  Sequences(const Shape& s, std::vector<int32_t> n, unsigned seed) : shape(s), lengths(std::move(n)) {
    std::vector<int32_t> blocks;
    for (const int32_t length : lengths) n_blocks += length / s.block_tokens + 1;
    n_blocks += 3;
    for (int32_t i = 0; i < n_blocks; ++i) blocks.push_back(i);
    std::mt19937 random(seed);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (size_t i = 0; i < lengths.size(); ++i) {
      hidden.push_back(random_values(static_cast<size_t>(lengths[i] * width(s)), seed + 1 + static_cast<unsigned>(i)));
      tables.emplace_back();
      for (int32_t block = 0; block <= lengths[i] / s.block_tokens; ++block) {
        tables.back().push_back(blocks.back());
        blocks.pop_back();
      }
    }
  }

  int32_t visible_from(int32_t token) const { return shape.window == 0 ? 0 : std::max(0, token + 1 - shape.window); }

  // A batch of the given tokens of the given sequences, in that order.
  struct Part {
    int32_t sequence, begin, end;
  };
  Batch batch(const std::vector<Part>& parts) const {
    Batch batch;
    batch.groups.resize(1);
    batch.groups[0].tables = tables;
    for (const Part& part : parts)
      for (int32_t token = part.begin; token < part.end; ++token) {
        batch.slots.push_back(part.sequence);
        batch.positions.push_back(token);
        batch.token_index.push_back(token);
        batch.groups[0].from.push_back(visible_from(token));
        batch.groups[0].to.push_back(token + 1);
        const auto& rows = hidden[static_cast<size_t>(part.sequence)];
        batch.hidden.insert(batch.hidden.end(), rows.begin() + token * width(shape),
                            rows.begin() + (token + 1) * width(shape));
        ++batch.n_rows;
      }
    return batch;
  }
};

// K or V of a token as the cache gives it back.
std::vector<float> rounded(std::vector<float> row, DType dtype) {
  if (dtype == DType::f16)
    for (float& value : row) value = tensor::f16_to_f32(tensor::f32_to_f16(value));
  if (dtype == DType::q8_0) {
    const auto& info = tensor::dtype_info(dtype);
    std::vector<std::byte> blocks(tensor::row_bytes(dtype, row.size()));
    info.quantize(row.data(), blocks.data(), static_cast<int64_t>(row.size()));
    info.dequantize(blocks.data(), row.data(), static_cast<int64_t>(row.size()));
  }
  return row;
}

// Attention of one sequence in double precision, over K and V rounded to the cache's type.
std::vector<float> reference(const Sequences& sequences, size_t index, const Model& model) {
  const Shape& s = sequences.shape;
  const auto& x = sequences.hidden[index];
  const size_t dk = static_cast<size_t>(s.head_dim_k), dv = static_cast<size_t>(s.head_dim_v);
  const size_t q_width = static_cast<size_t>(s.n_head) * dk, k_width = static_cast<size_t>(s.n_head_kv) * dk;
  std::vector<std::vector<float>> keys, values;
  for (int32_t token = 0; token < sequences.lengths[index]; ++token) {
    const auto row = x.begin() + token * width(s);
    keys.push_back(
        rounded({row + static_cast<ptrdiff_t>(q_width), row + static_cast<ptrdiff_t>(q_width + k_width)}, s.dtype));
    values.push_back(rounded({row + static_cast<ptrdiff_t>(q_width + k_width), row + width(s)}, s.dtype));
  }
  std::vector<float> out;
  for (int32_t token = 0; token < sequences.lengths[index]; ++token)
    for (size_t head = 0; head < static_cast<size_t>(s.n_head); ++head) {
      const size_t kv = head / static_cast<size_t>(s.n_head / s.n_head_kv);
      std::vector<double> sums(dv);
      double total = s.sinks ? std::exp(double{model.values.at("sinks")[head]}) : 0;
      for (int32_t other = sequences.visible_from(token); other <= token; ++other) {
        double score = 0;
        for (size_t i = 0; i < dk; ++i)
          score += double{x[static_cast<size_t>(token * width(s)) + head * dk + i]} *
                   keys[static_cast<size_t>(other)][kv * dk + i];
        score *= scale_of(s);
        if (s.softcap != 0) score = s.softcap * std::tanh(score / s.softcap);
        const double e = std::exp(score);
        total += e;
        for (size_t i = 0; i < dv; ++i) sums[i] += e * values[static_cast<size_t>(other)][kv * dv + i];
      }
      for (const double sum : sums) out.push_back(static_cast<float>(sum / total));
    }
  return out;
}

struct Setup {
  CpuDevice device;
  Model model;
  std::unique_ptr<Executable> executable;
  Setup(const Sequences& sequences, bool lowered, int n_threads, Isa isa)
      : device(n_threads, isa, 0), model(attention_model(sequences.shape)) {
    const Graph graph = attention_graph(sequences.shape, model);
    executable = device.compile(lowered ? graph::lower(graph) : graph, model.load(device, graph),
                                device.create_cache(cache_spec(sequences.shape, sequences.n_blocks)),
                                {1200, 1, lowered ? 1200 : 0});
  }
};

// Outputs per sequence when it runs with the given splits of a batch.
std::vector<std::vector<float>> run_parts(const Sequences& sequences,
                                          const std::vector<std::vector<Sequences::Part>>& batches, bool lowered,
                                          int n_threads, Isa isa = best_isa()) {
  Setup setup(sequences, lowered, n_threads, isa);
  std::vector<std::vector<float>> outputs(sequences.lengths.size());
  const auto row_width = static_cast<ptrdiff_t>(sequences.shape.n_head * sequences.shape.head_dim_v);
  for (const auto& parts : batches) {
    const auto y = run(*setup.executable, sequences.batch(parts))[0];
    auto next = y.begin();
    for (const Sequences::Part& part : parts) {
      auto& out = outputs[static_cast<size_t>(part.sequence)];
      out.insert(out.end(), next, next + (part.end - part.begin) * row_width);
      next += (part.end - part.begin) * row_width;
    }
  }
  return outputs;
}

TEST(CpuPagedAttention, MatchesDoublePrecisionOverCachedAndCurrentRows) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    const Sequences sequences(shape, {45, 3, 300}, 41);
    const auto y = run_parts(
        sequences, {{{0, 0, 20}, {2, 0, 270}}, {{2, 270, 299}, {1, 0, 3}, {0, 20, 45}}, {{2, 299, 300}}}, false, 2);
    for (size_t i = 0; i < y.size(); ++i)
      // f32 arithmetic over K and V that are rounded the same way; q8_0 may round halves differently (1 in 1e5).
      EXPECT_LT(nmse(y[i], reference(sequences, i, attention_model(shape))), shape.dtype == DType::q8_0 ? 1e-7 : 1e-11)
          << "sequence " << i;
  }
}

TEST(CpuPagedAttention, AgreesWithItsLowering) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    const Sequences sequences(shape, {45, 3, 60}, 42);
    const std::vector<std::vector<Sequences::Part>> batches{{{0, 0, 20}, {2, 0, 50}},
                                                            {{2, 50, 60}, {1, 0, 3}, {0, 20, 45}}};
    const auto fused = run_parts(sequences, batches, false, 2), lowered = run_parts(sequences, batches, true, 2);
    // Both read the same rounded K and V and compute in f32; only the order of sums differs.
    for (size_t i = 0; i < fused.size(); ++i) EXPECT_LT(nmse(lowered[i], fused[i]), 1e-12) << "sequence " << i;
  }
}

TEST(CpuPagedAttention, GivesTheSameBitsHoweverRowsAreBatchedBlocksLieAndThreadsWork) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(name_of(shape));
    const Sequences sequences(shape, {70, 290}, 43);
    const auto whole = run_parts(sequences, {{{0, 0, 70}, {1, 0, 290}}}, false, 1);
    Sequences moved(shape, {70, 290}, 44);
    moved.hidden = sequences.hidden;
    for (const int n_threads : {1, 2, 3, 5}) {
      const auto parts = run_parts(moved, {{{1, 0, 257}}, {{1, 257, 290}, {0, 0, 33}}, {{0, 33, 34}}, {{0, 34, 70}}},
                                   false, n_threads);
      EXPECT_EQ(parts, whole) << n_threads << " threads";
    }
    for (const Isa isa : supported_isas())
      EXPECT_EQ(run_parts(moved, {{{0, 0, 70}, {1, 0, 290}}}, false, 2, isa), whole) << isa_name(isa);
  }
}

TEST(CpuPagedAttention, SeesACopiedBlockAndARestoredOne) {
  const Shape shape = kShapes[1];
  const Sequences sequences(shape, {40, 40}, 45);
  CpuDevice device(2, best_isa(), 0);
  const Model model = attention_model(shape);
  const Graph graph = attention_graph(shape, model);
  const auto cache = device.create_cache(cache_spec(shape, sequences.n_blocks));
  const auto executable = device.compile(graph, model.load(device, graph), cache, {64, 1, 0});
  run(*executable, sequences.batch({{0, 0, 39}}));
  const Batch last = sequences.batch({{0, 39, 40}});
  const auto expected = run(*executable, last)[0];

  // The same tokens in the blocks of sequence 1: one by copy, one through raw bytes.
  std::vector<std::byte> bytes(cache->block_bytes(0));
  EXPECT_EQ(bytes.size(), device.cache_block_bytes(cache->spec(), 0));
  cache->copy_block(0, sequences.tables[0][0], sequences.tables[1][0]);
  cache->read_block(0, sequences.tables[0][1], bytes);
  cache->write_block(0, sequences.tables[1][1], bytes);
  Batch copied = last;
  copied.slots = {1};
  EXPECT_EQ(run(*executable, copied)[0], expected);
}

}  // namespace
}  // namespace caravan::device::cpu::test
