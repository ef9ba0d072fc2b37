// How busy the stages are kept, in simulated time: the real engine over stages that take as long as they are told to.
#include <gtest/gtest.h>

#include <condition_variable>
#include <map>
#include <mutex>

#include "engine/engine.h"
#include "engine/engine_support.h"
#include "engine/stage_cost.h"

namespace caravan::engine {
namespace {

using test::collect;
using test::full_group;
using test::greedy;
using test::kLong;
using test::make_vocabulary;

// Milliseconds that a stage takes.
struct Cost {
  double fixed = 0, per_row = 0, hop = 0;
  double of(uint32_t n_rows) const { return fixed + per_row * n_rows; }
};

// Stages one after the other, each with a queue. Nothing takes real time: poll() moves the clock to the next
// completion.
class SimulatedPipeline : public Pipeline {
 public:
  SimulatedPipeline(PlanSummary plan, std::vector<Cost> stages)
      : plan_(std::move(plan)), stages_(std::move(stages)), free_at_(stages_.size()), work_(stages_.size()) {
    plan_.stages.resize(stages_.size());
    plan_.replicas = {{1}};
  }

  // Until now nothing is computed, so that all requests are there at once.
  void go() {
    const std::lock_guard lock(mutex_);
    running_ = true;
    changed_.notify_all();
  }
  double now() const {
    const std::lock_guard lock(mutex_);
    return now_;
  }
  // The share of [from, to) in which a stage computed; the least of all stages.
  double utilisation(double from, double to) const {
    const std::lock_guard lock(mutex_);
    double least = 1;
    for (const auto& spans : work_) {
      double busy = 0;
      for (const auto& [begin, end] : spans) busy += std::max(0.0, std::min(end, to) - std::max(begin, from));
      least = std::min(least, busy / (to - from));
    }
    return least;
  }
  // Rows of each batch that has some, in their order.
  std::vector<uint32_t> batches() const {
    const std::lock_guard lock(mutex_);
    return batches_;
  }
  // When the first batch without further requests waiting for a slot came.
  double when_queue_ended() const {
    const std::lock_guard lock(mutex_);
    return last_new_slot_;
  }

  uint64_t submit(stage::Batch batch, uint64_t) override {
    const std::lock_guard lock(mutex_);
    if (batch.n_rows() > 0) batches_.push_back(batch.n_rows());
    for (uint32_t row = 0; row < batch.n_rows(); ++row)
      if (batch.positions[row][0] == 0) last_new_slot_ = now_;
    Completion completion{++last_ticket_, {}, {}};
    double at = now_;
    for (size_t i = 0; i < stages_.size(); ++i) {
      const double begin = std::max(at + stages_[i].hop, free_at_[i]);
      const double took = stages_[i].of(batch.n_rows());
      free_at_[i] = at = begin + took;
      work_[i].emplace_back(begin, at);
      completion.stage_seconds.push_back(took / 1000);
    }
    for (const stage::OutputRequest& wanted : batch.outputs) {
      stage::RowOutput row{wanted.row, wanted.kind, {}, {}, 1};
      for (uint32_t i = 0; i < wanted.top_k; ++i) {
        row.ids.push_back(static_cast<int32_t>(10 + i));
        row.values.push_back(-static_cast<float>(i));
      }
      row.values.resize(row.values.size() + wanted.named_ids.size());
      if (wanted.kind == stage::OutputKind::logits) {
        row.values.assign(plan_.n_vocab, -5);
        row.values[10] = 0;
      }
      completion.rows.push_back(std::move(row));
    }
    done_.emplace(at + stages_[0].hop, std::move(completion));
    return last_ticket_;
  }

  std::optional<PipelineEvent> poll(std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    if (!told_) {
      told_ = true;
      return PlanReady{plan_};
    }
    const auto due = [&] { return !done_.empty() && (timeout.count() > 0 || done_.begin()->first <= now_); };
    if (timeout.count() > 0) changed_.wait_for(lock, timeout, [&] { return running_ && (due() || woken_); });
    woken_ = false;
    if (!running_ || !due()) return std::nullopt;
    now_ = std::max(now_, done_.begin()->first);
    PipelineEvent event = std::move(done_.begin()->second);
    done_.erase(done_.begin());
    return event;
  }

