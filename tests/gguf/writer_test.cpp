// The writer's files are read back as they were meant: metadata, tensors, alignment, parts of split models.
#include "gguf/writer.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "base/error.h"
#include "gguf/format.h"
#include "support/kit.h"

namespace caravan::gguf {
namespace {

using caravan::testing::TemporaryDirectory;
using tensor::DType;
using ::testing::AllOf;
using ::testing::HasSubstr;

struct TestTensor {
  std::string name;
  DType type;
  std::vector<int64_t> ne;
};

// Bytes that depend on the tensor's name and on the position.
std::vector<std::byte> pattern(const TensorInfo& tensor) {
  std::vector<std::byte> bytes(tensor.size_bytes);
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::byte>(i * 31 + static_cast<unsigned char>(tensor.name.back()));
  return bytes;
}

void write_file(const std::filesystem::path& path, Metadata metadata, const std::vector<TestTensor>& tensors) {
  Writer writer(path, std::move(metadata));
  for (const TestTensor& t : tensors) writer.declare(t.name, t.type, t.ne);
  writer.begin_data();
  for (size_t i = tensors.size(); i-- > 0;) writer.write(i, 0, pattern(writer.tensors()[i]));
  writer.finish();
}

void expect_pattern(const Model& model) {
  for (const TensorInfo& tensor : model.tensors()) EXPECT_EQ(model.read(tensor), pattern(tensor)) << tensor.name;
}

Metadata part_metadata(uint32_t number, uint32_t count, int32_t n_tensors) {
  Metadata metadata;
  if (number == 0) metadata.set("general.architecture", Value::of("llama"));
  metadata.set(kKeySplitNo, {ValueType::u16, uint64_t{number}});
  metadata.set(kKeySplitCount, {ValueType::u16, uint64_t{count}});
  metadata.set(kKeySplitTensorsCount, Value::of(n_tensors));
  return metadata;
}

std::string refusal(const std::filesystem::path& path) {
  try {
    Model::open(path);
    return "accepted";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(GgufWriter, WritesWhatTheReaderReads) {
  const TemporaryDirectory folder;
  const auto path = folder.path() / "model.gguf";
  Metadata metadata;
  metadata.set("general.architecture", Value::of("llama"));
  metadata.set("tokenizer.ggml.tokens", Value::of(std::vector<std::string>{"a", "b"}));
  write_file(path, metadata, {{"x", DType::f32, {3}}, {"y", DType::q4_k, {512, 3}}, {"z", DType::f16, {1, 2, 3, 4}}});
  const Model model = Model::open(path);
  EXPECT_EQ(model.metadata().get_strings("tokenizer.ggml.tokens").size(), 2U);
  ASSERT_EQ(model.tensors().size(), 3U);
  EXPECT_EQ(model.get("y").ne, (tensor::Shape{512, 3, 1, 1}));
  EXPECT_EQ(model.get("z").n_dims, 4);
  EXPECT_EQ(model.weight_bytes(), 12U + 6 * 144 + 48);
  EXPECT_EQ(std::filesystem::file_size(path) % 32, 0U) << "the last tensor is padded, too";
  expect_pattern(model);
}

TEST(GgufWriter, FollowsTheAlignmentKey) {
  const TemporaryDirectory folder;
  Metadata metadata;
  metadata.set(kKeyAlignment, Value::of(uint32_t{4096}));
  write_file(folder.path() / "m.gguf", metadata, {{"x", DType::f32, {3}}, {"y", DType::f32, {5}}});
  const Model model = Model::open(folder.path() / "m.gguf");
  for (const TensorInfo& tensor : model.tensors()) EXPECT_EQ(tensor.offset % 4096, 0U);
  expect_pattern(model);
  metadata.set(kKeyAlignment, Value::of(uint32_t{48}));
  EXPECT_THROW(Writer(folder.path() / "n.gguf", metadata), FormatError);
}

TEST(GgufWriter, TakesDataFromSeveralThreadsInAnyOrder) {
  const TemporaryDirectory folder;
  Writer writer(folder.path() / "m.gguf", Metadata());
  constexpr size_t kTensors = 16;
  for (size_t i = 0; i < kTensors; ++i)
    writer.declare(fmt::format("t{}", i), DType::f32, std::vector<int64_t>{1000 + static_cast<int64_t>(i)});
  writer.begin_data();
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < kTensors; ++i)
      threads.emplace_back([&writer, i] {
        const auto bytes = pattern(writer.tensors()[i]);
        const size_t half = bytes.size() / 2;
        writer.write(i, half, std::span(bytes).subspan(half));
        writer.write(i, 0, std::span(bytes).first(half));
      });
  }
  writer.finish();
  expect_pattern(Model::open(folder.path() / "m.gguf"));
}

TEST(GgufWriter, LeavesNoFileBehindWhenNotFinished) {
  const TemporaryDirectory folder;
  {
    Writer writer(folder.path() / "m.gguf", Metadata());
    writer.declare("t", DType::f32, std::vector<int64_t>{8});
    writer.begin_data();
    EXPECT_THROW(writer.finish(), FormatError) << "the tensor's bytes are missing";
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(GgufWriter, RefusesWhatTheReaderWouldRefuse) {
  const TemporaryDirectory folder;
  Writer writer(folder.path() / "m.gguf", Metadata());
  const auto declare = [&](const std::string& name, DType type, const std::vector<int64_t>& ne) {
    writer.declare(name, type, ne);
  };
  declare("t", DType::f32, {1});
  EXPECT_THROW(declare("t", DType::f32, {1}), FormatError);
  EXPECT_THROW(declare("", DType::f32, {1}), FormatError);
  EXPECT_THROW(declare(std::string(64, 'x'), DType::f32, {1}), FormatError);
  EXPECT_THROW(declare("u", DType::f32, {}), FormatError);
  EXPECT_THROW(declare("u", DType::f32, {1, 1, 1, 1, 1}), FormatError);
  EXPECT_THROW(declare("u", DType::q8_0, {31}), FormatError);
  EXPECT_THROW(declare("u", DType::f32, {0}), FormatError);
}

TEST(GgufSplit, ReadsAllPartsAlsoWithMetadataOnlyInTheFirst) {
  const TemporaryDirectory folder;
  const std::string prefix = (folder.path() / "m").string();
  write_file(split_path(prefix, 0, 3), part_metadata(0, 3, 3), {});
  write_file(split_path(prefix, 1, 3), part_metadata(1, 3, 3), {{"a", DType::f32, {7}}, {"b", DType::f32, {9}}});
  write_file(split_path(prefix, 2, 3), part_metadata(2, 3, 3), {{"c", DType::q8_0, {64}}});
  const Model model = Model::open(split_path(prefix, 0, 3));
  EXPECT_EQ(model.n_files(), 3);
  EXPECT_EQ(model.metadata().get_string("general.architecture"), "llama");
  EXPECT_EQ(model.get("a").file, 1);
  EXPECT_EQ(model.get("c").file, 2);
  expect_pattern(model);
}

TEST(GgufSplit, AsksForTheFirstPart) {
  const TemporaryDirectory folder;
  const std::string prefix = (folder.path() / "m").string();
  write_file(split_path(prefix, 1, 2), part_metadata(1, 2, 1), {{"a", DType::f32, {7}}});
  EXPECT_THAT(refusal(split_path(prefix, 1, 2)),
              AllOf(HasSubstr("part 2 of a model split into 2"), HasSubstr("-00001-of-00002.gguf")));
  write_file(folder.path() / "renamed.gguf", part_metadata(0, 2, 1), {});
  EXPECT_THAT(refusal(folder.path() / "renamed.gguf"), HasSubstr("must be named '...-00001-of-00002.gguf'"));
}

TEST(GgufSplit, RefusesPartsThatDoNotBelongTogether) {
  const TemporaryDirectory folder;
  const std::string prefix = (folder.path() / "m").string();
  const std::string first = split_path(prefix, 0, 2), second = split_path(prefix, 1, 2);
  write_file(first, part_metadata(0, 2, 2), {{"a", DType::f32, {7}}});
  EXPECT_THAT(refusal(first), AllOf(HasSubstr("open"), HasSubstr("m-00002-of-00002.gguf"))) << "a part is missing";
  write_file(second, part_metadata(0, 2, 2), {{"b", DType::f32, {7}}});
  EXPECT_THAT(refusal(first), HasSubstr("key 'split.no': expected 1, found 0"));
  write_file(second, part_metadata(1, 3, 2), {{"b", DType::f32, {7}}});
  EXPECT_THAT(refusal(first), HasSubstr("key 'split.count': expected 2, found 3"));
  write_file(second, Metadata(), {{"b", DType::f32, {7}}});
  EXPECT_THAT(refusal(first), HasSubstr("key 'split.no' is missing"));
  write_file(second, part_metadata(1, 2, 2), {{"a", DType::f32, {7}}});
  EXPECT_THAT(refusal(first), HasSubstr("tensor 'a' is in an earlier part"));
  write_file(second, part_metadata(1, 2, 2), {});
  EXPECT_THAT(refusal(first), HasSubstr("key 'split.tensors.count': expected 2 tensors, found 1 in 2 files"));
  write_file(second, part_metadata(1, 2, 2), {{"b", DType::f32, {7}}});
  EXPECT_EQ(refusal(first), "accepted");
}

TEST(GgufSplit, NamesPartsFromOne) {
  EXPECT_EQ(split_path("a/b", 0, 12), "a/b-00001-of-00012.gguf");
  EXPECT_EQ(split_prefix("a/b-00001-of-00012.gguf", 0, 12), "a/b");
  EXPECT_EQ(split_prefix("a/b-00002-of-00012.gguf", 0, 12), "");
}

}  // namespace
}  // namespace caravan::gguf
