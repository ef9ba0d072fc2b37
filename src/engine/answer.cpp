#include "engine/answer.h"

#include <algorithm>
#include <limits>

namespace caravan::engine {

StopMatcher::StopMatcher(std::vector<std::string> stop) : stop_(std::move(stop)) {
  std::erase_if(stop_, [](const std::string& word) { return word.empty(); });
  std::sort(stop_.begin(), stop_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

size_t StopMatcher::length_of_possible_start() const {
  size_t longest = 0;
  const std::string_view held = held_;
  for (const std::string& word : stop_) {
    size_t length = std::min(held.size(), word.size() - 1);
    while (length > longest && !held.ends_with(std::string_view(word).substr(0, length))) --length;
    longest = std::max(longest, length);
  }
  return longest;
}

StopMatcher::Result StopMatcher::push(std::string_view text) {
  for (const char byte : text) {
    held_ += byte;
    for (const std::string& word : stop_) {
      if (!held_.ends_with(word)) continue;
      held_.resize(held_.size() - word.size());
      return {std::exchange(held_, {}), word};
    }
  }
  std::string released = held_.substr(0, held_.size() - length_of_possible_start());
  held_.erase(0, released.size());
  return {std::move(released), std::nullopt};
}

std::string StopMatcher::finish() { return std::exchange(held_, {}); }

std::optional<size_t> IndentWatch::find_end(std::string_view text) {
  if (n_indent_ <= 0) return std::nullopt;
  for (size_t i = 0; i < text.size(); ++i) {
    if (n_blanks_ && (text[i] == ' ' || text[i] == '\t')) {
      ++*n_blanks_;
      continue;
    }
    if (n_blanks_ && *n_blanks_ < n_indent_) return i;
    n_blanks_ = text[i] == '\n' ? std::optional<int32_t>(0) : std::nullopt;
  }
  return std::nullopt;
}

AnswerText::AnswerText(const vocab::Vocabulary& vocabulary, std::vector<std::string> stop, int32_t n_indent,
                       std::vector<int32_t> rendered)
    : vocabulary_(vocabulary),
      rendered_(std::move(rendered)),
      detokenizer_(vocabulary, vocab::RenderSpecial::no),
      matcher_(std::move(stop)),
      indent_(n_indent) {}

// The characters that are complete with this token.
std::string AnswerText::text_of(int32_t token) {
  if (!std::binary_search(rendered_.begin(), rendered_.end(), token)) return detokenizer_.push(token);
  return detokenizer_.finish() + vocabulary_.piece(token, vocab::RenderSpecial::yes);
}

std::optional<TokenEvent> AnswerText::release(std::string text, uint64_t tokens_before) {
  TokenEvent event;
  event.text = std::move(text);
  while (!pending_.empty() && pending_.front().text_begin < tokens_before) {
    event.tokens.push_back(pending_.front().token);
    if (pending_.front().probabilities) event.probabilities.push_back(std::move(*pending_.front().probabilities));
    pending_.pop_front();
  }
  if (event.text.empty() && event.tokens.empty()) return std::nullopt;
  return event;
}

AnswerText::Result AnswerText::push(int32_t token, std::optional<StepProbabilities> probabilities) {
  const std::string text = text_of(token);
  pending_.push_back({token, std::move(probabilities), pushed_});
  pushed_ += text.size();
  StopMatcher::Result result = matcher_.push(text);
  if (const std::optional<size_t> end = indent_.find_end(result.text)) {
    result.text.resize(*end);
    released_ += result.text.size();
    ended_ = true;
    return {release(std::move(result.text), released_), std::nullopt, true};
  }
  released_ += result.text.size();
  ended_ = result.stopping_word.has_value();
  if (result.text.empty() && !result.stopping_word) return {};
  return {release(std::move(result.text), released_), std::move(result.stopping_word)};
}

AnswerText::Result AnswerText::finish() {
  if (ended_) return {};
  StopMatcher::Result result = matcher_.push(detokenizer_.finish());
  if (result.stopping_word) {
    released_ += result.text.size();
    return {release(std::move(result.text), released_), std::move(result.stopping_word)};
  }
  result.text += matcher_.finish();
  return {release(std::move(result.text), std::numeric_limits<uint64_t>::max()), std::nullopt};
}

}  // namespace caravan::engine
