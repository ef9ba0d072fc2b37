// The engine against a pipeline whose model reads the KV blocks that the engine manages, and against the same model
// without any cache.
#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "engine/engine_support.h"
#include "engine/fake_pipeline.h"
#include "engine/grammar.h"
#include "engine/pooling.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/stream_state.h"

namespace caravan::engine::test {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

class EngineTest : public testing::Test {
 protected:
  void start(PlanSummary plan, EngineOptions options = {}) {
    plan_ = plan;
    pipeline_.ready(std::move(plan));
    engine_.emplace(pipeline_, *vocabulary_, options);
    ASSERT_TRUE(engine_->wait_until_ready(kLong));
  }
  Answer answer(const GenerateParams& params) { return collect(*engine_->submit(params)); }
  std::vector<int32_t> expected(const GenerateParams& params) { return expected_tokens(plan_, params, *vocabulary_); }
  // Stops the engine, so that nothing is in flight, and checks that no row saw a wrong block.
  void TearDown() override {
    engine_.reset();
    EXPECT_THAT(pipeline_.errors(), IsEmpty());
  }
  RequestError::Kind refusal(const std::function<void()>& call, const std::string& message) {
    try {
      call();
    } catch (const RequestError& error) {
      EXPECT_THAT(error.what(), HasSubstr(message));
      return error.kind();
    }
    ADD_FAILURE() << "was not refused";
    return RequestError::Kind::not_found;
  }

  FakePipeline pipeline_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_ = make_vocabulary();
  PlanSummary plan_;
  std::optional<Engine> engine_;
};

TEST_F(EngineTest, GeneratesTheModelsGreedyTokens) {
  start(make_plan({full_group(64)}));
  std::mt19937 random(1);
  for (size_t n_prompt = 1; n_prompt <= 40; n_prompt += 3) {
    GenerateParams params = greedy(random_tokens(random, n_prompt), 12);
    params.cache_prompt = false;
    const Answer result = answer(params);
    EXPECT_EQ(result.tokens, expected(params));
    ASSERT_TRUE(result.final);
    EXPECT_EQ(result.final->timings.prompt_n, n_prompt);
    EXPECT_EQ(result.final->timings.cache_n, 0u);
  }
  EXPECT_EQ(engine_->status().slots_busy, 0u);
  EXPECT_EQ(engine_->status().counters.finished, 14u);
}

// Groups, rows per batch and blocks of one run; few blocks make preemption happen.
struct Shape {
  std::vector<GroupLimits> groups;
  uint32_t max_rows;
  uint32_t n_stages;
};

TEST_F(EngineTest, ConcurrentRequestsGetExactlyWhatEachGetsAlone) {
  const std::vector<Shape> shapes = {
      {{full_group(256)}, 16, 1},
      {{full_group(256)}, 1, 1},
      {{full_group(256)}, 3, 3},
      {{full_group(20)}, 16, 1},  // 80 tokens for all, up to 55 for each: preemption
      {{full_group(20)}, 5, 2},
      {{full_group(20), window_group(6, 9)}, 16, 1},
      {{window_group(5, 64), full_group(64)}, 7, 4},
      {{window_group(8, 3)}, 16, 2},  // the blocks of one sequence
      {{full_group(14)}, 1, 1},       // rows go to young sequences while old ones hold the blocks
  };
  uint64_t n_preemptions = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    SCOPED_TRACE(i);
    FakePipeline pipeline;
    PlanSummary plan = make_plan(shapes[i].groups, 256, shapes[i].max_rows, 6);
    plan.stages.resize(shapes[i].n_stages);
    pipeline.ready(plan);
    Engine engine(pipeline, *vocabulary_, {});
    ASSERT_TRUE(engine.wait_until_ready(kLong));
    std::mt19937 random(static_cast<uint32_t>(i));
    std::vector<GenerateParams> requests;
    std::vector<std::shared_ptr<TokenStream>> streams;
    for (int n = 0; n < 14; ++n) {
      requests.push_back(random_request(random));
      streams.push_back(engine.submit(requests.back()));
    }
    for (size_t n = 0; n < requests.size(); ++n) {
      const Answer result = collect(*streams[n]);
      EXPECT_EQ(result.tokens, expected_tokens(plan, requests[n], *vocabulary_)) << "request " << n;
      EXPECT_TRUE(result.final);
    }
    EXPECT_EQ(engine.status().kv_usage_ratio, 0);
    EXPECT_LE(pipeline.max_in_flight(), shapes[i].n_stages + (shapes[i].n_stages > 1));
    n_preemptions += engine.status().counters.preemptions;
    engine.shutdown(std::chrono::milliseconds(0));
    EXPECT_THAT(pipeline.errors(), IsEmpty());
  }
  EXPECT_GT(n_preemptions, 3u);
}

