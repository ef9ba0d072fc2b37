// caravan quantize: the types it chooses, what it writes, what it refuses.
#include "quantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/file.h"
#include "commands.h"
#include "gguf/format.h"
#include "gguf/writer.h"
#include "support/kit.h"

namespace caravan::app {
namespace {

using caravan::testing::TemporaryDirectory;
using gguf::Value;
using tensor::DType;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

struct SampleTensor {
  std::string name;
  std::vector<int64_t> ne;
  DType type = DType::f16;
};

// A llama of two layers as far as quantising goes; 192 is no multiple of 256.
const std::vector<SampleTensor> kSample = {{"token_embd.weight", {256, 40}},
                                           {"output_norm.weight", {256}, DType::f32},
                                           {"output.weight", {256, 40}},
                                           {"blk.0.attn_norm.weight", {256}, DType::f32},
                                           {"blk.0.attn_q.weight", {256, 64}},
                                           {"blk.0.attn_v.weight", {256, 32}},
                                           {"blk.0.ffn_down.weight", {192, 256}},
                                           {"blk.1.attn_q.weight", {256, 64}, DType::bf16},
                                           {"blk.1.attn_q.bias", {64}, DType::f32},
                                           {"blk.1.ffn_down.weight", {192, 256}}};

gguf::Metadata sample_metadata() {
  gguf::Metadata metadata;
  metadata.set("general.architecture", Value::of("llama"));
  metadata.set("general.file_type", Value::of(uint32_t{1}));
  metadata.set("llama.block_count", Value::of(uint32_t{2}));
  metadata.set("llama.attention.head_count", Value::of(uint32_t{4}));
  metadata.set("llama.attention.head_count_kv", Value::of(uint32_t{2}));
  metadata.set("tokenizer.ggml.model", Value::of("no_vocab"));
  return metadata;
}

// Values of both signs around a sine, the same for every tensor of a length.
std::vector<float> sample_values(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i) * 0.7f) * 0.1f;
  return values;
}

void write_file(const std::filesystem::path& path, const gguf::Metadata& metadata,
                const std::vector<SampleTensor>& tensors) {
  gguf::Writer writer(path, metadata);
  for (const SampleTensor& t : tensors) writer.declare(t.name, t.type, t.ne);
  writer.begin_data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const gguf::TensorInfo& tensor = writer.tensors()[i];
    const auto values = sample_values(tensor::n_elements(tensor.ne));
    std::vector<std::byte> bytes(tensor.size_bytes);
    tensor::dtype_info(tensor.type).quantize(values.data(), bytes.data(), static_cast<int64_t>(values.size()));
    writer.write(i, 0, bytes);
  }
  writer.finish();
}

gguf::Model sample_model(const std::filesystem::path& path) {
  write_file(path, sample_metadata(), kSample);
  return gguf::Model::open(path);
}

QuantizeOptions as(std::string_view type) {
  QuantizeOptions options;
  options.file_type = gguf::find_file_type(type);
  options.n_threads = 2;
  return options;
}

gguf::Model quantised(const gguf::Model& model, const QuantizeOptions& options, const std::filesystem::path& path) {
  write_quantized(model, plan_quantization(model, options), options, path);
  return gguf::Model::open(path);
}

DType type_of(const gguf::Model& model, const char* name) { return model.get(name).type; }

TEST(QuantizeModel, FollowsTheFileTypesMixture) {
  const TemporaryDirectory folder;
  const auto model = quantised(sample_model(folder.path() / "in"), as("Q4_K_M"), folder.path() / "out");
  EXPECT_EQ(type_of(model, "token_embd.weight"), DType::q4_k);
  EXPECT_EQ(type_of(model, "output.weight"), DType::q6_k);
  EXPECT_EQ(type_of(model, "blk.0.attn_q.weight"), DType::q4_k);
  EXPECT_EQ(type_of(model, "blk.1.attn_q.weight"), DType::q4_k);
  EXPECT_EQ(type_of(model, "blk.0.ffn_down.weight"), DType::q5_0) << "192 is no multiple of 256";
  EXPECT_EQ(type_of(model, "blk.0.attn_norm.weight"), DType::f32);
  EXPECT_EQ(model.metadata().get_u32("general.file_type"), 15U);
  EXPECT_EQ(model.metadata().get_u32("general.quantization_version"), 2U);
  EXPECT_EQ(model.metadata().get_string("tokenizer.ggml.model"), "no_vocab");
}

TEST(QuantizeModel, KeepsTheValuesWithinTheTypesError) {
  const TemporaryDirectory folder;
  const auto model = sample_model(folder.path() / "in");
  for (const gguf::FileType& type : gguf::file_types()) {
    if (!type.can_write) continue;
    const auto result = quantised(model, as(type.name), folder.path() / "out");
    ASSERT_EQ(result.tensors().size(), model.tensors().size());
    for (size_t i = 0; i < model.tensors().size(); ++i) {
      const auto expected = model.read_f32(model.tensors()[i]), found = result.read_f32(result.tensors()[i]);
      double error = 0, size = 0;
      for (size_t k = 0; k < expected.size(); ++k) {
        error += std::pow(double{found[k]} - double{expected[k]}, 2);
        size += std::pow(double{expected[k]}, 2);
      }
      // The largest is that of the ternary types, which round a sine to three levels.
      EXPECT_LT(error, size * (type.name.starts_with("TQ") ? 0.14 : 0.03)) << type.name << " " << expected.size();
    }
  }
}

