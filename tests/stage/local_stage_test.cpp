#include "stage/local_stage.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <nlohmann/json.hpp>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/file.h"
#include "device/cpu/cpu_device.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::stage {
namespace {

using device::cpu::CpuDevice;
using testing::BatchBuilder;

// Collects what a stage delivers; next() waits for it.
class Collector : public OutputSink {
 public:
  void deliver(StageOutput output) noexcept override {
    const std::lock_guard lock(mutex_);
    outputs_.push_back(std::move(output));
    arrived_.notify_all();
  }
  StageOutput next() {
    std::unique_lock lock(mutex_);
    arrived_.wait(lock, [&] { return !outputs_.empty(); });
    StageOutput output = std::move(outputs_.front());
    outputs_.erase(outputs_.begin());
    return output;
  }
  size_t size() {
    const std::lock_guard lock(mutex_);
    return outputs_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<StageOutput> outputs_;
};

class LocalStageTest : public ::testing::Test {
 protected:
  explicit LocalStageTest(testing::TinyModelOptions options = {})
      : model_(gguf::Model::open(testing::write_tiny_model(folder_.path(), options))),
        arch_(models::find_arch(model_.metadata())),
        hp_(arch_.read(model_.metadata())),
        cache_(testing::test_cache(model_)),
        whole_(models::whole_model(hp_)) {}

  void load(LocalStage& stage) { stage.load(testing::load_request(model_, whole_, cache_), sources_, {}); }
  BatchBuilder builder() const { return BatchBuilder(arch_.cache_groups(hp_), cache_); }
  static std::shared_ptr<const Batch> share(Batch batch) { return std::make_shared<const Batch>(std::move(batch)); }
  static std::vector<int32_t> count_from(int32_t first, size_t n) {
    std::vector<int32_t> tokens(n);
    for (size_t i = 0; i < n; ++i) tokens[i] = first + static_cast<int32_t>(i);
    return tokens;
  }