TEST_F(EngineTest, SequencesThatRunOutOfBlocksArePreemptedAndContinueExactly) {
  start(make_plan({full_group(8)}));  // 32 tokens in all
  std::vector<GenerateParams> requests;
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 3; ++i) {
    requests.push_back(greedy({7 + i, 8, 9}, 20));
    requests.back().sampling.ignore_eos = true;
    streams.push_back(engine_->submit(requests.back()));
  }
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(collect(*streams[i]).tokens, expected(requests[i]));
  const EngineCounters counters = engine_->status().counters;
  EXPECT_GT(counters.preemptions, 0u);
  EXPECT_GT(counters.recomputed_tokens, 0u);
}

TEST_F(EngineTest, FillsThePipelineWithBatchesOfDisjointSequences) {
  PlanSummary plan = make_plan({full_group(64)}, 256, 16, 6);
  plan.stages.resize(3);
  pipeline_.close_gate();
  start(plan);
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 6; ++i) {
    GenerateParams params = greedy({i}, 30);
    params.sampling.ignore_eos = true;
    streams.push_back(engine_->submit(params));
  }
  // First the prompts, then the answers, two sequences in each of three batches.
  pipeline_.wait_for_batches(1);
  pipeline_.open_gate();
  pipeline_.wait_until([](const auto& batches) { return batches.back().n_rows() == 2; });
  for (auto& stream : streams) collect(*stream);
  // A batch of prompts may be in flight beside the three of answers.
  EXPECT_GE(pipeline_.max_in_flight(), 3u);
  EXPECT_LE(pipeline_.max_in_flight(), 4u);
}

TEST_F(EngineTest, PutsDecodeRowsBeforePrefillChunksOfTheSameBatch) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  GenerateParams first = greedy({1, 2, 3}, 4);
  first.sampling.ignore_eos = true;
  auto a = engine_->submit(first);
  pipeline_.wait_for_batches(1);
  auto b = engine_->submit(greedy(std::vector<int32_t>(20, 5), 2));
  pipeline_.release(1);
  pipeline_.wait_for_batches(2);
  const stage::Batch batch = pipeline_.batches()[1];
  ASSERT_EQ(batch.n_rows(), 16u);  // one decode row and 15 of 20 prompt tokens
  EXPECT_EQ(batch.positions[0][0], 3);
  EXPECT_EQ(batch.positions[1][0], 0);
  EXPECT_NE(batch.slots[0], batch.slots[1]);
  ASSERT_EQ(batch.outputs.size(), 1u);
  EXPECT_EQ(batch.outputs[0].row, 0u);
  pipeline_.open_gate();
  EXPECT_TRUE(collect(*a).final);
  EXPECT_TRUE(collect(*b).final);
}

TEST_F(EngineTest, SameSeedSameAnswerWhateverElseRuns) {
  start(make_plan({full_group(200)}));
  GenerateParams params = greedy({10, 20, 30}, 20);
  params.sampling.temperature = 1;
  params.sampling.ignore_eos = true;
  params.sampling.seed = 42;
  const Answer alone = answer(params);
  std::vector<std::shared_ptr<TokenStream>> others;
  for (int32_t i = 0; i < 3; ++i) others.push_back(engine_->submit(greedy({i, i}, 30)));
  EXPECT_EQ(answer(params).tokens, alone.tokens);
  params.sampling.seed = 43;
  EXPECT_NE(answer(params).tokens, alone.tokens);
}

