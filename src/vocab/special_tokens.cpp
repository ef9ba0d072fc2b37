#include "vocab/special_tokens.h"

#include <algorithm>

#include "base/error.h"

namespace caravan::vocab {

namespace {

bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

}  // namespace

SpecialTokenMatcher::SpecialTokenMatcher(std::vector<SpecialToken> tokens) : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  for (size_t i = 0; i < tokens_.size(); i++) {
    const std::string& text = tokens_[i].text;
    CARAVAN_ASSERT(!text.empty(), "an empty spelling would match everywhere");
    if (int& first = trie_[text]; first == ByteTrie::kNone) first = static_cast<int>(i);
    begins_token_[static_cast<uint8_t>(text[0])] = true;
    max_length_ = std::max(max_length_, text.size());
  }
  for (const SpecialToken& token : tokens_) {
    next_shorter_.push_back(trie_.longest_prefix(std::string_view(token.text).substr(0, token.text.size() - 1)).value);
  }
}

std::vector<SpecialTokenMatcher::Match> SpecialTokenMatcher::find_matches(std::string_view text) const {
  // Candidates by length, one per place at a time: a place that loses its longest spelling to another match comes back
  // with the next shorter one. So memory stays proportional to the text even for runs like "\n\n\n...".
  struct Candidate {
    int token;
    size_t position;
    auto operator<=>(const Candidate&) const = default;
  };
  std::vector<std::vector<Candidate>> by_length(max_length_ + 1);
  bool any = false;
  for (size_t i = 0; i < text.size(); i++) {
    if (!begins_token_[static_cast<uint8_t>(text[i])]) continue;
    const int token = trie_.longest_prefix(text.substr(i)).value;
    if (token < 0) continue;
    by_length[tokens_[token].text.size()].push_back({token, i});
    any = true;
  }
  std::vector<Match> matches;
  if (!any) return matches;

  std::vector<bool> taken(text.size());
  for (size_t length = max_length_; length > 0; length--) {
    auto& candidates = by_length[length];
    std::sort(candidates.begin(), candidates.end());
    for (const auto& [index, begin] : candidates) {
      const size_t end = begin + length;
      if (taken[begin]) continue;
      // What is taken so far is at least this long, so it cannot lie inside: looking at both ends suffices.
      if (taken[end - 1]) {
        const int shorter = next_shorter_[index];
        if (shorter >= 0) by_length[tokens_[shorter].text.size()].push_back({shorter, begin});
        continue;
      }
      const SpecialToken& token = tokens_[index];
      Match match{begin, end, begin, end, token.id};
      if (token.strip_left) {
        while (match.outer_begin > 0 && !taken[match.outer_begin - 1] && is_ascii_space(text[match.outer_begin - 1])) {
          match.outer_begin--;
        }
      }
      if (token.strip_right) {
        while (match.outer_end < text.size() && !taken[match.outer_end] && is_ascii_space(text[match.outer_end])) {
          match.outer_end++;
        }
      }
      std::fill(taken.begin() + static_cast<ptrdiff_t>(match.outer_begin),
                taken.begin() + static_cast<ptrdiff_t>(match.outer_end), true);
      matches.push_back(match);
    }
    std::vector<Candidate>().swap(candidates);
  }
  std::sort(matches.begin(), matches.end(), [](const Match& a, const Match& b) { return a.begin < b.begin; });
  return matches;
}

std::vector<Fragment> SpecialTokenMatcher::split(std::string_view text) const {
  std::vector<Fragment> fragments;
  size_t position = 0;
  for (const Match& match : find_matches(text)) {
    if (match.outer_begin > position) fragments.push_back({-1, text.substr(position, match.outer_begin - position)});
    fragments.push_back({match.token, {}});
    position = match.outer_end;
  }
  if (position < text.size()) fragments.push_back({-1, text.substr(position)});
  return fragments;
}

}  // namespace caravan::vocab