  testing::TemporaryDirectory folder_;
  gguf::Model model_;
  const models::Arch& arch_;
  models::Hyperparameters hp_;
  CacheConfig cache_;
  Slice whole_;
  weights::ModelSource source_{model_};
  weights::WeightSource* sources_[1] = {&source_};
};

TEST_F(LocalStageTest, DeliversWhatASessionComputes) {
  CpuDevice device(2, select_isa(), 0);
  LocalStage stage(device);
  uint64_t done = 0;
  stage.load(testing::load_request(model_, whole_, cache_), sources_, [&](uint64_t bytes) {
    EXPECT_TRUE(bytes > done || bytes == 0) << bytes << " after " << done;
    done = bytes;
  });
  EXPECT_EQ(done, model_.weight_bytes());
  EXPECT_EQ(stage.numeric_class(), device.info().numeric_class);
  Collector collector;
  stage.open(1, 1, collector);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder ours = builder(), theirs = builder();
  for (uint64_t ticket = 0; ticket < 3; ++ticket) {
    Batch batch, same;
    ours.add(batch, 0, count_from(10, 5), OutputKind::logits);
    theirs.add(same, 0, count_from(10, 5), OutputKind::logits);
    stage.enqueue({1, 1, ticket}, share(batch), {});
    const StageOutput output = collector.next();
    EXPECT_EQ(output.error, "");
    EXPECT_EQ(output.fence, (Fence{1, 1, ticket}));
    EXPECT_GT(output.compute_seconds, 0);
    const auto expected = chain.compute(same);
    ASSERT_EQ(output.outputs.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(output.outputs[i].row, expected[i].row);
      EXPECT_EQ(output.outputs[i].values, expected[i].values);
    }
  }
}

TEST_F(LocalStageTest, DropsAndCountsTicketsOfOtherSessionsAndEpochs) {
  CpuDevice device(1, select_isa(), 0);
  LocalStage stage(device);
  load(stage);
  Collector old, current;
  stage.open(7, 1, old);
  stage.open(7, 2, current);
  const auto batch = share(Batch{});
  stage.enqueue({7, 1, 10}, batch, {});  // older epoch
  stage.enqueue({8, 2, 11}, batch, {});  // another session
  stage.enqueue({7, 3, 12}, batch, {});  // an epoch that was never opened
  stage.enqueue({7, 2, 13}, batch, {});
  EXPECT_EQ(current.next().fence.ticket, 13u);
  EXPECT_EQ(stage.n_dropped(), 3u);
  EXPECT_EQ(old.size(), 0u);
}

TEST_F(LocalStageTest, StartsEverySessionWithEmptyTables) {
  CpuDevice device(1, select_isa(), 0);
  LocalStage stage(device);
  load(stage);
  Collector collector;
  stage.open(1, 1, collector);
  BatchBuilder first = builder();
  Batch batch;
  first.add(batch, 0, count_from(5, 3), OutputKind::logits);
  stage.enqueue({1, 1, 1}, share(batch), {});
  EXPECT_EQ(collector.next().error, "");
  stage.open(1, 2, collector);
  Batch next;
  first.add(next, 0, count_from(8, 1), OutputKind::logits);  // goes on where the lost table ended
  stage.enqueue({1, 2, 2}, share(next), {});
  EXPECT_NE(collector.next().error, "");
}

TEST_F(LocalStageTest, ReportsABadBatchAndGoesOn) {
  CpuDevice device(1, select_isa(), 0);
  LocalStage stage(device);
  Collector collector;
  stage.open(1, 1, collector);
  stage.enqueue({1, 1, 0}, share({}), {});
  EXPECT_NE(collector.next().error.find("not been loaded"), std::string::npos);
  load(stage);
  Batch bad;
  BatchBuilder b = builder();
  b.add(bad, 0, count_from(5, 2), OutputKind::logits);
  bad.tokens[1] = 100000;
  stage.enqueue({1, 1, 1}, share(bad), {});
  const StageOutput refused = collector.next();
  EXPECT_NE(refused.error.find("token of row 1"), std::string::npos) << refused.error;
  EXPECT_TRUE(refused.outputs.empty());
  Batch with_input;
  stage.enqueue({1, 1, 2}, share(with_input), std::vector<float>(3));
  EXPECT_NE(collector.next().error.find("hidden input"), std::string::npos);
  BatchBuilder again = builder();
  Batch good;
  again.add(good, 0, count_from(5, 2), OutputKind::logits);
  stage.enqueue({1, 1, 3}, share(good), {});
  EXPECT_EQ(collector.next().error, "");
}

TEST_F(LocalStageTest, RefusesAModelThatDoesNotFitWithNeedAndHave) {
  CpuDevice device(1, select_isa(), 100'000);
  LocalStage stage(device);
  try {
    load(stage);
    FAIL() << "nothing was thrown";
  } catch (const ResourceError& error) {
    EXPECT_NE(std::string(error.what()).find("need"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("have"), std::string::npos) << error.what();
  }
  EXPECT_EQ(device.info().memory_free, device.info().memory_total);
}

TEST_F(LocalStageTest, HoldsWhatWasForetoldAndGivesItBack) {
  CpuDevice device(1, select_isa(), uint64_t{64} << 20);
  const auto tensors = models::tensor_map(model_);
  const MemoryNeed need = memory_need(arch_, hp_, tensors, whole_, cache_, device);
  {
    LocalStage stage(device);
    load(stage);
    EXPECT_EQ(stage.held().weights, need.weights);
    EXPECT_EQ(stage.held().kv_cache, need.kv_cache);
    EXPECT_EQ(stage.held().scratch, need.scratch);
    EXPECT_LT(device.info().memory_free, device.info().memory_total);
    load(stage);  // again, in place of the first
    EXPECT_EQ(stage.held().total(), need.total());
  }
  EXPECT_EQ(device.info().memory_free, device.info().memory_total);
}

TEST_F(LocalStageTest, NeedsAddUpOverLayers) {
  CpuDevice device(1, select_isa(), 0);
  const auto tensors = models::tensor_map(model_);
  const LayerNeeds needs = layer_needs(arch_, hp_, tensors, cache_, device);
  const MemoryNeed first = memory_need(arch_, hp_, tensors, {0, 2, true, false}, cache_, device);
  const MemoryNeed last = memory_need(arch_, hp_, tensors, {2, 3, false, true}, cache_, device);
  EXPECT_EQ(first.weights,
            needs.embedding_weights + needs.shared_weights + needs.layer_weights[0] + needs.layer_weights[1]);
  EXPECT_EQ(last.weights, needs.output_weights + needs.shared_weights + needs.layer_weights[2]);
  EXPECT_EQ(first.kv_cache, needs.layer_kv_cache[0] + needs.layer_kv_cache[1]);
  EXPECT_EQ(last.kv_cache, needs.layer_kv_cache[2]);
  EXPECT_EQ(first.kv_cache + last.kv_cache, needs.group_block_bytes[0] * cache_.n_blocks[0]);
  EXPECT_LE(std::max(first.scratch, last.scratch), needs.scratch);
}

TEST_F(LocalStageTest, SharesOneCopyOfTheWeightsBetweenSessions) {
  CpuDevice device(1, select_isa(), uint64_t{64} << 20);
  const LoadRequest request = testing::load_request(model_, whole_, cache_, weights::Hashing::sha256);
  const auto slice = LoadedSlice::load(device, request, sources_, {});
  EXPECT_EQ(slice->key(), content_key(request));
  const uint64_t free_with_one = device.info().memory_free;
  LocalStage a(device), b(device);
  a.use(slice, cache_);
  b.use(slice, cache_);
  EXPECT_EQ(a.slice().get(), b.slice().get());
  EXPECT_EQ(a.held().weights, slice->bytes());
  // Each session takes its own KV cache and scratch, and nothing for weights.
  const uint64_t taken = free_with_one - device.info().memory_free;
  EXPECT_GE(taken, 2 * a.held().kv_cache);
  EXPECT_LE(taken, 2 * (a.held().kv_cache + a.held().scratch));

  // Different sequences in the same blocks of the two sessions do not mix.
  Collector from_a, from_b;
  a.open(1, 1, from_a);
  b.open(2, 1, from_b);
  BatchBuilder builder_a = builder(), builder_b = builder();
  std::vector<std::vector<float>> rows_a, rows_b;
  for (uint64_t ticket = 0; ticket < 4; ++ticket) {
    Batch batch_a, batch_b;
    builder_a.add(batch_a, 0, count_from(static_cast<int32_t>(20 + ticket), 1), OutputKind::logits);
    builder_b.add(batch_b, 0, count_from(static_cast<int32_t>(90 + ticket), 1), OutputKind::logits);
    a.enqueue({1, 1, ticket}, share(batch_a), {});
    b.enqueue({2, 1, ticket}, share(batch_b), {});
    rows_a.push_back(from_a.next().outputs.at(0).values);
    rows_b.push_back(from_b.next().outputs.at(0).values);
  }
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder alone = builder();
  EXPECT_EQ(testing::sequence_rows(chain, alone, count_from(20, 4), 4, OutputKind::logits), rows_a);
}

TEST_F(LocalStageTest, NamesContentsByHyperparametersSliceAndHashes) {
  const LoadRequest request = testing::load_request(model_, whole_, cache_, weights::Hashing::sha256);
  LoadRequest other = request;
  other.cache.n_blocks[0] = 3;
  EXPECT_EQ(content_key(request), content_key(other));
  other = request;
  other.manifest.tensors[2].chunks[0].bytes[0] ^= 1;
  EXPECT_NE(content_key(request), content_key(other));
  other = request;
  other.hyperparameters.set("llama.rope.freq_base", gguf::Value::of(5e5f));
  EXPECT_NE(content_key(request), content_key(other));
  EXPECT_NE(content_key(request), content_key(testing::load_request(model_, {0, 3, true, false}, cache_)));
}

// --- Block tables.

TEST_F(LocalStageTest, ForksTruncatesAndCopiesBlocks) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder b = builder();
  const auto step = [&](Batch batch) { return chain.compute(batch); };
  Batch prompt;
  b.add(prompt, 0, count_from(30, 20), OutputKind::logits);  // blocks 0 and 1, of 16 tokens
  step(prompt);
  const auto row_at_20 = [&](Slot slot, int32_t token, std::vector<KvOp> ops) {
    Batch batch;
    batch.tokens = {token};
    batch.positions = {{20, 20, 20, 20}};
    batch.slots = {slot};
    batch.visible = {{0, 21}};
    batch.outputs = {{0, OutputKind::logits, 0, {}}};
    batch.kv_ops = std::move(ops);
    return step(batch).at(0).values;
  };
  // A fork shares the first block and gets a copy of the second, because it is going to write there.
  const auto forked = row_at_20(1, 77,
                                {{KvOp::Kind::fork, 0, 1, 0, 0, 20},
                                 {KvOp::Kind::truncate, 0, 1, 0, 0, 16},
                                 {KvOp::Kind::copy_block, 0, 0, 9, 1, 0},
                                 {KvOp::Kind::append, 0, 1, 9, 0, 0}});
  EXPECT_EQ(std::vector<int32_t>(chain.session(0).table(1, 0).begin(), chain.session(0).table(1, 0).end()),
            (std::vector<int32_t>{0, 9}));
  const auto original = row_at_20(0, 88, {});

  testing::SliceChain fresh(device, model_, {whole_}, cache_);
  for (const auto& [token, found] : {std::pair{77, forked}, std::pair{88, original}}) {
    BatchBuilder alone = builder();
    std::vector<int32_t> tokens = count_from(30, 20);
    tokens.push_back(token);
    fresh.session(0).reset();
    EXPECT_EQ(testing::sequence_rows(fresh, alone, tokens, 21, OutputKind::logits).back(), found);
  }

  Batch free;
  free.kv_ops = {{KvOp::Kind::free, 0, 0, 0, 0, 0}, {KvOp::Kind::truncate, 0, 1, 0, 0, 17}};
  step(free);
  EXPECT_TRUE(chain.session(0).table(0, 0).empty());
  EXPECT_EQ(chain.session(0).table(1, 0).size(), 2u);
}

TEST_F(LocalStageTest, RefusesRowsThatTheirTableDoesNotHold) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder b = builder();
  Batch batch;
  b.add(batch, 0, count_from(1, 17), OutputKind::logits);
  batch.kv_ops.pop_back();  // the second block
  EXPECT_THROW(chain.compute(batch), RequestError);
}

class WindowedStageTest : public LocalStageTest {
 protected:
  WindowedStageTest() : LocalStageTest(options()) {}
  static testing::TinyModelOptions options() {
    testing::TinyModelOptions o;
    o.kind = testing::TinyKind::gemma3;
    o.n_layer = 7;
    return o;
  }
};

TEST_F(WindowedStageTest, ForgetsBlocksThatLeftTheWindow) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain kept(device, model_, {whole_}, cache_), dropped(device, model_, {whole_}, cache_);
  BatchBuilder kept_builder = builder(), dropped_builder = builder();
  const auto expected =
      testing::sequence_rows(kept, kept_builder, count_from(3, 60), 1, OutputKind::logits);  // window 8, blocks of 16
  for (size_t i = 0; i < 60; ++i) {
    Batch batch;
    dropped_builder.add(batch, 0, count_from(static_cast<int32_t>(3 + i), 1), OutputKind::logits);
    const uint32_t first_visible = i < 8 ? 0 : static_cast<uint32_t>(i - 7);
    batch.kv_ops.push_back({KvOp::Kind::drop_front, 1, 0, 0, 0, first_visible});
    ASSERT_EQ(dropped.compute(batch).at(0).values, expected[i]) << "token " << i;
  }
  const auto table = dropped.session(0).table(0, 1);
  EXPECT_EQ(table[0], device::kNoBlock);
  EXPECT_EQ(table[2], device::kNoBlock);
  EXPECT_NE(table[3], device::kNoBlock);
}

// What a sequence does that starts after a cached prefix: only the end of its window is there.
TEST_F(WindowedStageTest, GoesOnFromAPrefixOfWhichOnlyTheWindowIsThere) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder b = builder();
  Batch first;
  b.add(first, 0, count_from(3, 48), OutputKind::logits);
  chain.compute(first);
  Batch next;
  b.add(next, 0, count_from(51, 1), OutputKind::logits);
  const std::vector<float> expected = chain.compute(next).at(0).values;

