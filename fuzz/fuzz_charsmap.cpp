// Any bytes as a charsmap: refused, or safe to walk with any text. The first byte says how many bytes are text.
#include <cstdlib>
#include <span>
#include <string_view>

#include "base/error.h"
#include "vocab/charsmap.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0 || data[0] > size - 1) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), data[0]);
  try {
    const caravan::vocab::Charsmap charsmap(std::span(data + 1 + data[0], size - 1 - data[0]), "fuzz");
    for (size_t i = 0; i < text.size(); i++) {
      const auto match = charsmap.longest_prefix(text.substr(i));
      if (match.length > text.size() - i) std::abort();
      for (const char c : match.replacement) {
        if (c == '\0') std::abort();
      }
    }
  } catch (const caravan::FormatError&) {
  }
  return 0;
}
