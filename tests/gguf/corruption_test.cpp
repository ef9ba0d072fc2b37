// Damaged files: whatever is cut or flipped, the reader throws FormatError or returns a directory whose tensors lie
// inside the file; it never allocates more than a small multiple of the file.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/error.h"
#include "gguf/largest_allocation.h"
#include "gguf/reader.h"
#include "gguf/writer.h"

namespace caravan::gguf {
namespace {

// A small file with every kind of value and two tensors.
std::vector<std::byte> sample_file() {
  Metadata metadata;
  metadata.set("general.architecture", Value::of("llama"));
  metadata.set("general.alignment", Value::of(uint32_t{32}));
  metadata.set("a.bool", Value::of(true));
  metadata.set("a.u8", {ValueType::u8, uint64_t{3}});
  metadata.set("a.i64", {ValueType::i64, int64_t{-3}});
  metadata.set("a.f64", {ValueType::f64, 2.5});
  metadata.set("tokens", Value::of(std::vector<std::string>{"one", "", "three"}));
  metadata.set("scores", Value::of(std::vector<float>{1, 2, 3}));
  metadata.set("types", Value::of(std::vector<int32_t>{1, 1, 3}));
  std::vector<TensorInfo> tensors(2);
  tensors[0] = {"token_embd.weight", tensor::DType::q4_0, {64, 3, 1, 1}, 2, 0, 0, 108};
  tensors[1] = {"output_norm.weight", tensor::DType::f32, {64, 1, 1, 1}, 1, 0, 128, 256};
  auto bytes = encode_header(metadata, tensors, 32);
  bytes.resize(bytes.size() + 128 + 256);
  return bytes;
}

enum class Outcome { parsed, refused };

// Parses bytes, checks what must hold either way, and says which way it went.
Outcome parse_damaged(std::span<const std::byte> bytes) {
  testing::largest_allocation_bytes() = 0;
  Outcome outcome = Outcome::refused;
  try {
    const Directory directory = parse_directory(bytes, bytes.size(), "damaged.gguf");
    for (const TensorInfo& tensor : directory.tensors) {
      EXPECT_LE(tensor.offset, bytes.size());
      EXPECT_LE(tensor.size_bytes, bytes.size() - tensor.offset);
    }
    outcome = Outcome::parsed;
  } catch (const FormatError& error) {
    EXPECT_EQ(std::string_view(error.what()).substr(0, 12), "damaged.gguf") << error.what();
  }
  // One byte of an array becomes eight in memory, an empty string of eight bytes 32; vectors of tensors double.
  EXPECT_LE(testing::largest_allocation_bytes(), 8 * bytes.size() + 4096);
  return outcome;
}

TEST(GgufReader, RefusesTheFileTruncatedAtEveryByte) {
  const auto file = sample_file();
  ASSERT_EQ(parse_damaged(file), Outcome::parsed);
  for (size_t size = 0; size < file.size(); ++size)
    ASSERT_EQ(parse_damaged(std::span(file).first(size)), Outcome::refused) << "truncated to " << size << " bytes";
}

TEST(GgufReader, SurvivesEveryFlippedBit) {
  auto file = sample_file();
  int n_refused = 0;
  for (size_t i = 0; i < file.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      file[i] ^= static_cast<std::byte>(1 << bit);
      n_refused += parse_damaged(file) == Outcome::refused;
      file[i] ^= static_cast<std::byte>(1 << bit);
    }
  EXPECT_GT(n_refused, 1000) << "most bits of lengths, counts, types and offsets matter";
}

TEST(GgufReader, SurvivesEveryEightBytesReplacedByExtremes) {
  const auto original = sample_file();
  for (const uint64_t extreme : {~uint64_t{0}, uint64_t{1} << 63, (uint64_t{1} << 63) - 1, uint64_t{1} << 32}) {
    for (size_t i = 0; i + 8 <= original.size(); ++i) {
      auto file = original;
      std::memcpy(file.data() + i, &extreme, sizeof extreme);
      parse_damaged(file);
    }
  }
}

TEST(GgufReader, SurvivesRandomBytesAfterTheMagic) {
  std::mt19937 random(20);
  for (int round = 0; round < 2000; ++round) {
    auto file = sample_file();
    for (int change = 0; change < 6; ++change)
      file[8 + random() % (file.size() - 8)] = static_cast<std::byte>(random() % 256);
    parse_damaged(file);
  }
}

}  // namespace
}  // namespace caravan::gguf
