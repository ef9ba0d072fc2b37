// Typed access to metadata, and the round trip of every value type.
#include "gguf/metadata.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace caravan::gguf {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

Metadata round_trip(const Metadata& metadata) {
  ByteWriter writer;
  write_metadata(writer, metadata);
  ByteReader reader(writer.data(), "copy");
  Metadata copy = read_metadata(reader, metadata.entries().size(), "copy");
  EXPECT_EQ(reader.remaining(), 0U);
  return copy;
}

TEST(Metadata, KeepsEveryScalarTypeAndItsExtremesThroughARoundTrip) {
  Metadata metadata;
  metadata.set("u8", {ValueType::u8, uint64_t{255}});
  metadata.set("i8", {ValueType::i8, int64_t{-128}});
  metadata.set("u16", {ValueType::u16, uint64_t{65535}});
  metadata.set("i16", {ValueType::i16, int64_t{-32768}});
  metadata.set("u32", Value::of(uint32_t{0xffffffff}));
  metadata.set("i32", Value::of(int32_t{-2147483648}));
  metadata.set("f32", Value::of(0.1f));
  metadata.set("bool", Value::of(true));
  metadata.set("string", Value::of(std::string("a\0b", 3)));
  metadata.set("u64", Value::of(~uint64_t{0}));
  metadata.set("i64", {ValueType::i64, INT64_MIN});
  metadata.set("f64", {ValueType::f64, 0.1});
  const Metadata copy = round_trip(metadata);
  ASSERT_EQ(copy.entries().size(), metadata.entries().size());
  for (size_t i = 0; i < copy.entries().size(); ++i) {
    EXPECT_EQ(copy.entries()[i].first, metadata.entries()[i].first) << "the order is kept";
    const Value &expected = metadata.entries()[i].second, &found = copy.entries()[i].second;
    EXPECT_EQ(found.type, expected.type);
    EXPECT_EQ(found.data.index(), expected.data.index()) << copy.entries()[i].first;
  }
  EXPECT_EQ(std::get<int64_t>(copy.find("i64")->data), INT64_MIN);
  EXPECT_EQ(std::get<uint64_t>(copy.find("u64")->data), ~uint64_t{0});
  EXPECT_EQ(std::get<double>(copy.find("f64")->data), 0.1);
  EXPECT_EQ(copy.get_f32("f32"), 0.1f);
  EXPECT_EQ(copy.get_string("string"), std::string("a\0b", 3));
  EXPECT_EQ(std::get<int64_t>(copy.find("i8")->data), -128);
}

TEST(Metadata, KeepsArraysOfEveryElementTypeThroughARoundTrip) {
  Metadata metadata;
  const std::pair<ValueType, bool> integer_types[] = {
      {ValueType::u8, false},  {ValueType::i8, true},   {ValueType::u16, false},
      {ValueType::i16, true},  {ValueType::u32, false}, {ValueType::i32, true},
      {ValueType::u64, false}, {ValueType::i64, true},  {ValueType::boolean, true}};
  for (const auto& [type, is_signed] : integer_types) {
    Array array{type, {}};
    if (is_signed)
      array.values = std::vector<int64_t>{0, 1, 1};
    else
      array.values = std::vector<uint64_t>{0, 1, 1};
    metadata.set(std::string(value_type_name(type)), {ValueType::array, array});
  }
  metadata.set("floats", Value::of(std::vector<float>{0.5f, -1.25f}));
  metadata.set("strings", Value::of(std::vector<std::string>{"", "two"}));
  const Metadata copy = round_trip(metadata);
  for (const auto& [type, is_signed] : integer_types) {
    EXPECT_THAT(copy.get_integers(value_type_name(type)), ElementsAre(0, 1, 1)) << value_type_name(type);
    EXPECT_EQ(std::get<Array>(copy.find(value_type_name(type))->data).element_type, type);
  }
  EXPECT_THAT(copy.get_floats("floats"), ElementsAre(0.5f, -1.25f));
  EXPECT_THAT(copy.get_strings("strings"), ElementsAre("", "two"));
}

