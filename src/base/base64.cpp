#include "base/base64.h"

#include <algorithm>
#include <cstdint>

namespace caravan {

std::string base64_encode(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  constexpr size_t kGroup = 3;  // bytes that make four digits
  std::string text;
  text.reserve((bytes.size() + kGroup - 1) / kGroup * 4);
  for (size_t i = 0; i < bytes.size(); i += kGroup) {
    const size_t n = std::min(kGroup, bytes.size() - i);
    uint32_t word = 0;
    for (size_t j = 0; j < kGroup; ++j) word = word << 8 | (j < n ? static_cast<uint8_t>(bytes[i + j]) : 0u);
    for (size_t j = 0; j < 4; ++j) text += j <= n ? kDigits[word >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

}  // namespace caravan