TEST_F(EngineTest, EchoesARandomSeedThatReproducesTheAnswer) {
  start(make_plan({full_group(64)}));
  GenerateParams params = greedy({10, 20, 30}, 20);
  params.sampling.temperature = 1;
  params.sampling.seed.reset();
  auto first = engine_->submit(params);
  auto second = engine_->submit(params);
  EXPECT_NE(first->seed(), second->seed());
  const Answer drawn = collect(*first);
  params.sampling.seed = first->seed();
  EXPECT_EQ(answer(params).tokens, drawn.tokens);
}

TEST_F(EngineTest, EndsAtNPredictWithStopTypeLimit) {
  start(make_plan({full_group(64)}));
  GenerateParams params = greedy({1, 2, 3}, 5);
  params.sampling.ignore_eos = true;
  const Answer result = answer(params);
  EXPECT_EQ(result.tokens.size(), 5u);
  EXPECT_EQ(result.final->stop_type, StopType::limit);
  EXPECT_FALSE(result.final->truncated);
  EXPECT_EQ(result.final->timings.predicted_n, 5u);
  EXPECT_EQ(result.final->n_prompt_tokens, 3u);
}

TEST_F(EngineTest, NPredictZeroEvaluatesThePromptAndGeneratesNothing) {
  start(make_plan({full_group(64)}));
  const Answer result = answer(greedy(std::vector<int32_t>(20, 9), 0));
  EXPECT_THAT(result.tokens, IsEmpty());
  EXPECT_EQ(result.final->stop_type, StopType::limit);
  EXPECT_EQ(result.final->timings.predicted_n, 0u);
  for (const stage::Batch& batch : pipeline_.batches()) EXPECT_THAT(batch.outputs, IsEmpty());
}

TEST_F(EngineTest, EndsTruncatedWhenTheContextIsFull) {
  start(make_plan({full_group(64)}, 24));
  GenerateParams params = greedy({1, 2, 3}, -1);
  params.sampling.ignore_eos = true;
  const Answer result = answer(params);
  EXPECT_EQ(result.tokens.size(), 21u);  // prompt and answer fill the context
  EXPECT_EQ(result.tokens, expected(params));
  EXPECT_EQ(result.final->stop_type, StopType::limit);
  EXPECT_TRUE(result.final->truncated);
}

TEST_F(EngineTest, EndsAtAnEndOfGenerationTokenThatIsNotPartOfTheAnswer) {
  pipeline_.force([](uint32_t position) -> std::optional<int32_t> { return position == 4 ? kEos : byte_token('x'); });
  start(make_plan({full_group(64)}));
  const Answer result = answer(greedy({1, 2, 3}, -1));
  EXPECT_EQ(result.text, "xx");
  EXPECT_EQ(result.tokens.size(), 2u);
  EXPECT_EQ(result.final->stop_type, StopType::eos);
  EXPECT_EQ(result.final->timings.predicted_n, 3u);
  GenerateParams ignoring = greedy({1, 2, 3}, 6);
  ignoring.sampling.ignore_eos = true;
  EXPECT_EQ(answer(ignoring).tokens.size(), 6u);
}

TEST_F(EngineTest, CutsStopStringsThatSpanTokensAndNeverEmitsTheirStart) {
  const std::string script = "one two STOP three";
  pipeline_.force([&](uint32_t position) -> std::optional<int32_t> {
    return position < script.size() ? byte_token(script[position]) : kEos;
  });
  start(make_plan({full_group(64)}));
  GenerateParams params = greedy({1}, -1);
  params.stop = {"STOP", "never"};
  const Answer result = answer(params);
  EXPECT_EQ(result.text, "one two ");
  EXPECT_EQ(result.tokens.size(), 8u);
  EXPECT_EQ(result.final->stop_type, StopType::word);
  EXPECT_EQ(result.final->stopping_word, "STOP");
  params.stop = {"thread"};
  EXPECT_EQ(answer(params).text, script);
}

TEST_F(EngineTest, EmitsWholeUtf8CharactersOnly) {
  const std::string script = "a\u00e9\u20ac\U0001f600b";
  pipeline_.force([&](uint32_t position) -> std::optional<int32_t> {
    return position < script.size() ? byte_token(script[position]) : kEos;
  });
  start(make_plan({full_group(64)}));
  const Answer result = answer(greedy({1}, -1));
  EXPECT_THAT(result.pieces, testing::ElementsAre("a", "\u00e9", "\u20ac", "\U0001f600", "b"));
  EXPECT_EQ(result.tokens.size(), script.size());
}

