// Sliding-window models over the engine and real stages: blocks that left the window are given to others while long
// sequences are prefilled, generated, preempted and rebuilt, and every answer is what full caches give.
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <algorithm>

#include "cluster/cluster_pipeline.h"
#include "cluster/fake_backends.h"
#include "engine/engine.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"
#include "vocab/vocabulary.h"

namespace caravan::cluster {
namespace {

using std::chrono::seconds;

constexpr uint32_t kBlockTokens = 16, kSlots = 3, kRows = 24, kContext = 160;

// gemma3: six window layers around a full one. The window of 8 tokens is half a block, that of 37 no multiple of one.
class WindowCache : public ::testing::TestWithParam<uint32_t> {
 protected:
  WindowCache() : model_(gguf::Model::open(write())), vocabulary_(vocab::Vocabulary::load(model_.metadata())) {
    spdlog::set_level(spdlog::level::off);
    options_.n_ctx = kContext;
    options_.local_memory = uint64_t{1} << 30;
    options_.cache = testing::test_cache(model_, 1, kSlots);
    options_.cache.n_blocks.clear();
    options_.cache.block_tokens = kBlockTokens;
    options_.cache.max_rows = options_.cache.max_outputs = kRows;
  }
  ~WindowCache() override { spdlog::set_level(spdlog::level::info); }

  std::filesystem::path write() const {
    testing::TinyModelOptions options;
    options.kind = testing::TinyKind::gemma3;
    options.n_layer = 7;
    options.window = GetParam();
    return testing::write_tiny_model(folder_.path(), options);
  }

  engine::GenerateParams request(uint32_t seed, size_t n_prompt, int32_t n_predict) const {
    engine::GenerateParams params;
    for (size_t i = 0; i < n_prompt; ++i)
      params.prompt.push_back(static_cast<int32_t>(3 + (seed * 31 + i * i * 7 + i) % 256));
    params.n_predict = n_predict;
    params.sampling.temperature = 0;
    params.sampling.ignore_eos = true;
    params.sampling.n_probs = 1;
    return params;
  }

  struct Answer {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
    uint32_t n_cached = 0;  // prompt tokens that were not computed again
    std::string error;
  };
  static Answer collect(engine::TokenStream& stream) {
    Answer answer;
    while (!stream.finished()) {
      const auto event = stream.next(seconds(60));
      if (!event) {
        ADD_FAILURE() << "no event came";
        break;
      }
      if (const auto* token = std::get_if<engine::TokenEvent>(&*event)) {
        answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
        for (const auto& step : token->probabilities) answer.logprobs.push_back(step.chosen.logprob);
      }
      if (const auto* final = std::get_if<engine::FinalEvent>(&*event)) answer.n_cached = final->timings.cache_n;
      if (const auto* error = std::get_if<engine::ErrorEvent>(&*event)) answer.error = error->message;
    }
    return answer;
  }

  // Checks an answer against the sequence computed alone, with a block of its own for every token of it.
  void expect_as_with_full_caches(const engine::GenerateParams& params, const Answer& answer) {
    EXPECT_EQ(answer.error, "");
    ASSERT_EQ(answer.tokens.size(), static_cast<size_t>(params.n_predict));
    std::vector<int32_t> tokens = params.prompt;
    tokens.insert(tokens.end(), answer.tokens.begin(), answer.tokens.end());
    const models::Arch& arch = models::find_arch(model_.metadata());
    const models::Hyperparameters hp = arch.read(model_.metadata());
    stage::CacheConfig cache = testing::test_cache(model_, 64, 1);
    device::cpu::CpuDevice device(1, select_isa(), 0);
    testing::SliceChain chain(device, model_, {models::whole_model(hp)}, cache);
    testing::BatchBuilder builder(arch.cache_groups(hp), cache);
    const auto rows = testing::sequence_rows(chain, builder, tokens, 64, stage::OutputKind::logits);
    for (size_t i = 0; i < answer.tokens.size(); ++i) {
      const std::vector<float>& logits = rows[params.prompt.size() + i - 1];
      // End-of-generation tokens are banned; the model's vocabulary has one, id 2.
      auto best = logits.begin();
      for (auto at = logits.begin(); at != logits.end(); ++at)
        if (at - logits.begin() != 2 && *at > *best) best = at;
      ASSERT_EQ(answer.tokens[i], best - logits.begin()) << "token " << i;
      device::Ranking ranking{logits, {}};
      device.rank({&ranking, 1});
      ASSERT_FLOAT_EQ(answer.logprobs[i], *best - ranking.log_sum_exp) << "token " << i;
    }
  }

