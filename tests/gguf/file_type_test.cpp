// File types: the mixtures of tensor types, against what llama.cpp writes.
#include "gguf/file_type.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "gguf/reader.h"
#include "support/kit.h"

namespace caravan::gguf {
namespace {

using tensor::DType;

DType choose(std::string_view file_type, const MixtureContext& context, std::string_view name,
             const std::vector<int64_t>& ne = {4096, 4096}) {
  return choose_tensor_type(*find_file_type(file_type), context, name, ne);
}

TEST(FileType, IsFoundByNameInAnyCase) {
  EXPECT_EQ(find_file_type("q4_k_m")->number, 15U);
  EXPECT_EQ(find_file_type("BF16")->base_type, DType::bf16);
  EXPECT_EQ(find_file_type("IQ2_XXS"), nullptr);
  EXPECT_EQ(find_file_type("Q4_K"), nullptr) << "a tensor type, not a file type";
  EXPECT_TRUE(file_type_names().starts_with("F32, F16"));
}

TEST(FileType, KeepsVectorsNormsAndRoutersInF32) {
  const MixtureContext context{32, 8, true};
  for (const FileType& type : file_types()) {
    EXPECT_EQ(choose_tensor_type(type, context, "blk.0.attn_norm.weight", std::vector<int64_t>{4096}), DType::f32);
    EXPECT_EQ(choose_tensor_type(type, context, "blk.0.attn_q.bias", std::vector<int64_t>{4096, 1}), DType::f32);
    EXPECT_EQ(choose_tensor_type(type, context, "blk.0.ffn_gate_inp.weight", std::vector<int64_t>{4096, 8}),
              DType::f32);
  }
}

TEST(FileType, SpendsMoreBitsOnSomeLayersInMediumMixtures) {
  const MixtureContext context{32, 0, true};
  // 32 layers: 0-3, 28-31, and 6, 9, ..., 27.
  for (uint32_t layer = 0; layer < 32; ++layer) {
    const bool favoured = layer < 4 || layer >= 28 || (layer >= 6 && layer % 3 == 0);
    const DType expected = favoured ? DType::q6_k : DType::q4_k;
    EXPECT_EQ(choose("Q4_K_M", context, fmt::format("blk.{}.attn_v.weight", layer)), expected) << layer;
    EXPECT_EQ(choose("Q4_K_M", context, fmt::format("blk.{}.ffn_down.weight", layer)), expected) << layer;
    EXPECT_EQ(choose("Q4_K_M", context, fmt::format("blk.{}.attn_q.weight", layer)), DType::q4_k) << layer;
  }
  EXPECT_EQ(choose("Q4_K_M", context, "output.weight"), DType::q6_k);
  EXPECT_EQ(choose("Q4_K_M", context, "token_embd.weight"), DType::q4_k);
  EXPECT_EQ(choose("Q5_K_M", context, "blk.0.ffn_down.weight"), DType::q6_k);
  EXPECT_EQ(choose("Q5_K_S", context, "blk.0.ffn_down.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q4_K_S", context, "blk.3.attn_v.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q4_K_S", context, "blk.4.attn_v.weight"), DType::q4_k);
}

TEST(FileType, TreatsTiedEmbeddingsAsTheOutput) {
  const MixtureContext tied{16, 0, false};
  EXPECT_EQ(choose("Q4_0", tied, "token_embd.weight"), DType::q6_k);
  EXPECT_EQ(choose("Q8_0", tied, "token_embd.weight"), DType::q8_0);
  EXPECT_EQ(choose("F16", tied, "token_embd.weight"), DType::f16);
  EXPECT_EQ(choose("Q4_0", tied, "token_embd.weight", {1152, 1000}), DType::q8_0) << "1152 is no multiple of 256";
}

TEST(FileType, FallsBackWhereRowsDoNotFitTheBlocks) {
  const MixtureContext context{26, 0, true};
  EXPECT_EQ(choose("Q4_K_M", context, "blk.5.attn_q.weight", {1152, 1024}), DType::q5_0);
  EXPECT_EQ(choose("Q6_K", context, "blk.5.attn_q.weight", {1152, 1024}), DType::q8_0);
  EXPECT_EQ(choose("Q4_0", context, "blk.5.attn_q.weight", {172, 64}), DType::f16);
}

TEST(FileType, MixesForEightExpertsAsForMixtral) {
  const MixtureContext context{32, 8, true};
  EXPECT_EQ(choose("Q4_K_M", context, "blk.5.attn_k.weight"), DType::q8_0);
  EXPECT_EQ(choose("Q4_0", context, "blk.5.attn_v.weight"), DType::q8_0);
  EXPECT_EQ(choose("Q4_K_M", context, "blk.5.attn_output.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q4_K_M", context, "blk.0.ffn_down_exps.weight", {14336, 4096, 8}), DType::q6_k);
}

// The kit's quantised models were written by llama.cpp: each of their tensors has the type that we would choose.
TEST(FileType, ChoosesTheTypesOfTheKitsFiles) {
  CARAVAN_REQUIRE_KIT(kit);
  int n_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kit / "models/quants")) {
    const std::string stem = entry.path().stem().string();
    const FileType* type =
        entry.path().extension() == ".gguf" ? find_file_type(stem.substr(stem.find('-') + 1)) : nullptr;
    if (type == nullptr) continue;
    const Model model = Model::open(entry.path());
    EXPECT_EQ(model.metadata().get_u32("general.file_type", type->number), type->number) << stem;
    const MixtureContext context{model.metadata().get_u32("llama.block_count"),
                                 model.metadata().get_u32("llama.expert_count", 0),
                                 model.find("output.weight") != nullptr};
    for (const TensorInfo& t : model.tensors()) {
      const std::vector<int64_t> ne(t.ne.begin(), t.ne.begin() + t.n_dims);
      EXPECT_EQ(tensor::dtype_name(choose_tensor_type(*type, context, t.name, ne)), tensor::dtype_name(t.type))
          << stem << " " << t.name;
    }
    ++n_files;
  }
  EXPECT_GE(n_files, 5);
}

}  // namespace
}  // namespace caravan::gguf