TEST_F(EngineTest, ReportsProbabilitiesOfTheRawLogits) {
  start(make_plan({full_group(64)}));
  GenerateParams params = greedy({3, 4, 5}, 6);
  params.sampling.ignore_eos = true;
  params.sampling.n_probs = 5;
  const Answer result = answer(params);
  ASSERT_EQ(result.probabilities.size(), 6u);
  const ToyModel model(plan_.groups, plan_.n_vocab, plan_.n_embd);
  std::vector<int32_t> tokens = params.prompt;
  for (size_t i = 0; i < 6; ++i) {
    const std::vector<float> logits = model.logits(model.states(tokens).back());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    const StepProbabilities& step = result.probabilities[i];
    EXPECT_EQ(step.chosen.id, result.tokens[i]);
    EXPECT_NEAR(step.chosen.logprob, logits[static_cast<size_t>(step.chosen.id)] - std::log(sum), 1e-5);
    ASSERT_EQ(step.top.size(), 5u);
    for (size_t k = 0; k < 5; ++k) {
      EXPECT_NEAR(step.top[k].logprob, logits[static_cast<size_t>(step.top[k].id)] - std::log(sum), 1e-5);
      if (k > 0) {
        EXPECT_GE(step.top[k - 1].logprob, step.top[k].logprob);
      }
    }
    EXPECT_EQ(logits[static_cast<size_t>(step.top[0].id)], *std::max_element(logits.begin(), logits.end()));
    tokens.push_back(result.tokens[i]);
  }
}

TEST_F(EngineTest, AnswersWithATextOfTheGrammar) {
  start(make_plan({window_group(6, 8), full_group(64)}, 200));
  GenerateParams params = greedy({1, kPieceA, kPieceB}, -1);
  params.grammar = GrammarSpec{.text = "root ::= \"ab\"{30} \"!\""};
  std::string wanted;
  for (int i = 0; i < 30; ++i) wanted += "ab";
  for (const float temperature : {0.0f, 1.0f}) {
    params.sampling.temperature = temperature;
    const Answer got = answer(params);
    ASSERT_TRUE(got.final.has_value());
    EXPECT_EQ(got.text, wanted + "!");
    EXPECT_EQ(got.final->stop_type, StopType::eos);
    EXPECT_EQ(got.tokens, expected(params));
  }
  params.sampling.ignore_eos = true;
  EXPECT_EQ(answer(params).text, wanted + "!") << "it ends although no token may end it";
  EXPECT_EQ(engine_->status().counters.recomputed_tokens, 0u);
}

TEST_F(EngineTest, RefusesBadGrammarsAndFailsWhereNoTokenIsAllowed) {
  start(make_plan({full_group(32)}));
  GenerateParams params = greedy({1}, 8);
  params.grammar = GrammarSpec{.text = "root ::= \"a"};
  EXPECT_EQ(refusal([&] { engine_->submit(params); }, "grammar line 1, column 10"), RequestError::Kind::invalid);
  params.grammar = GrammarSpec{.text = "root ::= \"a\"", .lazy = true};
  EXPECT_EQ(refusal([&] { engine_->submit(params); }, "grammar_triggers"), RequestError::Kind::invalid);
  params.grammar = GrammarSpec{.text = "root ::= \"a\" <[0]>"};
  params.sampling.logit_bias = {{0, -INFINITY}};
  const Answer got = answer(params);
  ASSERT_TRUE(got.error.has_value());
  EXPECT_THAT(got.error->message, HasSubstr("allows none of the model's tokens"));
  EXPECT_EQ(engine_->status().counters.refused, 2u);
}

TEST_F(EngineTest, RefusesRequestsOverTheQueueBound) {
  pipeline_.close_gate();
  EngineOptions options;
  options.n_parallel = 2;
  options.max_queue = 1;
  start(make_plan({full_group(64)}), options);
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (int32_t i = 0; i < 3; ++i) streams.push_back(engine_->submit(greedy({i}, 2)));
  EXPECT_EQ(refusal([&] { engine_->submit(greedy({9}, 2)); }, "queue is full"), RequestError::Kind::unavailable);
  EXPECT_EQ(engine_->status().slots_total, 2u);
  EXPECT_EQ(engine_->status().counters.refused, 1u);
  pipeline_.open_gate();
  for (auto& stream : streams) EXPECT_TRUE(collect(*stream).final);
  EXPECT_TRUE(answer(greedy({9}, 2)).final);
}

