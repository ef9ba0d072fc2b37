// The GGUF reader's checks: each wrong file is refused with a message that names the file, the place, what was
// expected and what was found.
#include "gguf/reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "gguf/raw_gguf.h"

namespace caravan::gguf {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::RawGguf;

Directory parse(const RawGguf& file) { return parse_directory(file.bytes(), file.bytes().size(), "model.gguf"); }

// The message with which the file is refused, or "accepted".
std::string refusal(const RawGguf& file) {
  try {
    parse(file);
    return "accepted";
  } catch (const FormatError& error) {
    return error.what();
  }
}

// A header with one tensor and enough data for it.
RawGguf one_tensor(std::string_view name, const std::vector<int64_t>& ne, uint32_t type, uint64_t offset = 0) {
  RawGguf file;
  file.header(1, 0).tensor(name, ne, type, offset).pad().zeros(4096);
  return file;
}

TEST(GgufReader, AcceptsVersionsTwoAndThree) {
  for (const uint32_t version : {2U, 3U}) {
    RawGguf file;
    file.header(1, 1, version).u32_entry("a.b", 7).tensor("t", {2, 3}, 0, 0).pad().zeros(24);
    const Directory directory = parse(file);
    EXPECT_EQ(directory.version, version);
    EXPECT_EQ(directory.metadata.get_u32("a.b"), 7U);
    ASSERT_EQ(directory.tensors.size(), 1U);
    const TensorInfo& tensor = directory.tensors[0];
    EXPECT_EQ(tensor.name, "t");
    EXPECT_EQ(tensor.ne, (tensor::Shape{2, 3, 1, 1}));
    EXPECT_EQ(tensor.n_dims, 2);
    EXPECT_EQ(tensor.size_bytes, 24U);
    EXPECT_EQ(tensor.offset, file.bytes().size() - 24);
  }
}

TEST(GgufReader, NamesTheKindOfFileItCannotRead) {
  EXPECT_THAT(refusal(RawGguf().number(uint32_t{0x67676d6c}).number(uint32_t{3}).zeros(16)),
              AllOf(HasSubstr("model.gguf: not a GGUF file"), HasSubstr("0x67676d6c")));
  EXPECT_THAT(refusal(RawGguf().header(0, 0, 1)), HasSubstr("version 1 is not supported"));
  EXPECT_THAT(refusal(RawGguf().header(0, 0, 0x03000000)), HasSubstr("big-endian GGUF file (version 3)"));
  EXPECT_THAT(refusal(RawGguf().header(0, 0, 4)), HasSubstr("version 4 is unknown, expected 2 or 3"));
  EXPECT_THAT(refusal(RawGguf().header(0, 0, 0)), HasSubstr("version 0 is unknown"));
  EXPECT_THAT(refusal(RawGguf()), HasSubstr("model.gguf: magic at offset 0 needs 4 bytes, 0 are left"));
}

TEST(GgufReader, RefusesCountsThatTheFileCannotHold) {
  EXPECT_THAT(refusal(RawGguf().header(0, uint64_t{1} << 60)), HasSubstr("metadata entries do not fit"));
  EXPECT_THAT(refusal(RawGguf().header(uint64_t{1} << 63, 0).zeros(100)),
              HasSubstr("tensors do not fit the 100 bytes"));
  RawGguf array;
  array.header(0, 1).key("a", ValueType::array).number(uint32_t{10}).number(uint64_t{1} << 61).zeros(64);
  EXPECT_THAT(refusal(array),
              AllOf(HasSubstr("key 'a'"), HasSubstr("array of 2305843009213693952 u64 does not fit the 64 bytes")));
  RawGguf string;
  string.header(0, 1).key("a", ValueType::string).number(uint64_t{1000}).zeros(10);
  EXPECT_THAT(refusal(string), AllOf(HasSubstr("key 'a'"), HasSubstr("needs 1000 bytes, 10 are left")));
}

TEST(GgufReader, RefusesEmptyAndRepeatedKeysAndUnknownTypes) {
  EXPECT_THAT(refusal(RawGguf().header(0, 1).u32_entry("", 1)), HasSubstr("key of metadata entry 0 is empty"));
  EXPECT_THAT(refusal(RawGguf().header(0, 2).u32_entry("x.y", 1).u32_entry("x.y", 2)),
              HasSubstr("model.gguf: key 'x.y' occurs twice"));
  EXPECT_THAT(refusal(RawGguf().header(0, 1).string("x").number(uint32_t{13}).zeros(32)),
              HasSubstr("key 'x': value type 13 is unknown"));
  RawGguf nested;
  nested.header(0, 1).key("x", ValueType::array).number(uint32_t{9}).number(uint64_t{1}).zeros(32);
  EXPECT_THAT(refusal(nested), HasSubstr("key 'x': arrays of arrays are not supported"));
}

TEST(GgufReader, RefusesTensorsWithImpossibleShapes) {
  EXPECT_THAT(refusal(one_tensor("t", {1, 1, 1, 1, 1}, 0)), HasSubstr("tensor 't': 5 dimensions, expected at most 4"));
  EXPECT_THAT(refusal(one_tensor("t", {4, 0}, 0)), HasSubstr("tensor 't': dimension 1 is 0"));
  EXPECT_THAT(refusal(one_tensor("t", {-4}, 0)), HasSubstr("tensor 't': dimension 0 is -4"));
  EXPECT_THAT(refusal(one_tensor("t", {int64_t{1} << 40, int64_t{1} << 40}, 0)), HasSubstr("overflows 64 bits"));
  EXPECT_THAT(refusal(one_tensor("t", {int64_t{1} << 62, 2}, 24)), HasSubstr("expected fewer than 2^63"));
  EXPECT_THAT(refusal(one_tensor("t", {int64_t{1} << 62}, 0)), HasSubstr("tensor 't': size"));
  EXPECT_THAT(refusal(one_tensor("t", {48}, 2)),
              HasSubstr("tensor 't': rows of 48 values, expected a multiple of 32 for type Q4_0"));
}

TEST(GgufReader, RefusesUnknownAndDroppedTensorTypes) {
  EXPECT_THAT(refusal(one_tensor("t", {32}, 99)), HasSubstr("tensor 't': type 99 is not known"));
  EXPECT_THAT(refusal(one_tensor("t", {32}, 31)), HasSubstr("type 31 (Q4_0_4_4, dropped from GGUF"));
}

TEST(GgufReader, RefusesBadTensorNames) {
  EXPECT_THAT(refusal(one_tensor("", {1}, 0)), HasSubstr("name of tensor 0: expected 1 to 63 bytes, found 0"));
  EXPECT_THAT(refusal(one_tensor(std::string(64, 'n'), {1}, 0)), HasSubstr("expected 1 to 63 bytes, found 64"));
  EXPECT_EQ(refusal(one_tensor(std::string(63, 'n'), {1}, 0)), "accepted");
  RawGguf twice;
  twice.header(2, 0).tensor("same", {1}, 0, 0).tensor("same", {1}, 0, 32).pad().zeros(64);
  EXPECT_THAT(refusal(twice), HasSubstr("tensor 'same' occurs twice"));
}

TEST(GgufReader, RefusesTensorThatEndsPastTheFile) {
  RawGguf file;
  file.header(1, 0).tensor("blk.3.attn_q.weight", {1024}, 0, 0).pad().zeros(4095);
  const size_t size = file.bytes().size();
  EXPECT_EQ(refusal(file), "model.gguf: tensor 'blk.3.attn_q.weight': offset " + std::to_string(size - 4095) +
                               " + 4096 bytes > file size " + std::to_string(size));
  EXPECT_EQ(refusal(file.zeros(1)), "accepted");
  EXPECT_THAT(refusal(one_tensor("t", {1}, 0, ~uint64_t{31})), HasSubstr("overflows 64 bits"));
}

TEST(GgufReader, RefusesMisalignedAndOverlappingTensors) {
  EXPECT_THAT(refusal(one_tensor("t", {1}, 0, 16)), HasSubstr("offset 16, expected a multiple of the alignment 32"));
  RawGguf overlap;
  overlap.header(2, 0).tensor("a", {16}, 0, 0).tensor("b", {1}, 0, 32).pad().zeros(128);
  EXPECT_THAT(refusal(overlap), AllOf(HasSubstr("tensor 'b'"), HasSubstr("lies inside tensor 'a'")));
}

TEST(GgufReader, FollowsTheAlignmentKey) {
  RawGguf file;
  file.header(2, 1).u32_entry("general.alignment", 8).tensor("a", {2}, 0, 0).tensor("b", {1}, 0, 8).pad(8).zeros(12);
  const Directory directory = parse(file);
  EXPECT_EQ(directory.tensors[1].offset, file.bytes().size() - 4);
  for (const uint32_t alignment : {0U, 24U})
    EXPECT_THAT(refusal(RawGguf().header(0, 1).u32_entry("general.alignment", alignment)),
                HasSubstr("key 'general.alignment': expected a power of two, found " + std::to_string(alignment)));
}

TEST(GgufReader, SaysWhichFileCannotBeOpened) {
  try {
    Model::open("/nonexistent/model.gguf");
    FAIL() << "a missing file was opened";
  } catch (const SystemError& error) {
    EXPECT_THAT(error.what(), HasSubstr("'/nonexistent/model.gguf'"));
  }
}

}  // namespace
}  // namespace caravan::gguf
