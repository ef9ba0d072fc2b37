#include "base/bytes.h"

#include <fmt/format.h>

namespace caravan {

std::span<const std::byte> ByteReader::take(uint64_t n, std::string_view what) {
  if (n > remaining())
    throw FormatError(
        fmt::format("{}: {} at offset {} needs {} bytes, {} are left", context_, what, offset_, n, remaining()));
  const auto bytes = data_.subspan(offset_, static_cast<size_t>(n));
  offset_ += static_cast<size_t>(n);
  return bytes;
}

void ByteWriter::write_bytes(std::span<const std::byte> bytes) {
  data_.insert(data_.end(), bytes.begin(), bytes.end());
}

uint64_t checked_multiply(uint64_t a, uint64_t b, std::string_view what) {
  uint64_t result;
  if (__builtin_mul_overflow(a, b, &result))
    throw FormatError(fmt::format("{}: {} x {} overflows 64 bits", what, a, b));
  return result;
}

uint64_t checked_add(uint64_t a, uint64_t b, std::string_view what) {
  uint64_t result;
  if (__builtin_add_overflow(a, b, &result))
    throw FormatError(fmt::format("{}: {} + {} overflows 64 bits", what, a, b));
  return result;
}

}  // namespace caravan