TEST_F(EngineTest, RefusesPromptsThatCanNeverFit) {
  start(make_plan({full_group(8)}, 256));  // 8 blocks of 4 tokens: 32 of the 256
  try {
    engine_->submit(greedy(std::vector<int32_t>(32, 1), 1));
    ADD_FAILURE();
  } catch (const ContextExceededError& error) {
    EXPECT_EQ(error.n_prompt_tokens(), 32u);
    EXPECT_EQ(error.n_ctx(), 32u);
    EXPECT_EQ(error.kind(), RequestError::Kind::context_exceeded);
    EXPECT_THAT(error.what(), HasSubstr("exceeds the available context size"));
  }
  const Answer result = answer(greedy(std::vector<int32_t>(31, 1), 5));
  EXPECT_EQ(result.final->timings.predicted_n, 1u);
  EXPECT_TRUE(result.final->truncated);
}

TEST_F(EngineTest, RefusesBadParametersByName) {
  start(make_plan({full_group(64)}));
  const auto refused = [&](const char* message, auto change) {
    GenerateParams params = greedy({1, 2}, 3);
    change(params);
    EXPECT_EQ(refusal([&] { engine_->submit(params); }, message), RequestError::Kind::invalid);
  };
  refused("prompt", [](GenerateParams& p) { p.prompt.clear(); });
  refused("263", [](GenerateParams& p) { p.prompt = {263}; });
  refused("-1", [](GenerateParams& p) { p.prompt = {-1}; });
  refused("temperature", [](GenerateParams& p) { p.sampling.temperature = NAN; });
  refused("logit_bias", [](GenerateParams& p) { p.sampling.logit_bias = {{263, 1}}; });
  refused("logit_bias", [](GenerateParams& p) { p.sampling.logit_bias = {{2, INFINITY}}; });
  refused("repeat_penalty", [](GenerateParams& p) { p.sampling.repeat_penalty = 0; });
  refused("repeat_last_n", [](GenerateParams& p) { p.sampling.repeat_last_n = -2; });
  refused("samplers", [](GenerateParams& p) { p.sampling.samplers = {"top_k", "mystery"}; });
  refused("n_probs", [](GenerateParams& p) { p.sampling.n_probs = -1; });
}

TEST_F(EngineTest, FreesTheBlocksOfACancelledRequestAtTheStages) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  auto stream = engine_->submit(greedy({1, 2, 3}, -1));
  pipeline_.wait_for_batches(1);
  stream->cancel();
  EXPECT_TRUE(stream->finished());
  pipeline_.open_gate();
  pipeline_.wait_until([](const auto& batches) { return batches.back().n_rows() == 0; });
  ASSERT_EQ(pipeline_.batches().back().kv_ops.size(), 1u);
  EXPECT_EQ(pipeline_.batches().back().kv_ops[0].kind, stage::KvOp::Kind::free);
  EXPECT_EQ(pipeline_.n_blocks_in_tables(), 0u);
  EXPECT_TRUE(answer(greedy({4}, 1)).final);
  EXPECT_EQ(engine_->status().counters.cancelled, 1u);
}

TEST_F(EngineTest, AConsumerThatDropsItsStreamMakesRoomForTheNext) {
  EngineOptions options;
  options.n_parallel = 1;
  start(make_plan({full_group(64)}, 200, 16, 1), options);
  GenerateParams endless = greedy({1, 2, 3}, -1);
  endless.sampling.ignore_eos = true;
  pipeline_.close_gate();
  auto gone = engine_->submit(endless);
  auto next = engine_->submit(greedy({7, 8}, 4));
  pipeline_.wait_for_batches(1);
  gone.reset();
  pipeline_.open_gate();
  EXPECT_EQ(collect(*next).tokens, expected(greedy({7, 8}, 4)));
}