  // Slot 1 takes the blocks of slot 0; in the window group (8 tokens, blocks of 16) only the third and fourth.
  Batch shared = next;
  shared.slots = {1};
  shared.kv_ops.clear();
  for (const int32_t block : chain.session(0).table(0, 0))
    shared.kv_ops.push_back({KvOp::Kind::append, 0, 1, static_cast<uint32_t>(block), 0, 0});
  shared.kv_ops.push_back({KvOp::Kind::drop_front, 1, 1, 0, 0, 32});
  for (const size_t logical : {2u, 3u})
    shared.kv_ops.push_back(
        {KvOp::Kind::append, 1, 1, static_cast<uint32_t>(chain.session(0).table(0, 1)[logical]), 0, 0});
  EXPECT_EQ(chain.compute(shared).at(0).values, expected);
  EXPECT_EQ(chain.session(0).table(1, 1)[1], device::kNoBlock);

  Batch too_long;
  too_long.kv_ops = {{KvOp::Kind::drop_front, 1, 1, 0, 0, 1u << 30}};
  EXPECT_THROW(chain.compute(too_long), ProtocolError);
}

class EncoderStageTest : public LocalStageTest {
 protected:
  EncoderStageTest() : LocalStageTest(options()) {}
  static testing::TinyModelOptions options() {
    testing::TinyModelOptions o;
    o.kind = testing::TinyKind::bert;
    return o;
  }
};

