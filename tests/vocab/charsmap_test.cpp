#include "vocab/charsmap.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "small_vocabularies.h"
#include "test_text.h"

namespace caravan::vocab {
namespace {

using Replacements = std::map<std::string, std::string>;

// The longest key that text begins with, by trying all.
Charsmap::Match try_all(const Replacements& replacements, std::string_view text) {
  Charsmap::Match best;
  for (const auto& [from, to] : replacements) {
    if (text.starts_with(from) && from.size() > best.length) best = {from.size(), to};
  }
  return best;
}

TEST(Charsmap, FindsTheLongestKeyEverywhere) {
  std::mt19937 random(7);
  for (int round = 0; round < 30; round++) {
    Replacements replacements = testing::small_replacements();
    for (int i = 0; i < round * 5; i++) {
      std::string from = testing::random_unicode(random, 1 + random() % 3);
      std::erase(from, '\0');
      if (!from.empty()) replacements[from] = "r" + std::to_string(i);
    }
    const Charsmap charsmap(testing::charsmap_bytes(replacements), "test");
    for (int i = 0; i < 50; i++) {
      const std::string text = testing::random_unicode(random, 20);
      for (size_t at = 0; at < text.size(); at++) {
        const auto found = charsmap.longest_prefix(std::string_view(text).substr(at));
        const auto expected = try_all(replacements, std::string_view(text).substr(at));
        ASSERT_EQ(found.length, expected.length);
        ASSERT_EQ(found.replacement, expected.replacement);
      }
    }
    for (const auto& [from, to] : replacements) EXPECT_EQ(charsmap.longest_prefix(from).replacement, to);
  }
}

TEST(Charsmap, ReplacesNothingByDefault) { EXPECT_EQ(Charsmap().longest_prefix("abc").length, 0u); }

TEST(Charsmap, RefusesWhatIsCutOff) {
  const auto bytes = testing::charsmap_bytes(testing::small_replacements());
  for (size_t n = 0; n < bytes.size(); n++) {
    EXPECT_THROW(Charsmap(std::span(bytes).first(n), "test"), FormatError) << n;
  }
}

TEST(Charsmap, RefusesOrSurvivesFlippedBits) {
  const auto bytes = testing::charsmap_bytes(testing::small_replacements());
  std::mt19937 random(8);
  size_t n_refused = 0;
  for (size_t bit = 0; bit < bytes.size() * 8; bit++) {
    auto damaged = bytes;
    damaged[bit / 8] ^= static_cast<uint8_t>(1u << bit % 8);
    try {
      const Charsmap charsmap(damaged, "test");
      for (const auto& [from, to] : testing::small_replacements()) charsmap.longest_prefix(from + "x");
    } catch (const FormatError&) {
      n_refused++;
    }
  }
  EXPECT_GT(n_refused, 32u);
}

}  // namespace
}  // namespace caravan::vocab
