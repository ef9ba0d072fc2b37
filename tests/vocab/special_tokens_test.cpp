#include "vocab/special_tokens.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace caravan::vocab {
namespace {

using Texts = std::vector<std::string>;

// Fragments as text: "#id" for a token.
Texts show(const std::vector<Fragment>& fragments) {
  Texts out;
  for (const Fragment& f : fragments) {
    out.push_back(f.token >= 0 ? fmt::format("#{}", f.token) : std::string(f.text));
  }
  return out;
}

TEST(SpecialTokens, CutsThemOutOfTheText) {
  const SpecialTokenMatcher matcher({{7, "<s>"}, {9, "</s>"}});
  EXPECT_EQ(show(matcher.split("<s>a<s</s>b")), (Texts{"#7", "a<s", "#9", "b"}));
  EXPECT_EQ(show(matcher.split("plain")), (Texts{"plain"}));
  EXPECT_EQ(show(matcher.split("")), Texts{});
}

TEST(SpecialTokens, PreferTheLongestEvenIfAnotherBeginsEarlier) {
  const SpecialTokenMatcher matcher({{1, "abc"}, {2, "cdef"}, {3, "ab"}});
  EXPECT_EQ(show(matcher.split("abcdef")), (Texts{"#3", "#2"}));
}

TEST(SpecialTokens, CutRunsIntoTheLongestPieces) {
  const SpecialTokenMatcher matcher({{1, "\n"}, {2, "\n\n"}, {3, "\n\n\n"}});
  EXPECT_EQ(show(matcher.split("\n\n\n\n\n")), (Texts{"#3", "#2"}));
}

TEST(SpecialTokens, SwallowWhiteSpaceOnTheSideTheyStrip) {
  const SpecialTokenMatcher matcher({{1, "<r>", false, true}, {2, "<l>", true, false}, {3, "<n>"}});
  EXPECT_EQ(show(matcher.split("a <r> \n b")), (Texts{"a ", "#1", "b"}));
  EXPECT_EQ(show(matcher.split("a \t<l> b")), (Texts{"a", "#2", " b"}));
  EXPECT_EQ(show(matcher.split("<r> <l>")), (Texts{"#1", "#2"}));
  EXPECT_EQ(show(matcher.split("<n> <n>")), (Texts{"#3", " ", "#3"}));
}

// The definition: token by token, from the longest, cut every occurrence out of every stretch that is left.
Texts split_naively(std::vector<SpecialToken> tokens, const std::string& text) {
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) {
    return a.text.size() != b.text.size() ? a.text.size() > b.text.size() : a.id < b.id;
  });
  struct Piece {
    int token;
    std::string text;
  };
  std::vector<Piece> pieces{{-1, text}};
  for (const auto& token : tokens) {
    std::vector<Piece> next;
    for (const auto& piece : pieces) {
      if (piece.token >= 0) {
        next.push_back(piece);
        continue;
      }
      std::string rest = piece.text;
      for (size_t at; (at = rest.find(token.text)) != std::string::npos;) {
        std::string before = rest.substr(0, at);
        rest = rest.substr(at + token.text.size());
        while (token.strip_left && !before.empty() && before.back() == ' ') before.pop_back();
        while (token.strip_right && !rest.empty() && rest.front() == ' ') rest.erase(0, 1);
        next.push_back({-1, before});
        next.push_back({token.id, ""});
      }
      next.push_back({-1, rest});
    }
    pieces = next;
  }
  Texts out;
  for (const auto& piece : pieces) {
    if (piece.token >= 0) out.push_back(fmt::format("#{}", piece.token));
    if (piece.token < 0 && !piece.text.empty()) out.push_back(piece.text);
  }
  return out;
}

TEST(SpecialTokens, AgreeWithTheDefinition) {
  std::mt19937 random(5);
  const auto random_text = [&](size_t n) {
    std::string text;
    for (size_t i = 0; i < n; i++) text += "ab "[random() % 3];
    return text;
  };
  for (int round = 0; round < 3000; round++) {
    std::vector<SpecialToken> tokens;
    for (int id = 0; id < 5; id++) {
      // Spellings do not begin or end with a space, so that stripping cannot depend on the order.
      const std::string text = "ab"[random() % 2] + random_text(random() % 3) + "ab"[random() % 2];
      const bool known = std::any_of(tokens.begin(), tokens.end(), [&](const auto& t) { return t.text == text; });
      if (!known) tokens.push_back({id, text, random() % 4 == 0, random() % 4 == 0});
    }
    const std::string text = random_text(random() % 24);
    EXPECT_EQ(show(SpecialTokenMatcher(tokens).split(text)), split_naively(tokens, text)) << "text '" << text << "'";
  }
}

TEST(SpecialTokens, HandleLongRunsAndThousandsOfSpellings) {
  std::vector<SpecialToken> tokens;
  for (int i = 0; i < 5000; i++) tokens.push_back({i, fmt::format("<|reserved_{}|>", i)});
  for (int i = 1; i <= 31; i++) tokens.push_back({5000 + i, std::string(static_cast<size_t>(i), '\n')});
  const SpecialTokenMatcher matcher(tokens);
  EXPECT_EQ(matcher.split(std::string(31 * 30000 + 5, '\n')).size(), 30001u);
  std::string text;
  for (int i = 0; i < 100000; i++) text += "<|reserved_";
  EXPECT_EQ(matcher.split(text).size(), 1u);
}

}  // namespace
}  // namespace caravan::vocab
