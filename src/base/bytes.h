// Bounds-checked little-endian reading and writing of outside bytes. Every parser in the program goes through
// ByteReader.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.h"

namespace caravan {

static_assert(std::endian::native == std::endian::little,
              "the formats are read in place on little-endian machines only");

// Reads from a span it does not own; every read checks the bounds first and throws FormatError naming the context,
// the offset, and the bytes wanted and left.
class ByteReader {
 public:
  // context: what is being read, for messages, e.g. "model.gguf".
  explicit ByteReader(std::span<const std::byte> data, std::string context = "data")
      : data_(data), context_(std::move(context)) {}

  size_t offset() const { return offset_; }
  size_t remaining() const { return data_.size() - offset_; }

  // Reads one little-endian number.
  template <typename T>
    requires std::is_arithmetic_v<T>
  T read(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  // The next n bytes, in place.
  std::span<const std::byte> take(uint64_t n, std::string_view what);

  // The next n bytes as text, in place; no encoding is checked.
  std::string_view take_string(uint64_t n, std::string_view what) {
    const auto bytes = take(n, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

 private:
  std::span<const std::byte> data_;
  std::string context_;
  size_t offset_ = 0;
};

// Appends little-endian numbers and bytes to a growing buffer.
class ByteWriter {
 public:
  template <typename T>
    requires std::is_arithmetic_v<T>
  void write(T value) {
    write_bytes(std::as_bytes(std::span(&value, 1)));
  }
  // Out of line: inlined into its callers, g++ 12 warns of an overflow that cannot happen.
  void write_bytes(std::span<const std::byte> bytes);
  void write_string(std::string_view text) { write_bytes(std::as_bytes(std::span(text.data(), text.size()))); }
  // Appends zeros until the size is a multiple of alignment.
  void pad_to(size_t alignment) { data_.resize((data_.size() + alignment - 1) / alignment * alignment); }
  const std::vector<std::byte>& data() const { return data_; }
  std::vector<std::byte> release() { return std::move(data_); }

 private:
  std::vector<std::byte> data_;
};

// a * b and a + b in 64 bits; throws FormatError naming what when the result does not fit.
uint64_t checked_multiply(uint64_t a, uint64_t b, std::string_view what);
uint64_t checked_add(uint64_t a, uint64_t b, std::string_view what);

}  // namespace caravan
