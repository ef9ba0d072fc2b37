// How long sequences may get when they are planned.
#include <gtest/gtest.h>

#include "base/cpu_features.h"
#include "cluster/cluster_pipeline.h"
#include "device/cpu/cpu_device.h"
#include "engine/engine.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"
#include "vocab/vocabulary.h"

namespace caravan::cluster {
namespace {

// The longest sequence of a plan for that many tokens of context in all.
uint32_t planned_context(testing::TinyKind kind, uint32_t n_ctx) {
  const testing::TemporaryDirectory folder;
  testing::TinyModelOptions tiny;
  tiny.kind = kind;
  const gguf::Model model = gguf::Model::open(testing::write_tiny_model(folder.path(), tiny));
  const auto vocabulary = vocab::Vocabulary::load(model.metadata());
  device::cpu::CpuDevice device(1, select_isa(), 0);
  ClusterOptions options;
  options.n_ctx = n_ctx;
  options.local_memory = uint64_t{1} << 30;
  options.cache = testing::test_cache(model, 1, 2);
  options.cache.n_blocks.clear();
  ClusterPipeline pipeline(model, device, nullptr, options);
  pipeline.start();
  engine::Engine engine(pipeline, *vocabulary);
  EXPECT_TRUE(engine.wait_until_ready(std::chrono::seconds(60)));
  const auto plan = engine.status().plan;
  return plan ? plan->n_ctx : 0;
}

TEST(PlannedContext, IsNoLongerThanATableOfPositions) {
  EXPECT_EQ(planned_context(testing::TinyKind::llama, 1024), 1024u);
  EXPECT_EQ(planned_context(testing::TinyKind::gpt2, 1024), 512u);
  EXPECT_EQ(planned_context(testing::TinyKind::gpt2, 256), 256u);
}

}  // namespace
}  // namespace caravan::cluster
