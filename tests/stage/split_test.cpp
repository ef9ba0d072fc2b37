// The bits of a sequence's logits do not depend on where the model is cut, on threads, chunks or batch mates.
#include <gtest/gtest.h>

#include <random>

#include "base/cpu_features.h"
#include "device/cpu/cpu_device.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::stage {
namespace {

using testing::TinyKind;
using Rows = std::vector<std::vector<float>>;

struct Case {
  const char* name;
  TinyKind kind;
  tensor::DType matrix_type, kv_type;
};

class EveryModel : public ::testing::TestWithParam<Case> {
 protected:
  EveryModel() {
    testing::TinyModelOptions options;
    options.kind = GetParam().kind;
    options.matrix_type = GetParam().matrix_type;
    if (options.kind == TinyKind::gemma3) options.n_layer = 7;
    model_ = std::make_unique<gguf::Model>(gguf::Model::open(testing::write_tiny_model(folder_.path(), options)));
    arch_ = &models::find_arch(model_->metadata());
    hp_ = arch_->read(model_->metadata());
    cache_ = testing::test_cache(*model_);
    cache_.k_type = cache_.v_type = GetParam().kv_type;
  }

  bool is_encoder() const { return GetParam().kind == TinyKind::bert || GetParam().kind == TinyKind::nomic_bert; }
  OutputKind kind() const { return is_encoder() ? OutputKind::hidden : OutputKind::logits; }

  std::vector<int32_t> tokens(size_t n, uint32_t seed) const {
    std::minstd_rand random(seed);
    std::vector<int32_t> result(n);
    for (int32_t& token : result) token = static_cast<int32_t>(random() % hp_.n_vocab);
    return result;
  }

  // Rows of the sequence alone, on a device with so many threads.
  Rows alone(const std::vector<Slice>& slices, int n_threads, size_t chunk) const {
    device::cpu::CpuDevice device(n_threads, select_isa(), 0);
    testing::SliceChain chain(device, *model_, slices, cache_);
    testing::BatchBuilder builder(arch_->cache_groups(hp_), cache_);
    return testing::sequence_rows(chain, builder, tokens(24, 5), chunk, kind());
  }

  testing::TemporaryDirectory folder_;
  std::unique_ptr<gguf::Model> model_;
  const models::Arch* arch_;
  models::Hyperparameters hp_;
  CacheConfig cache_;
};

// An encoder sees its sequence in one batch and has no cache.
class EveryDecoder : public EveryModel {};

constexpr Case kDecoders[] = {{"llama", TinyKind::llama, tensor::DType::f32, tensor::DType::f32},
                              {"llama_q8_0", TinyKind::llama, tensor::DType::q8_0, tensor::DType::f16},
                              {"llama_q4_0", TinyKind::llama, tensor::DType::q4_0, tensor::DType::q8_0},
                              {"llama_moe", TinyKind::llama_moe, tensor::DType::f16, tensor::DType::f16},
                              {"gemma3", TinyKind::gemma3, tensor::DType::bf16, tensor::DType::f16},
                              {"qwen3moe", TinyKind::qwen3moe, tensor::DType::q8_0, tensor::DType::f16},
                              {"gpt_oss", TinyKind::gpt_oss, tensor::DType::mxfp4, tensor::DType::f16},
                              {"deepseek2", TinyKind::deepseek2, tensor::DType::f16, tensor::DType::f16},
                              {"deepseek2_q8_0", TinyKind::deepseek2, tensor::DType::q8_0, tensor::DType::q8_0}};
constexpr Case kEncoders[] = {{"bert", TinyKind::bert, tensor::DType::f16, tensor::DType::f16},
                              {"nomic_bert", TinyKind::nomic_bert, tensor::DType::q8_0, tensor::DType::f16}};

std::string case_name(const ::testing::TestParamInfo<Case>& param) { return param.param.name; }
INSTANTIATE_TEST_SUITE_P(Decoder, EveryModel, ::testing::ValuesIn(kDecoders), case_name);
INSTANTIATE_TEST_SUITE_P(Encoder, EveryModel, ::testing::ValuesIn(kEncoders), case_name);
INSTANTIATE_TEST_SUITE_P(Decoder, EveryDecoder, ::testing::ValuesIn(kDecoders), case_name);

TEST_P(EveryModel, GivesTheSameBitsCutAtEveryLayerBoundary) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  for (uint32_t at = 1; at < hp_.n_layer; ++at) {
    EXPECT_EQ(alone(testing::cut(hp_.n_layer, {at}), 2, 24), whole) << "cut at layer " << at;
  }
  EXPECT_EQ(alone(testing::cut(hp_.n_layer, {1, 2}), 3, 24), whole);
  EXPECT_EQ(alone(testing::cut(hp_.n_layer, {hp_.n_layer}), 1, 24), whole) << "outputs alone";
  EXPECT_EQ(alone(testing::cut(hp_.n_layer, {0}), 1, 24), whole) << "embedding alone";
}

TEST_P(EveryModel, GivesTheSameBitsForEveryNumberOfThreads) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  for (const int n_threads : {2, 3, 5}) {
    EXPECT_EQ(alone(testing::cut(hp_.n_layer, {}), n_threads, 24), whole) << n_threads << " threads";
  }
}