TEST_F(EngineTest, ReportsProgressOfAPromptWhereAsked) {
  start(make_plan({full_group(64)}, 256, 16));
  GenerateParams params = greedy(std::vector<int32_t>(40, 5), 3);
  EXPECT_THAT(answer(params).progress, IsEmpty());
  params.report_progress = true;
  params.prompt[0] = 6;  // nothing of the first one can be used again
  const Answer result = answer(params);
  ASSERT_EQ(result.progress.size(), 3u);
  uint32_t n_before = 0;
  for (const ProgressEvent& progress : result.progress) {
    EXPECT_EQ(progress.n_prompt_tokens, 40u);
    EXPECT_GT(progress.n_computed, n_before);
    EXPECT_GE(progress.elapsed_ms, 0);
    n_before = progress.n_computed;
  }
  EXPECT_EQ(n_before, 40u);
}

TEST_F(EngineTest, EveryPieceCarriesTheTimingsUpToIt) {
  start(make_plan({full_group(64)}));
  pipeline_.force([](uint32_t) { return byte_token('x'); });
  const Answer result = answer(greedy({1, 2}, 3));
  ASSERT_EQ(result.timings.size(), 3u);
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(result.timings[i].predicted_n, i + 1);
    EXPECT_EQ(result.timings[i].prompt_n + result.timings[i].cache_n, 2u);
  }
}

TEST_F(EngineTest, EndsWithALineThatIsLateOrNotIndentedEnough) {
  start(make_plan({full_group(64)}));
  const std::string text = "f:\n  x\ny";
  pipeline_.force([&](uint32_t position) -> std::optional<int32_t> {
    return position < 1 || position - 1 >= text.size() ? std::nullopt
                                                       : std::optional<int32_t>(byte_token(text[position - 1]));
  });
  GenerateParams params = greedy({1, 2}, static_cast<int32_t>(text.size()));
  params.n_indent = 2;
  Answer result = answer(params);
  EXPECT_EQ(result.text, "f:\n  x\n");
  ASSERT_TRUE(result.final);
  EXPECT_EQ(result.final->stop_type, StopType::limit);
  EXPECT_FALSE(result.final->truncated);
  params.n_indent = 0;
  EXPECT_EQ(answer(params).text, text);
  params.max_predict_ms = 3'600'000;  // not reached
  EXPECT_EQ(answer(params).text, text);
}

TEST_F(EngineTest, AConsumerThatDoesNotReadIsCancelledWithAnError) {
  EngineOptions options;
  options.max_stream_events = 5;
  start(make_plan({full_group(64)}), options);
  pipeline_.force([](uint32_t) { return byte_token('x'); });
  auto slow = engine_->submit(greedy({1}, 200));
  // Nobody reads: the request must end although its stream is not touched.
  while (engine_->status().counters.cancelled == 0) answer(greedy({2}, 1));
  const Answer result = collect(*slow);
  ASSERT_TRUE(result.error);
  EXPECT_THAT(result.error->message, HasSubstr("too slowly"));
}

TEST_F(EngineTest, CallsTheNotifyHookForEveryPushAndForWhatWaitsAlready) {
  pipeline_.force([](uint32_t) { return byte_token('x'); });
  start(make_plan({full_group(64)}));
  auto stream = engine_->submit(greedy({1}, 3));
  std::mutex mutex;
  std::string text;
  bool done = false;
  // The consumer's thread is this one; the hook only signals.
  std::condition_variable signal;
  uint32_t n_signals = 0;
  stream->set_notify([&] {
    std::lock_guard lock(mutex);
    ++n_signals;
    signal.notify_one();
  });
  uint32_t seen = 0;
  while (!done) {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(signal.wait_for(lock, kLong, [&] { return n_signals > seen; }));
    seen = n_signals;
    lock.unlock();
    while (auto event = stream->try_next()) {
      if (auto* token = std::get_if<TokenEvent>(&*event)) text += token->text;
      done = done || ends_stream(*event);
    }
  }
  stream->set_notify({});
  EXPECT_EQ(text, "xxx");
}

