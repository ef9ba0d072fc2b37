#include "engine/dry.h"

#include <algorithm>
#include <cmath>

namespace caravan::engine {
namespace {

constexpr double kLargestPenalty = 1e30;  // as good as a ban, and still finite when subtracted

// For every j, how many leading elements of text[j..] equal those of text (the Z function); 0 for j = 0.
std::vector<size_t> common_prefix_lengths(const std::vector<int32_t>& text) {
  std::vector<size_t> lengths(text.size(), 0);
  size_t begin = 0, end = 0;  // the match that reaches furthest
  for (size_t j = 1; j < text.size(); ++j) {
    size_t length = j < end ? std::min(end - j, lengths[j - begin]) : 0;
    while (j + length < text.size() && text[length] == text[j + length]) ++length;
    if (j + length > end) {
      begin = j;
      end = j + length;
    }
    lengths[j] = length;
  }
  return lengths;
}

}  // namespace

BreakerTracker::BreakerTracker(std::vector<std::string> breakers) : breakers_(std::move(breakers)) {
  std::erase_if(breakers_, [](const std::string& breaker) { return breaker.empty(); });
  for (const std::string& breaker : breakers_) longest_ = std::max(longest_, breaker.size());
}

void BreakerTracker::push(std::string_view piece) {
  ++tokens_since_;
  const size_t n_before = tail_.size();
  tail_ += piece;
  const std::string_view text = tail_;
  for (const std::string& breaker : breakers_) {
    // Only occurrences that end in this piece are new.
    const size_t from = n_before < breaker.size() ? 0 : n_before - breaker.size() + 1;
    if (text.find(breaker, from) != std::string_view::npos) tokens_since_ = 0;
  }
  const size_t keep = longest_ == 0 ? 0 : longest_ - 1;
  if (tail_.size() > keep) tail_.erase(0, tail_.size() - keep);
}

std::vector<TokenPenalty> dry_penalties(std::span<const int32_t> history, size_t tokens_since_breaker,
                                        const SamplingParams& params) {
  const size_t n_back = params.dry_penalty_last_n < 0
                            ? history.size()
                            : std::min(history.size(), static_cast<size_t>(params.dry_penalty_last_n));
  const auto allowed = static_cast<size_t>(params.dry_allowed_length);
  const size_t longest = std::min(n_back, tokens_since_breaker);
  if (n_back <= allowed || longest < allowed) return {};

  // Latest token first: a common prefix with the part that begins at j is a repetition that token j - 1 would continue.
  const std::vector<int32_t> backwards(history.rbegin(), history.rbegin() + static_cast<ptrdiff_t>(n_back));
  const std::vector<size_t> lengths = common_prefix_lengths(backwards);
  std::vector<std::pair<int32_t, size_t>> repeats;  // token, tokens repeated before it
  for (size_t j = 1; j < backwards.size(); ++j) {
    const size_t length = std::min(lengths[j], longest);
    if (length >= allowed) repeats.emplace_back(backwards[j - 1], length);
  }
  std::sort(repeats.begin(), repeats.end());
  std::vector<TokenPenalty> penalties;
  for (size_t i = 0; i < repeats.size(); ++i) {
    const auto& [token, length] = repeats[i];
    if (i + 1 < repeats.size() && repeats[i + 1].first == token) continue;  // the last one of a token is the longest
    const double penalty = static_cast<double>(params.dry_multiplier) *
                           std::pow(static_cast<double>(params.dry_base), static_cast<double>(length - allowed));
    penalties.push_back({token, static_cast<float>(std::clamp(penalty, -kLargestPenalty, kLargestPenalty))});
  }
  return penalties;
}

}  // namespace caravan::engine
