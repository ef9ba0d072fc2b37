// SHA-256 digests, the names of weight chunks.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace caravan {

// A SHA-256 value. Ordered and hashable so that it can be a key.
struct Digest {
  std::array<uint8_t, 32> bytes{};
  auto operator<=>(const Digest&) const = default;

  // 64 lower-case hexadecimal digits.
  std::string hex() const;
  // The digest that 32 raw bytes spell; throws FormatError for another length.
  static Digest from_bytes(std::string_view raw);
};

// SHA-256 (FIPS 180-4) of data, by OpenSSL.
Digest sha256(std::span<const std::byte> data);

}  // namespace caravan

template <>
struct std::hash<caravan::Digest> {
  size_t operator()(const caravan::Digest& d) const noexcept {
    size_t value;  // a digest's bytes are uniform: its first word is a good hash
    __builtin_memcpy(&value, d.bytes.data(), sizeof value);
    return value;
  }
};