TEST_F(EncoderStageTest, RefusesLogitsAndPositionsPastTheTable) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  Batch logits;
  BatchBuilder first = builder();
  first.add(logits, 0, count_from(5, 3), OutputKind::logits);
  EXPECT_THROW(chain.compute(logits), RequestError);
  Batch far;
  BatchBuilder second = builder();
  second.add(far, 0, count_from(5, 3), OutputKind::hidden);
  far.positions[2] = {512, 512, 512, 512};
  EXPECT_THROW(chain.compute(far), RequestError);
}

// --- Outputs.

TEST_F(LocalStageTest, ReducesLogitsToCandidates) {
  CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model_, {whole_}, cache_);
  BatchBuilder b = builder();
  Batch batch;
  b.add(batch, 0, count_from(40, 3), OutputKind::none);
  batch.outputs = {{0, OutputKind::logits, 0, {}}, {1, OutputKind::hidden, 0, {}}, {2, OutputKind::logits, 0, {}}};
  const auto full = chain.compute(batch);
  EXPECT_EQ(full[1].values.size(), hp_.n_embd);
  chain.session(0).reset();
  batch.outputs = {{2, OutputKind::candidates, 5, {250, 0}}};
  const auto reduced = chain.compute(batch);
  const std::vector<float>& logits = full[2].values;
  ASSERT_EQ(reduced[0].ids.size(), 5u);
  ASSERT_EQ(reduced[0].values.size(), 7u);
  EXPECT_EQ(reduced[0].values[0], *std::max_element(logits.begin(), logits.end()));
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(reduced[0].values[i], logits[static_cast<size_t>(reduced[0].ids[i])]);
  }
  EXPECT_EQ(reduced[0].values[5], logits[250]);
  EXPECT_EQ(reduced[0].values[6], logits[0]);
}

