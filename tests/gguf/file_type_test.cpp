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
  EXPECT_EQ(find_file_type("Q4_K"), find_file_type("Q4_K_M")) << "the short name";
  EXPECT_EQ(find_file_type("Q4_X"), nullptr);
  EXPECT_FALSE(find_file_type("IQ2_XXS")->can_write);
  EXPECT_TRUE(file_type_names().starts_with("F32, F16"));
  EXPECT_EQ(file_type_names().find("IQ2_XXS"), std::string::npos);
  for (const FileType& type : file_types()) {
    EXPECT_EQ(find_file_type(type.number), &type) << type.name;
    EXPECT_TRUE(!type.can_write || tensor::dtype_info(type.base_type).quantize != nullptr) << type.name;
  }
  EXPECT_EQ(find_file_type(33U), nullptr);
}

TEST(FileType, IsDescribedForPeople) {
  Metadata metadata;
  EXPECT_EQ(file_type_description(metadata), "unknown");
  metadata.set("general.file_type", Value::of(uint32_t{15}));
  EXPECT_EQ(file_type_description(metadata), "Q4_K - Medium");
  metadata.set("general.file_type", Value::of(uint32_t{1000}));
  EXPECT_EQ(file_type_description(metadata), "file type 1000");
}

TEST(FileType, ReadsTheContextFromTheMetadata) {
  Metadata metadata;
  metadata.set("general.architecture", Value::of("qwen3moe"));
  EXPECT_THROW(mixture_context(metadata, true), FormatError);
  metadata.set("qwen3moe.block_count", Value::of(uint32_t{0xffffffff}));
  metadata.set("qwen3moe.expert_count", Value::of(uint32_t{128}));
  metadata.set("qwen3moe.attention.head_count", Value::of(std::vector<int32_t>{32, 32}));
  metadata.set("qwen3moe.attention.head_count_kv", Value::of(uint32_t{4}));
  const MixtureContext context = mixture_context(metadata, false);
  EXPECT_EQ(context.n_expert, 128U);
  EXPECT_EQ(context.n_head_per_kv, 8U);
  EXPECT_FALSE(context.has_output);
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

TEST(FileType, FollowsTheSmallMixtures) {
  const MixtureContext plain{32, 0, true, 1}, grouped{32, 0, true, 4};
  EXPECT_EQ(choose("Q2_K", plain, "blk.9.attn_v.weight"), DType::q3_k);
  EXPECT_EQ(choose("Q2_K", grouped, "blk.9.attn_v.weight"), DType::q4_k);
  EXPECT_EQ(choose("Q2_K", plain, "blk.9.ffn_down.weight"), DType::q3_k);
  EXPECT_EQ(choose("Q2_K", plain, "blk.9.attn_output.weight"), DType::q3_k);
  EXPECT_EQ(choose("Q2_K", plain, "blk.9.attn_q.weight"), DType::q2_k);
  EXPECT_EQ(choose("Q3_K_S", plain, "blk.9.ffn_down.weight"), DType::q3_k);
  EXPECT_EQ(choose("Q3_K_M", plain, "blk.1.attn_v.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q3_K_M", plain, "blk.2.attn_qkv.weight"), DType::q4_k);
  EXPECT_EQ(choose("Q3_K_M", plain, "blk.1.ffn_down.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q3_K_M", plain, "blk.2.ffn_down.weight"), DType::q4_k);
  EXPECT_EQ(choose("Q3_K_L", plain, "blk.2.attn_output.weight"), DType::q5_k);
  EXPECT_EQ(choose("IQ4_XS", plain, "blk.3.ffn_down.weight"), DType::q5_k);
  EXPECT_EQ(choose("IQ4_XS", plain, "blk.4.ffn_down.weight"), DType::iq4_xs);
  EXPECT_EQ(choose("IQ4_XS", grouped, "blk.4.attn_v.weight"), DType::q5_k);
  EXPECT_EQ(choose("TQ2_0", plain, "token_embd.weight"), DType::q4_k);
  EXPECT_EQ(choose("MXFP4_MOE", plain, "blk.4.attn_q.weight"), DType::q8_0);
  EXPECT_EQ(choose("MXFP4_MOE", plain, "blk.4.ffn_up_exps.weight", {2048, 512, 8}), DType::mxfp4);
}

TEST(FileType, KnowsTheExceptionsOfFalconAndTheLargestLlamas) {
  const MixtureContext falcon{32, 0, true, 71, "falcon"}, llama_70b{80, 0, true, 8, "llama"};
  EXPECT_EQ(choose("Q4_K_M", falcon, "output.weight"), DType::q8_0);
  EXPECT_EQ(choose("Q4_K_M", falcon, "blk.0.ffn_down.weight"), DType::q6_k);
  EXPECT_EQ(choose("Q4_K_M", falcon, "blk.31.ffn_down.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q4_K_S", falcon, "blk.0.ffn_down.weight"), DType::q4_k);
  EXPECT_EQ(choose("Q4_K_S", llama_70b, "blk.20.attn_v.weight"), DType::q5_k);
  EXPECT_EQ(choose("Q3_K_S", llama_70b, "blk.20.attn_v.weight"), DType::q5_k);
}

TEST(FileType, LeavesSmallAndPositionalMatricesAlone) {
  for (const char* name :
       {"position_embd.weight", "token_types.weight", "blk.0.ssm_conv1d.weight", "blk.0.attn_q_norm.weight"})
    EXPECT_FALSE(takes_file_type(name, std::vector<int64_t>{4096, 512})) << name;
  EXPECT_FALSE(takes_file_type("blk.0.attn_q.weight", std::vector<int64_t>{4096, 1})) << "a vector";
  EXPECT_TRUE(takes_file_type("blk.0.attn_q.weight", std::vector<int64_t>{4096, 2}));
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
  EXPECT_EQ(choose("Q3_K_S", context, "blk.5.attn_q.weight", {1152, 1024}), DType::q4_0);
  EXPECT_EQ(choose("IQ4_XS", context, "blk.5.attn_q.weight", {1152, 1024}), DType::iq4_nl);
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
    if (type == nullptr || !type->can_write) continue;
    const Model model = Model::open(entry.path());
    EXPECT_EQ(model.metadata().get_u32("general.file_type", type->number), type->number) << stem;
    const MixtureContext context = mixture_context(model.metadata(), model.find("output.weight") != nullptr);
    for (const TensorInfo& t : model.tensors()) {
      const std::vector<int64_t> ne(t.ne.begin(), t.ne.begin() + t.n_dims);
      EXPECT_EQ(tensor::dtype_name(choose_tensor_type(*type, context, t.name, ne)), tensor::dtype_name(t.type))
          << stem << " " << t.name;
    }
    ++n_files;
  }
  EXPECT_EQ(n_files, 16);
}

}  // namespace
}  // namespace caravan::gguf
