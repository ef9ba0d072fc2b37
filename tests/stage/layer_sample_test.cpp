// What a device measures of a model's layers.
#include "stage/layer_sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/cpu_features.h"
#include "device/cpu/cpu_device.h"
#include "models/registry.h"
#include "models/work.h"
#include "support/kit.h"
#include "support/tiny_model.h"

namespace caravan::stage {
namespace {

using testing::TinyKind;

constexpr uint64_t kEnough = uint64_t{64} << 20;

struct Tiny {
  explicit Tiny(const testing::TinyModelOptions& options)
      : model(gguf::Model::open(testing::write_tiny_model(folder.path(), options))) {}
  SpeedQuestions questions() const {
    return speed_questions(model, models::hyperparameter_metadata(model.metadata()), CacheConfig());
  }
  testing::TemporaryDirectory folder;
  gguf::Model model;
};

class EveryKind : public ::testing::TestWithParam<TinyKind> {};
INSTANTIATE_TEST_SUITE_P(LayerSample, EveryKind,
                         ::testing::Values(TinyKind::llama, TinyKind::llama_moe, TinyKind::gemma2, TinyKind::gemma3,
                                           TinyKind::gpt_oss, TinyKind::deepseek2, TinyKind::bert),
                         [](const auto& info) { return testing::tiny_kind_name(info.param); });

TEST_P(EveryKind, IsTimedForOneRowAndMany) {
  testing::TinyModelOptions options;
  options.kind = GetParam();
  const Tiny tiny(options);
  device::cpu::CpuDevice device(1, select_isa(), kEnough);
  const SpeedQuestions questions = tiny.questions();
  ASSERT_FALSE(questions.layers.empty());
  for (const auto& [kind, sample] : questions.layers) {
    const LayerTimes times = measure_layer(device, sample, kEnough);
    ASSERT_GE(times.n_rows.size(), 2u);
    EXPECT_EQ(times.n_rows.front(), 1u);
    EXPECT_TRUE(std::is_sorted(times.n_rows.begin(), times.n_rows.end()));
    EXPECT_EQ(times.seconds.size(), times.n_rows.size());
    for (const double seconds : times.seconds) EXPECT_GT(seconds, 0);
  }
  EXPECT_EQ(device.info().memory_free, device.info().memory_total);
}

TEST(SpeedQuestions, AskForOneLayerOfEachKindAndTheTypesOfTheRest) {
  testing::TinyModelOptions options;
  options.kind = TinyKind::gemma2;  // layers with and without a window
  options.n_layer = 4;
  const Tiny tiny(options);
  const models::Arch& arch = models::find_arch(tiny.model.metadata());
  const auto kinds = models::layer_kinds(arch, arch.read(tiny.model.metadata()), models::tensor_map(tiny.model));
  EXPECT_EQ(kinds, (std::vector<uint32_t>{0, 1, 0, 1}));
  const SpeedQuestions questions = tiny.questions();
  ASSERT_EQ(questions.layers.size(), 2u);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(questions.layers[i].first, i);
    EXPECT_EQ(questions.layers[i].second.slice, (Slice{i, i + 1, false, false}));
  }
  EXPECT_FALSE(questions.all_types.empty());
  EXPECT_FALSE(questions.other_types.empty());  // of the output matrix
}

TEST(MeasureLayer, RefusesWhatIsNotOneLayer) {
  const Tiny tiny({});
  device::cpu::CpuDevice device(1, select_isa(), kEnough);
  LoadRequest sample = tiny.questions().layers.front().second;
  for (const Slice slice : {Slice{0, 2, false, false}, Slice{0, 1, true, false}, Slice{2, 3, false, true}}) {
    sample.slice = slice;
    EXPECT_THROW(measure_layer(device, sample, kEnough), FormatError);
  }
}

TEST(MeasureLayer, TakesNoMoreMemoryThanItMay) {
  const Tiny tiny({});
  device::cpu::CpuDevice device(1, select_isa(), kEnough);
  EXPECT_THROW(measure_layer(device, tiny.questions().layers.front().second, 1000), ResourceError);
}

TEST(LayerTimes, LieOnLinesThroughWhatWasMeasured) {
  const LayerTimes times{{1, 8, 32}, {2, 9, 57}};
  EXPECT_DOUBLE_EQ(times(1), 2);
  EXPECT_DOUBLE_EQ(times(4), 5);
  EXPECT_DOUBLE_EQ(times(20), 33);
  EXPECT_DOUBLE_EQ(times(32), 57);
  EXPECT_DOUBLE_EQ(times(132), 257);
  EXPECT_DOUBLE_EQ((LayerTimes{{1}, {3}})(5), 15);
}

}  // namespace
}  // namespace caravan::stage