// --- A real model, token by token.

TEST(KitGeneration, GivesTheGreedyTokensOfStories260K) {
  CARAVAN_REQUIRE_KIT(kit);
  const gguf::Model model = gguf::Model::open(kit / "models" / "real" / "stories260K.gguf");
  const auto reference = nlohmann::json::parse(read_text_file(kit / "refs" / "stories260K.json"));
  const models::Arch& arch = models::find_arch(model.metadata());
  const models::Hyperparameters hp = arch.read(model.metadata());
  const CacheConfig cache = testing::test_cache(model);
  CpuDevice device(2, select_isa(), 0);
  weights::ModelSource source(model);
  weights::WeightSource* sources[] = {&source};
  LocalStage stage(device);
  stage.load(testing::load_request(model, models::whole_model(hp), cache), sources, {});
  Collector collector;
  uint64_t epoch = 0;
  ASSERT_FALSE(reference.empty());
  for (const auto& story : reference) {
    stage.open(1, ++epoch, collector);
    BatchBuilder builder(arch.cache_groups(hp), cache);
    std::vector<int32_t> next = story["prompt_tokens"].get<std::vector<int32_t>>();
    const auto expected = story["greedy_tokens"].get<std::vector<int32_t>>();
    std::vector<int32_t> found;
    while (found.size() < expected.size()) {
      Batch batch;
      builder.add(batch, 0, next, OutputKind::none);
      batch.outputs = {{batch.n_rows() - 1, OutputKind::candidates, 1, {}}};
      stage.enqueue({1, epoch, found.size()}, std::make_shared<const Batch>(batch), {});
      const StageOutput output = collector.next();
      ASSERT_EQ(output.error, "");
      if (found.empty()) {
        // The reference's own rounding: a double-precision evaluation agrees with ours to 1e-6.
        const auto& best = story["first_token_logprobs"][0];
        EXPECT_NEAR(output.outputs[0].values[0] - output.outputs[0].log_sum_exp, best["logprob"].get<double>(), 3e-3);
      }
      next = {output.outputs[0].ids[0]};
      found.push_back(next[0]);
    }
    EXPECT_EQ(found, expected) << story["prompt"];
  }
}

}  // namespace
}  // namespace caravan::stage