TEST(Metadata, ConvertsBetweenNumberTypesWhereTheValueFits) {
  Metadata metadata("m.gguf");
  metadata.set("i", Value::of(int32_t{5}));
  metadata.set("negative", Value::of(int32_t{-1}));
  metadata.set("big", Value::of(uint64_t{1} << 32));
  metadata.set("whole", Value::of(3.0f));
  metadata.set("fraction", Value::of(3.5f));
  metadata.set("text", Value::of("x"));
  metadata.set("one", Value::of(uint32_t{1}));
  EXPECT_EQ(metadata.get_u32("i"), 5U);
  EXPECT_EQ(metadata.get_f32("i"), 5.0f);
  EXPECT_EQ(metadata.get_u32("whole"), 3U);
  EXPECT_TRUE(metadata.get_bool("one", false));
  EXPECT_THAT(message_of([&] { metadata.get_u32("negative"); }),
              AllOf(HasSubstr("m.gguf: key 'negative'"), HasSubstr("found the value -1")));
  EXPECT_THAT(message_of([&] { metadata.get_u32("big"); }), HasSubstr("found the value 4294967296"));
  EXPECT_THAT(message_of([&] { metadata.get_u32("fraction"); }), HasSubstr("found the value 3.5"));
  EXPECT_EQ(message_of([&] { metadata.get_u32("text"); }), "m.gguf: key 'text': expected u32, found string");
  EXPECT_THAT(message_of([&] { (void)metadata.find_bool("i"); }), HasSubstr("expected a bool"));
}

TEST(Metadata, TellsMissingFromWrongType) {
  Metadata metadata("m.gguf");
  metadata.set("list", Value::of(std::vector<int32_t>{1, 2}));
  EXPECT_EQ(message_of([&] { metadata.get_string("absent"); }), "m.gguf: key 'absent' is missing");
  EXPECT_EQ(metadata.find_u32("absent"), std::nullopt);
  EXPECT_EQ(metadata.get_u32("absent", 9), 9U);
  EXPECT_TRUE(metadata.get_integers("absent").empty());
  EXPECT_EQ(message_of([&] { (void)metadata.find_string("list"); }),
            "m.gguf: key 'list': expected string, found array of 2 i32");
  EXPECT_EQ(message_of([&] { metadata.get_floats("list"); }),
            "m.gguf: key 'list': expected an array of f32, found array of 2 i32");
}

TEST(Metadata, SpreadsANumberOverLayersAndChecksPerLayerArrays) {
  Metadata metadata("m.gguf");
  metadata.set("one", Value::of(uint32_t{8}));
  metadata.set("each", Value::of(std::vector<int32_t>{1, 2, 3}));
  metadata.set("bad", Value::of(std::vector<int32_t>{1, -2, 3}));
  EXPECT_THAT(metadata.get_u32_per_layer("one", 3, {}), ElementsAre(8, 8, 8));
  EXPECT_THAT(metadata.get_u32_per_layer("each", 3, {}), ElementsAre(1, 2, 3));
  EXPECT_THAT(metadata.get_u32_per_layer("absent", 2, 4), ElementsAre(4, 4));
  EXPECT_THAT(message_of([&] { metadata.get_u32_per_layer("each", 4, {}); }),
              HasSubstr("expected 4 numbers (one per layer), found 3"));
  EXPECT_THAT(message_of([&] { metadata.get_u32_per_layer("bad", 3, {}); }), HasSubstr("found the value -2"));
  EXPECT_THAT(message_of([&] { metadata.get_u32_per_layer("absent", 3, {}); }), HasSubstr("is missing"));
}

TEST(Metadata, ReplacesAValueInItsPlace) {
  Metadata metadata;
  metadata.set("a", Value::of(uint32_t{1}));
  metadata.set("b", Value::of(uint32_t{2}));
  metadata.set("a", Value::of("new"));
  ASSERT_EQ(metadata.entries().size(), 2U);
  EXPECT_EQ(metadata.entries()[0].first, "a");
  EXPECT_EQ(metadata.get_string("a"), "new");
}

}  // namespace
}  // namespace caravan::gguf