TEST_P(EveryDecoder, GivesTheSameBitsForEveryPromptChunk) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  for (const size_t chunk : {1, 3, 8}) {
    EXPECT_EQ(alone(testing::cut(hp_.n_layer, {}), 2, chunk), whole) << "chunks of " << chunk;
    EXPECT_EQ(alone(testing::cut(hp_.n_layer, {1}), 2, chunk), whole) << "cut, chunks of " << chunk;
  }
}

TEST_P(EveryModel, GivesTheSameBitsAmongSevenBatchMates) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  device::cpu::CpuDevice device(2, select_isa(), 0);
  testing::SliceChain chain(device, *model_, testing::cut(hp_.n_layer, {1}), cache_);
  testing::BatchBuilder builder(arch_->cache_groups(hp_), cache_);
  const std::vector<int32_t> ours = tokens(24, 5);
  const bool encoder = is_encoder();
  Rows rows;
  for (size_t begin = 0; begin < ours.size(); begin += encoder ? 24 : 3) {
    Batch batch;
    for (Slot slot = 0; slot < 8; ++slot) {
      if (slot == 4) {  // ours is neither first nor last
        builder.add(batch, 4, std::span(ours).subspan(begin, encoder ? 24 : 3), kind());
      } else {
        builder.add(batch, slot, tokens(1 + (begin / 3 + slot) % 5, static_cast<uint32_t>(begin + slot)),
                    OutputKind::none);
      }
    }
    for (RowOutput& output : chain.compute(batch)) rows.push_back(std::move(output.values));
  }
  EXPECT_EQ(rows, whole);
}

TEST_P(EveryModel, GivesTheSameBitsWhenOutputsAreWantedForSomeRows) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  device::cpu::CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, *model_, testing::cut(hp_.n_layer, {}), cache_);
  testing::BatchBuilder builder(arch_->cache_groups(hp_), cache_);
  Batch batch;
  builder.add(batch, 0, tokens(24, 5), OutputKind::none);
  batch.outputs = {{2, kind(), 0, {}}, {23, kind(), 0, {}}};
  const auto outputs = chain.compute(batch);
  ASSERT_EQ(outputs.size(), 2u);
  EXPECT_EQ(outputs[0].values, whole[2]);
  EXPECT_EQ(outputs[1].values, whole[23]);
}

// What placement adds up is what the whole model takes, also where one tensor stands for several (attn_qkv).
TEST_P(EveryModel, NeedsTheMemoryOfItsParts) {
  const device::cpu::CpuDevice device(1, select_isa(), 0);
  const auto tensors = models::tensor_map(*model_);
  const LayerNeeds needs = layer_needs(*arch_, hp_, tensors, cache_, device);
  uint64_t weights = needs.embedding_weights + needs.output_weights + needs.shared_weights, kv_cache = 0;
  for (uint32_t layer = 0; layer < hp_.n_layer; ++layer) {
    weights += needs.layer_weights[layer];
    kv_cache += needs.layer_kv_cache[layer];
  }
  const MemoryNeed whole = memory_need(*arch_, hp_, tensors, models::whole_model(hp_), cache_, device);
  EXPECT_EQ(weights, whole.weights);
  EXPECT_EQ(kv_cache, whole.kv_cache);
}

// Prefill without any output must still write the cache.
TEST_P(EveryDecoder, GivesTheSameBitsAfterAPromptWithoutOutputs) {
  const Rows whole = alone(testing::cut(hp_.n_layer, {}), 1, 24);
  device::cpu::CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, *model_, testing::cut(hp_.n_layer, {1}), cache_);
  testing::BatchBuilder builder(arch_->cache_groups(hp_), cache_);
  const std::vector<int32_t> ours = tokens(24, 5);
  Batch prompt, last;
  builder.add(prompt, 0, std::span(ours).first(23), OutputKind::none);
  EXPECT_TRUE(chain.compute(prompt).empty());
  builder.add(last, 0, std::span(ours).last(1), kind());
  EXPECT_EQ(chain.compute(last).at(0).values, whole[23]);
}

TEST(SliceSession, CompilesOnceForFiveHundredStepsOfAnySize) {
  const testing::TemporaryDirectory folder;
  const gguf::Model model = gguf::Model::open(testing::write_tiny_model(folder.path(), {}));
  const models::Arch& arch = models::find_arch(model.metadata());
  const models::Hyperparameters hp = arch.read(model.metadata());
  const CacheConfig cache = testing::test_cache(model, 512, 8);
  device::cpu::CpuDevice device(1, select_isa(), 0);
  testing::SliceChain chain(device, model, {models::whole_model(hp)}, cache);
  testing::BatchBuilder builder(arch.cache_groups(hp), cache);
  EXPECT_EQ(device.n_compiled(), 1u);
  std::minstd_rand random(7);
  for (int step = 0; step < 500; ++step) {
    Batch batch;
    for (Slot slot = 0; slot < 8; ++slot) {
      const size_t n = random() % 4;
      const std::vector<int32_t> tokens(n, static_cast<int32_t>(random() % hp.n_vocab));
      builder.add(batch, slot, tokens, random() % 2 == 0 ? OutputKind::candidates : OutputKind::none);
    }
    ASSERT_EQ(chain.compute(batch).size(), batch.outputs.size());
  }
  EXPECT_EQ(device.n_compiled(), 1u);
}

}  // namespace
}  // namespace caravan::stage
