// Bounds-checked reading, writing, and arithmetic that notices overflow.
#include "base/bytes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace caravan {
namespace {

TEST(ByteReader, ReadsWhatTheWriterWrote) {
  ByteWriter writer;
  writer.write(uint8_t{0xab});
  writer.write(uint32_t{0x01020304});
  writer.write(-2.5);
  writer.write_string("text");
  EXPECT_EQ(writer.data()[1], std::byte{4}) << "little-endian";
  ByteReader reader(writer.data());
  EXPECT_EQ(reader.read<uint8_t>("a"), 0xab);
  EXPECT_EQ(reader.read<uint32_t>("b"), 0x01020304U);
  EXPECT_EQ(reader.read<double>("c"), -2.5);
  EXPECT_EQ(reader.take_string(4, "d"), "text");
  EXPECT_EQ(reader.remaining(), 0U);
  EXPECT_EQ(reader.offset(), writer.data().size());
}

TEST(ByteReader, NamesContextPlaceAndNeedWhenTheDataEnds) {
  ByteWriter writer;
  writer.write(uint32_t{1});
  ByteReader reader(writer.data(), "model.gguf");
  reader.read<uint16_t>("x");
  try {
    reader.read<uint64_t>("tensor count");
    FAIL() << "read past the end";
  } catch (const FormatError& error) {
    EXPECT_STREQ(error.what(), "model.gguf: tensor count at offset 2 needs 8 bytes, 2 are left");
  }
  EXPECT_EQ(reader.offset(), 2U) << "a failed read consumes nothing";
  EXPECT_THROW(reader.take(~uint64_t{0}, "huge"), FormatError);
  EXPECT_EQ(reader.take(2, "rest").size(), 2U);
  EXPECT_TRUE(reader.take(0, "nothing").empty());
}

TEST(ByteWriter, PadsWithZerosToTheAlignment) {
  ByteWriter writer;
  writer.pad_to(32);
  EXPECT_TRUE(writer.data().empty());
  writer.write(uint8_t{1});
  writer.pad_to(32);
  EXPECT_EQ(writer.data().size(), 32U);
  EXPECT_EQ(writer.data()[31], std::byte{0});
  writer.pad_to(32);
  EXPECT_EQ(writer.release().size(), 32U);
}

TEST(CheckedArithmetic, ThrowsInsteadOfWrapping) {
  EXPECT_EQ(checked_multiply(uint64_t{1} << 32, (uint64_t{1} << 32) - 1, "x"), 0xffffffff00000000U);
  EXPECT_THROW(checked_multiply(uint64_t{1} << 32, uint64_t{1} << 32, "x"), FormatError);
  EXPECT_EQ(checked_add(~uint64_t{0} - 1, 1, "x"), ~uint64_t{0});
  EXPECT_THROW(checked_add(~uint64_t{0}, 1, "x"), FormatError);
}

}  // namespace
}  // namespace caravan