  testing::TemporaryDirectory folder_;
  gguf::Model model_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_;
  device::cpu::CpuDevice local_{2, select_isa(), 0};
  test::FakeMachines machines_;
  ClusterOptions options_;
};
INSTANTIATE_TEST_SUITE_P(Windows, WindowCache, ::testing::Values(8u, 37u, 64u),
                         [](const auto& param) { return "of" + std::to_string(param.param); });

TEST_P(WindowCache, AnswersAsFullCachesDoAlsoAfterPreemption) {
  ClusterPipeline pipeline(model_, local_, nullptr, options_);
  pipeline.start();
  engine::Engine engine(pipeline, *vocabulary_);
  ASSERT_TRUE(engine.wait_until_ready(seconds(60)));
  const auto plan = engine.status().plan;
  ASSERT_TRUE(plan);
  const uint32_t window_blocks = (GetParam() + kBlockTokens - 1) / kBlockTokens;
  EXPECT_EQ(
      plan->groups.at(1).n_blocks,
      std::min(plan->groups.at(0).n_blocks, kSlots * (window_blocks + 2) + (kRows + kBlockTokens - 1) / kBlockTokens));

  // Three sequences of up to 150 tokens, where the full group has room for little more than one.
  std::vector<engine::GenerateParams> requests;
  for (uint32_t i = 0; i < 4; ++i) requests.push_back(request(i, 20 + 20 * i, 70));
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (const auto& params : requests) streams.push_back(engine.submit(params));
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(i);
    expect_as_with_full_caches(requests[i], collect(*streams[i]));
  }
  EXPECT_GT(engine.status().counters.preemptions, 0u);
}

TEST_P(WindowCache, AnswersAsFullCachesDoWithSeveralBatchesInFlight) {
  options_.backends = {"a", "b"};
  options_.local_memory = 0;
  options_.n_ctx = 6 * kContext;
  machines_.add("a");
  machines_.add("b");
  ClusterPipeline pipeline(model_, local_, &machines_, options_);
  pipeline.start();
  engine::Engine engine(pipeline, *vocabulary_);
  ASSERT_TRUE(engine.wait_until_ready(seconds(60)));
  std::vector<engine::GenerateParams> requests;
  for (uint32_t i = 0; i < 6; ++i) requests.push_back(request(i, 200 - 33 * i, 20 + static_cast<int32_t>(i) * 11));
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (const auto& params : requests) streams.push_back(engine.submit(params));
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(i);
    expect_as_with_full_caches(requests[i], collect(*streams[i]));
  }
  // The planner counted enough blocks for the windows of all slots and the rows of a batch.
  EXPECT_EQ(engine.status().counters.preemptions, 0u);
}

// Turns of a conversation: each prompt is all that was said, and a little more. What the window still sees is kept.
TEST_P(WindowCache, AnswersAsFullCachesDoWhenAPrefixIsTakenFromTheCache) {
  options_.n_ctx = 2 * kContext;
  ClusterPipeline pipeline(model_, local_, nullptr, options_);
  pipeline.start();
  engine::Engine engine(pipeline, *vocabulary_);
  ASSERT_TRUE(engine.wait_until_ready(seconds(60)));
  engine::GenerateParams params = request(1, 70, 21);
  for (int turn = 0; turn < 4; ++turn) {
    SCOPED_TRACE(turn);
    const Answer answer = collect(*engine.submit(params));
    expect_as_with_full_caches(params, answer);
    if (turn > 0) {
      EXPECT_GE(answer.n_cached, params.prompt.size() - 12 - kBlockTokens);
    }
    params.prompt.insert(params.prompt.end(), answer.tokens.begin(), answer.tokens.end());
    for (int32_t i = 0; i < 11; ++i) params.prompt.push_back(40 + i * turn);
  }
}

}  // namespace
}  // namespace caravan::cluster