TEST(QuantizeModel, WritesTheSameBytesOnAnyNumberOfThreads) {
  const TemporaryDirectory folder;
  // More values than are converted at a time.
  write_file(folder.path() / "in", sample_metadata(),
             {{"blk.0.attn_q.weight", {512, 1500}}, {"blk.0.attn_k.weight", {512, 7}}});
  const auto model = gguf::Model::open(folder.path() / "in");
  QuantizeOptions options = as("Q5_K_S");
  options.n_threads = 1;
  quantised(model, options, folder.path() / "one");
  options.n_threads = 4;
  quantised(model, options, folder.path() / "four");
  EXPECT_TRUE(read_file(folder.path() / "one") == read_file(folder.path() / "four"));
}

TEST(QuantizeModel, LetsOptionsDecideAboutTensors) {
  const TemporaryDirectory folder;
  const auto model = sample_model(folder.path() / "in");
  QuantizeOptions options = as("Q4_K_M");
  options.pure = true;
  options.tensor_types = {{"blk\\.1\\.attn_q", DType::q8_0}, {"attn_q", DType::q3_k}};
  auto result = quantised(model, options, folder.path() / "out");
  EXPECT_EQ(type_of(result, "output.weight"), DType::q4_k) << "pure";
  EXPECT_EQ(type_of(result, "blk.1.attn_q.weight"), DType::q8_0);
  EXPECT_EQ(type_of(result, "blk.0.attn_q.weight"), DType::q3_k);
  EXPECT_EQ(type_of(result, "blk.1.attn_q.bias"), DType::f32);

  options = as("Q4_0");
  options.output_type = DType::q5_k;
  options.token_embedding_type = DType::iq4_nl;
  result = quantised(model, options, folder.path() / "out");
  EXPECT_EQ(type_of(result, "output.weight"), DType::q5_k);
  EXPECT_EQ(type_of(result, "token_embd.weight"), DType::iq4_nl);
  EXPECT_EQ(type_of(result, "blk.0.attn_q.weight"), DType::q4_0);

  options = as("Q4_0");
  options.leave_output = true;
  EXPECT_EQ(type_of(quantised(model, options, folder.path() / "out"), "output.weight"), DType::f16);
  options.tensor_types = {{"(", DType::q8_0}};
  EXPECT_THROW(plan_quantization(model, options), RequestError);
}

TEST(QuantizeModel, ConvertsQuantisedTensorsOnlyWhenAllowed) {
  const TemporaryDirectory folder;
  const auto small = quantised(sample_model(folder.path() / "in"), as("Q8_0"), folder.path() / "q8");
  EXPECT_THAT([&] { plan_quantization(small, as("Q4_0")); },
              ThrowsMessage<RequestError>(HasSubstr("tensor 'token_embd.weight' is Q8_0 already")));
  EXPECT_NO_THROW(plan_quantization(small, as("Q8_0"))) << "nothing to convert";
  QuantizeOptions options = as("Q4_0");
  options.allow_requantize = true;
  EXPECT_EQ(type_of(quantised(small, options, folder.path() / "out"), "blk.0.attn_q.weight"), DType::q4_0);
}

TEST(QuantizeModel, RefusesValuesThatTheTypeCannotHoldAndLeavesNoFile) {
  const TemporaryDirectory folder;
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e5f}) {
    gguf::Writer writer(folder.path() / "in", sample_metadata());
    writer.declare("blk.0.attn_q.weight", DType::f32, std::vector<int64_t>{32, 3});
    writer.begin_data();
    auto values = sample_values(96);
    values[70] = bad;
    writer.write(0, 0, std::as_bytes(std::span(values)));
    writer.finish();
    const auto model = gguf::Model::open(folder.path() / "in");
    for (const char* type : {"Q4_0", "F16"})
      EXPECT_THAT([&] { quantised(model, as(type), folder.path() / "out"); },
                  ThrowsMessage<FormatError>(HasSubstr("of number 70 cannot be written as")));
    EXPECT_FALSE(std::filesystem::exists(folder.path() / "out"));
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "no temporary file stays";
  }
}