  void wake() override {
    const std::lock_guard lock(mutex_);
    woken_ = true;
    changed_.notify_all();
  }

 private:
  PlanSummary plan_;
  const std::vector<Cost> stages_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool told_ = false, running_ = false, woken_ = false;
  double now_ = 0, last_new_slot_ = 0;
  std::vector<double> free_at_;
  std::vector<std::vector<std::pair<double, double>>> work_;  // per stage: when it computed
  std::vector<uint32_t> batches_;
  std::multimap<double, Completion> done_;
  uint64_t last_ticket_ = 0;
};

// TinyLlama on one core: a decode row costs twice a row of a prompt.
constexpr Cost kCore{14, 8, 0.2};

PlanSummary plan_of(uint32_t n_slots) { return test::make_plan({full_group(4096)}, 4096, 512, n_slots, 32); }

GenerateParams request(size_t n_prompt, int32_t n_predict) {
  GenerateParams params = greedy(std::vector<int32_t>(n_prompt, 5), n_predict);
  params.sampling.ignore_eos = true;
  params.cache_prompt = false;
  return params;
}

class Overlap : public ::testing::Test {
 protected:
  void run(std::vector<Cost> stages, uint32_t n_slots, const std::vector<GenerateParams>& requests) {
    pipeline_ = std::make_unique<SimulatedPipeline>(plan_of(n_slots), std::move(stages));
    EngineOptions options;
    options.max_queue = 1000;
    Engine engine(*pipeline_, *vocabulary_, options);
    ASSERT_TRUE(engine.wait_until_ready(kLong));
    std::vector<std::shared_ptr<TokenStream>> streams;
    for (const GenerateParams& params : requests) streams.push_back(engine.submit(params));
    pipeline_->go();
    for (const auto& stream : streams) EXPECT_TRUE(collect(*stream).final);
    engine.shutdown(std::chrono::milliseconds(0));
  }
  const std::unique_ptr<const vocab::Vocabulary> vocabulary_ = make_vocabulary();
  std::unique_ptr<SimulatedPipeline> pipeline_;
};

TEST_F(Overlap, EightStreamsKeepTwoStagesBusy) {
  run({kCore, kCore}, 8, std::vector(8, request(20, 200)));
  EXPECT_GE(pipeline_->utilisation(0.1 * pipeline_->now(), 0.95 * pipeline_->now()), 0.95);
}

TEST_F(Overlap, EveryStageHasAGroupHoweverManyThereAre) {
  for (const size_t n : {3u, 4u, 6u}) {
    run(std::vector(n, kCore), 12, std::vector(12, request(20, 100)));
    EXPECT_GE(pipeline_->utilisation(0.2 * pipeline_->now(), 0.9 * pipeline_->now()), 0.9) << n << " stages";
  }
}

TEST_F(Overlap, GroupsStayApartWhileStreamsComeAndGo) {
  std::mt19937 random(7);
  std::vector<GenerateParams> requests;
  for (int i = 0; i < 120; ++i)
    requests.push_back(request(1 + random() % 150, static_cast<int32_t>(5 + random() % 90)));
  for (const size_t n : {2u, 3u}) {
    run(std::vector(n, kCore), 8, requests);
    const double end = pipeline_->when_queue_ended();
    EXPECT_GT(end, 0.8 * pipeline_->now());
    // The engine's thread is a real one: when it takes requests in is not simulated, and moves the figure by a percent.
    EXPECT_GE(pipeline_->utilisation(0.05 * end, end), 0.88) << n << " stages";
  }
}

// The least time for n tokens over stages of the same speed, over all ways to cut them evenly.
double best_prompt_ms(uint32_t n, size_t n_stages) {
  double best = 1e30;
  for (uint32_t n_chunks = 1; n_chunks <= n; ++n_chunks) {
    const double rows = static_cast<double>(n) / n_chunks;
    best = std::min(best, static_cast<double>(n_chunks + n_stages - 1) * (kCore.fixed + kCore.per_row * rows));
  }
  return best;
}

TEST_F(Overlap, APromptFlowsThroughTheStagesInNearlyTheLeastTime) {
  for (const size_t n_stages : {2u, 3u, 4u}) {
    for (const uint32_t n : {256u, 1000u, 2048u}) {
      const std::vector stages(n_stages, kCore);
      run(stages, 1, {request(n, 0)});
      EXPECT_LE(pipeline_->now(), best_prompt_ms(n, n_stages) / 0.93) << n << " tokens, " << n_stages << " stages";
      // Once the engine knows how long small and large batches take.
      run(stages, 1, {request(300, 20)});
      const double before = pipeline_->now();
      run(stages, 1, {request(300, 20), request(n, 0)});
      EXPECT_LE(pipeline_->now() - before, best_prompt_ms(n, n_stages) / 0.96)
          << n << " tokens, " << n_stages << " stages";
    }
  }
}

TEST_F(Overlap, OneStageComputesAsManyRowsAtOnceAsItCan) {
  run({kCore}, 1, {request(1200, 0)});
  EXPECT_EQ(pipeline_->batches(), (std::vector<uint32_t>{512, 512, 176}));
}

TEST_F(Overlap, PromptsAndAnswersShareTheStages) {
  std::vector<GenerateParams> requests(6, request(20, 150));
  for (int i = 0; i < 6; ++i) requests.push_back(request(900, 10));
  run({kCore, kCore}, 8, requests);
  const double end = pipeline_->when_queue_ended();
  EXPECT_GE(pipeline_->utilisation(0.05 * end, end), 0.9);
}

TEST(StageCost, CutsPromptsByATableBeforeItHasMeasured) {
  const StageCost cost;
  EXPECT_EQ(cost.chunk(1000, 1, 512), 512u);
  for (const uint32_t n_stages : {2u, 3u, 8u}) {
    uint32_t last = 0;
    for (const uint32_t n : {100u, 300u, 1000u, 4000u, 100000u}) {
      const uint32_t chunk = cost.chunk(n, n_stages, 512);
      EXPECT_GE(chunk, last) << "longer prompts have no smaller chunks";
      EXPECT_TRUE(chunk % 8 == 0 || chunk == n) << chunk;
      EXPECT_LE(chunk, 512u);
      last = chunk;
    }
  }
  EXPECT_LE(cost.chunk(256, 4, 512), cost.chunk(256, 2, 512));
}

TEST(StageCost, LearnsFixedCostAndCostPerRow) {
  for (const double fixed : {1.0, 20.0, 200.0}) {
    StageCost cost;
    for (int i = 0; i < 50; ++i)
      for (const uint32_t n : {1u, 4u, 32u, 128u}) cost.add(n, (fixed + n) / 1000);
    EXPECT_NEAR(cost.seconds(64), (fixed + 64) / 1000, 1e-3 * (fixed + 64) / 1000);
    // The best chunk of n rows on two stages is about sqrt(n x fixed / per_row).
    const double best = std::sqrt(4096 * fixed);
    EXPECT_NEAR(cost.chunk(4096, 2, 4096), best, 0.35 * best) << fixed;
  }
}

TEST(StageCost, FollowsStagesThatBecomeSlower) {
  StageCost cost;
  for (int i = 0; i < 100; ++i)
    for (const uint32_t n : {1u, 64u}) cost.add(n, (10.0 + n) / 1000);
  for (int i = 0; i < 100; ++i)
    for (const uint32_t n : {1u, 64u}) cost.add(n, (30.0 + 3 * n) / 1000);
  EXPECT_NEAR(cost.seconds(32), 0.126, 0.002);
}

TEST(StageCost, IgnoresTimesThatAreNone) {
  StageCost cost;
  const double before = cost.seconds(10);
  cost.add(0, 1);
  cost.add(10, 0);
  cost.add(10, -1);
  EXPECT_EQ(cost.seconds(10), before);
}

}  // namespace
}  // namespace caravan::engine