TEST(TokenStream, CallsANewHookAtOnceWhenSomethingWaitsAndNoHookAfterItIsRemoved) {
  FakePipeline pipeline;
  auto state = std::make_shared<StreamState>(std::make_shared<Waker>(pipeline), 1, 10, 10000);
  TokenStream stream(state);
  int n_calls = 0;
  stream.set_notify([&] { ++n_calls; });
  EXPECT_EQ(n_calls, 0);
  state->push(TokenEvent{"x", {1}, {}});
  EXPECT_EQ(n_calls, 1);
  stream.set_notify({});
  state->push(TokenEvent{"y", {2}, {}});
  EXPECT_EQ(n_calls, 1);
  stream.set_notify([&] { n_calls += 10; });
  EXPECT_EQ(n_calls, 11);
}

TEST_F(EngineTest, AFailedBatchEndsOnlyItsOwnRequests) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  pipeline_.fail_when(
      [](const stage::Batch& batch) { return std::count(batch.tokens.begin(), batch.tokens.end(), 200) > 0; },
      "blk.3: out of memory");
  GenerateParams good = greedy({1, 2, 3}, 10);
  good.sampling.ignore_eos = true;
  good.sampling.logit_bias = {{200, -INFINITY}};
  auto before = engine_->submit(good);
  pipeline_.wait_for_batches(1);
  // Fills the second batch with the decode row of `before`, which must fail with it; `after` waits for the third.
  auto bad = engine_->submit(greedy(std::vector<int32_t>(15, 200), 10));
  auto after = engine_->submit(good);
  pipeline_.open_gate();
  for (auto* stream : {&before, &bad}) {
    const Answer result = collect(**stream);
    ASSERT_TRUE(result.error);
    EXPECT_THAT(result.error->message, HasSubstr("blk.3"));
  }
  EXPECT_EQ(collect(*after).tokens, expected(good));
  EXPECT_EQ(engine_->status().state, EngineStatus::State::ready);
}

TEST_F(EngineTest, ResultsThatWereInFlightWhenAnotherBatchFailedAreVoid) {
  pipeline_.close_gate();
  PlanSummary plan = make_plan({full_group(64)});
  plan.stages.resize(2);
  start(plan);
  pipeline_.fail_when(
      [](const stage::Batch& batch) { return std::count(batch.tokens.begin(), batch.tokens.end(), 200) > 0; },
      "refused");
  GenerateParams good = greedy({1, 2, 3}, 10);
  good.sampling.temperature = 1;
  good.sampling.ignore_eos = true;
  good.sampling.logit_bias = {{200, -INFINITY}};
  auto stream = engine_->submit(good);
  pipeline_.wait_for_batches(1);
  auto bad = engine_->submit(greedy({200}, 10));
  EXPECT_TRUE(collect(*bad).error);
  pipeline_.wait_for_batches(3);  // the prompt of the first again, while its first result is still held
  pipeline_.open_gate();
  EXPECT_EQ(collect(*stream).tokens, expected(good));
}

TEST_F(EngineTest, ASequenceWaitsUntilItsBlocksAreFreeInsteadOfTakingThemAndLosingThem) {
  pipeline_.close_gate();
  start(make_plan({full_group(8)}));  // 32 tokens
  auto first = engine_->submit(greedy(std::vector<int32_t>(20, 1), 8));
  auto second = engine_->submit(greedy(std::vector<int32_t>(16, 2), 8));
  pipeline_.open_gate();
  EXPECT_TRUE(collect(*first).final);
  EXPECT_TRUE(collect(*second).final);
  EXPECT_EQ(engine_->status().counters.preemptions, 0u);
}

TEST_F(EngineTest, EmbedsThroughSeveralBatchesWithEveryPooling) {
  start(make_plan({full_group(64)}, 256, 7));
  const ToyModel model(plan_.groups, plan_.n_vocab, plan_.n_embd);
  std::mt19937 random(3);
  const std::vector<int32_t> tokens = random_tokens(random, 30);
  std::vector<float> rows;
  for (const uint64_t state : model.states(tokens)) {
    const std::vector<float> hidden = model.hidden(state);
    rows.insert(rows.end(), hidden.begin(), hidden.end());
  }
  for (const Pooling pooling : {Pooling::none, Pooling::mean, Pooling::cls, Pooling::last}) {
    const Answer result = collect(*engine_->embed({tokens, pooling}));
    ASSERT_TRUE(result.embedding);
    EXPECT_EQ(result.embedding->vectors, pool(rows, plan_.n_embd, pooling));
    EXPECT_EQ(result.embedding->timings.prompt_n, 30u);
  }
}