TEST(QuantizeModel, JoinsOrKeepsTheFilesOfASplitModel) {
  const TemporaryDirectory folder;
  const std::string prefix = folder.path() / "in";
  for (uint32_t part = 0; part < 2; ++part) {
    gguf::Metadata metadata = part == 0 ? sample_metadata() : gguf::Metadata();
    metadata.set(gguf::kKeySplitNo, Value{gguf::ValueType::u16, uint64_t{part}});
    metadata.set(gguf::kKeySplitCount, Value{gguf::ValueType::u16, uint64_t{2}});
    metadata.set(gguf::kKeySplitTensorsCount, Value::of(static_cast<int32_t>(kSample.size())));
    const auto half = kSample.begin() + static_cast<ptrdiff_t>(kSample.size() / 2);
    write_file(gguf::split_path(prefix, part, 2), metadata,
               part == 0 ? std::vector(kSample.begin(), half) : std::vector(half, kSample.end()));
  }
  const auto model = gguf::Model::open(gguf::split_path(prefix, 0, 2));
  const auto joined = quantised(model, as("Q8_0"), folder.path() / "joined");
  EXPECT_EQ(joined.n_files(), 1);
  EXPECT_FALSE(joined.metadata().contains("split.count"));

  QuantizeOptions options = as("Q8_0");
  options.keep_split = true;
  write_quantized(model, plan_quantization(model, options), options, folder.path() / "out");
  const auto kept = gguf::Model::open(gguf::split_path((folder.path() / "out").string(), 0, 2));
  EXPECT_EQ(kept.n_files(), 2);
  for (const gguf::TensorInfo& tensor : joined.tensors()) {
    EXPECT_EQ(kept.get(tensor.name).type, tensor.type);
    EXPECT_TRUE(kept.read(kept.get(tensor.name)) == joined.read(tensor)) << tensor.name;
  }

  QuantizeOptions copy;  // COPY
  const auto copied = quantised(model, copy, folder.path() / "copy");
  EXPECT_EQ(copied.metadata().get_u32("general.file_type"), 1U);
  EXPECT_TRUE(copied.read(copied.get("output.weight")) == model.read(model.get("output.weight")));
}

int run(std::vector<std::string> arguments) {
  std::vector<char*> argv;
  arguments.insert(arguments.begin(), "caravan quantize");
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return run_quantize(static_cast<int>(argv.size()), argv.data());
}

TEST(QuantizeCommand, TakesLlamaQuantizesArguments) {
  const TemporaryDirectory folder;
  const std::string in = folder.path() / "in.gguf", out = folder.path() / "out.gguf";
  sample_model(in);
  EXPECT_EQ(run({in, out, "q4_k", "1"}), 0);
  EXPECT_EQ(gguf::Model::open(out).metadata().get_u32("general.file_type"), 15U);
  EXPECT_EQ(run({"--pure", in, "7"}), 0) << "a number; no output named";
  EXPECT_EQ(gguf::Model::open(folder.path() / "ggml-model-Q8_0.gguf").metadata().get_u32("general.file_type"), 7U);
  std::filesystem::remove(out);
  EXPECT_EQ(run({"--dry-run", in, out, "COPY"}), 0);
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST(QuantizeCommand, ListsWhatItAccepts) {
  const TemporaryDirectory folder;
  const std::string in = folder.path() / "in.gguf", out = folder.path() / "out.gguf";
  sample_model(in);
  const auto fails_with = [](const std::string& part) { return ThrowsMessage<RequestError>(HasSubstr(part)); };
  EXPECT_THAT([&] { run({in, out, "Q4_X"}); }, fails_with("accepted: F32, F16, BF16"));
  EXPECT_THAT([&] { run({in, out, "IQ2_XXS"}); }, fails_with("'IQ2_XXS' cannot be written"));
  EXPECT_THAT([&] { run({in, out}); }, fails_with("accepted: F32"));
  EXPECT_THAT([&] { run({in, in, "Q8_0"}); }, fails_with("same file"));
  EXPECT_THAT([&] { run({in, out, "Q8_0", "0"}); }, fails_with("from 1 to"));
  EXPECT_THAT([&] { run({in, out, "Q8_0", "1", "2"}); }, fails_with("unexpected argument"));
  EXPECT_THAT([&] { run({"--imatrix", "x", in, out, "Q8_0"}); }, fails_with("not supported"));
  EXPECT_THAT([&] { run({"--output-tensor-type", "IQ1_S", in, out, "Q8_0"}); }, fails_with("accepted: F32"));
}

// The kit's files were written by llama-quantize from the F32 one.
TEST(QuantizeCommand, GivesTheKitsModelsTheTypesOfTheKitsFiles) {
  CARAVAN_REQUIRE_KIT(kit);
  const TemporaryDirectory folder;
  const auto source = gguf::Model::open(kit / "models/quants/llama-F32.gguf");
  int n_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kit / "models/quants")) {
    const std::string stem = entry.path().stem().string();
    const gguf::FileType* type = gguf::find_file_type(stem.substr(stem.find('-') + 1));
    if (type == nullptr || !type->can_write) continue;
    const auto expected = gguf::Model::open(entry.path());
    const auto found = quantised(source, as(type->name), folder.path() / "out");
    for (const gguf::TensorInfo& tensor : expected.tensors())
      EXPECT_EQ(tensor::dtype_name(found.get(tensor.name).type), tensor::dtype_name(tensor.type))
          << stem << " " << tensor.name;
    ++n_files;
  }
  EXPECT_EQ(n_files, 16);
}

}  // namespace
}  // namespace caravan::app
