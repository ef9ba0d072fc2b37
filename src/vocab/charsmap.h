// SentencePiece's precompiled_charsmap: how a text is normalised before a unigram vocabulary cuts it (Kudo & Richardson
// 2018, arXiv:1808.06226). Bytes: u32 size of a double array; the double array, u32 units of darts-clone; replacements
// that end with a NUL byte. All little-endian.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::vocab {

// Immutable, used by several threads at once.
class Charsmap {
 public:
  // The identity: replaces nothing.
  Charsmap() = default;
  // Checks every place that a text can lead to. Throws FormatError (source: named there) when the sizes do not agree or
  // a value lies outside the array or the replacements.
  Charsmap(std::span<const uint8_t> bytes, const std::string& source);

  // The longest beginning of text that is replaced: its length in bytes (0: none) and what stands for it.
  struct Match {
    size_t length = 0;
    std::string_view replacement;
  };
  Match longest_prefix(std::string_view text) const;

 private:
  bool is_child(uint32_t place, uint32_t byte) const;
  void check(const std::string& source) const;

  std::vector<uint32_t> units_;
  std::string replacements_;
};

}  // namespace caravan::vocab