TEST_F(EngineTest, EncodersTakeWholeTextsSeveralPerBatch) {
  pipeline_.close_gate();
  start(make_plan({encoder_group()}, 256, 16));
  const ToyModel model(plan_.groups, plan_.n_vocab, plan_.n_embd);
  std::mt19937 random(4);
  std::vector<std::vector<int32_t>> texts;
  std::vector<std::shared_ptr<TokenStream>> streams;
  for (const size_t n : {16u, 5u, 9u, 10u, 6u}) {
    texts.push_back(random_tokens(random, n));
    streams.push_back(engine_->embed({texts.back(), Pooling::mean}));
  }
  pipeline_.wait_for_batches(1);
  pipeline_.open_gate();
  for (size_t i = 0; i < texts.size(); ++i) {
    std::vector<float> rows;
    for (const uint64_t state : model.states(texts[i])) {
      const std::vector<float> hidden = model.hidden(state);
      rows.insert(rows.end(), hidden.begin(), hidden.end());
    }
    const Answer result = collect(*streams[i]);
    ASSERT_TRUE(result.embedding);
    EXPECT_EQ(result.embedding->vectors, pool(rows, plan_.n_embd, Pooling::mean));
  }
  EXPECT_EQ(pipeline_.batches().size(), 3u);  // 16, 5 + 9, 10 + 6
  EXPECT_EQ(refusal([&] { engine_->embed({std::vector<int32_t>(17, 1), Pooling::mean}); }, "too large to process"),
            RequestError::Kind::invalid);
  EXPECT_EQ(refusal([&] { engine_->submit(greedy({1}, 1)); }, "encoder"), RequestError::Kind::not_supported);
}

TEST_F(EngineTest, RefusesRequestsWhileLoading) {
  engine_.emplace(pipeline_, *vocabulary_, EngineOptions{});
  EXPECT_EQ(refusal([&] { engine_->submit(greedy({1}, 1)); }, "Loading model"), RequestError::Kind::unavailable);
  EXPECT_EQ(engine_->status().state, EngineStatus::State::loading);
  EXPECT_FALSE(engine_->wait_until_ready(std::chrono::milliseconds(0)));
}

TEST_F(EngineTest, ShutdownLetsAcceptedRequestsFinish) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  auto stream = engine_->submit(greedy({1, 2}, 6));
  std::thread stopper([&] { engine_->shutdown(kLong); });
  while (engine_->status().state != EngineStatus::State::stopping) std::this_thread::yield();
  EXPECT_EQ(refusal([&] { engine_->submit(greedy({1}, 1)); }, "shutting down"), RequestError::Kind::unavailable);
  pipeline_.open_gate();
  EXPECT_EQ(collect(*stream).tokens, expected(greedy({1, 2}, 6)));
  stopper.join();
  engine_->shutdown(kLong);
}

TEST_F(EngineTest, ShutdownWithoutPatienceEndsRequestsWithAnError) {
  pipeline_.close_gate();
  start(make_plan({full_group(64)}));
  auto stream = engine_->submit(greedy({1, 2}, 6));
  pipeline_.wait_for_batches(1);
  engine_.reset();
  const Answer result = collect(*stream);
  ASSERT_TRUE(result.error);
  EXPECT_THAT(result.error->message, HasSubstr("shutting down"));
  stream->cancel();  // the engine is gone: nothing to wake
}

TEST_F(EngineTest, ManyThreadsSubmitReadAndLeaveAtTheSameTime) {
  start(make_plan({full_group(24), window_group(8, 30)}, 256, 8, 4));
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 6; ++t) {
    threads.emplace_back([this, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 8; ++i) {
        const GenerateParams params = random_request(random);
        auto stream = engine_->submit(params);
        if (random() % 3 == 0) {
          stream->next(std::chrono::milliseconds(random() % 2));
          continue;  // leaves
        }
        EXPECT_EQ(collect(*stream).tokens, expected(params));
        engine_->status();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine_->shutdown(kLong);
  const EngineCounters counters = engine_->status().counters;
  EXPECT_EQ(counters.requests, 48u);
  EXPECT_EQ(counters.finished + counters.cancelled, 48u);
}

}  // namespace
}  // namespace caravan::engine::test
