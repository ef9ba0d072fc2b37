#include "engine/final_draw.h"

#include <algorithm>
#include <cmath>

namespace caravan::engine {
namespace {

constexpr size_t kZipfTokens = 100;  // from which mirostat 1 estimates the exponent of the distribution

// How many of the most likely tokens keep the surprise of the draw at mu bits, when probabilities fall as in Zipf's
// law, whose exponent is estimated from the first of them. Source: Basu et al. 2020, arXiv:2007.14966, section 4.1.
size_t mirostat_top_k(const CandidateList& list, double mu, uint32_t n_vocab) {
  double products = 0, squares = 0;
  for (size_t i = 0; i + 1 < std::min(list.items.size(), kZipfTokens); ++i) {
    if (std::isinf(list.items[i + 1].logit)) break;
    const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    products += t * (static_cast<double>(list.items[i].logit) - static_cast<double>(list.items[i + 1].logit));
    squares += t * t;
  }
  const double s = products / squares;
  const double epsilon = s - 1;
  const double k = std::pow(epsilon * std::exp2(mu) / (1 - std::pow(static_cast<double>(n_vocab), -epsilon)), 1 / s);
  const auto n = static_cast<double>(list.items.size());
  return k >= 1 ? static_cast<size_t>(std::min(k, n)) : 1;  // not a number, too: all logits were equal, or epsilon 0
}

// Without the candidates whose surprise is more than mu bits; the first always stays.
void drop_surprising(CandidateList& list, double mu) {
  const std::vector<double> p = list.probabilities();
  size_t n = 1;
  while (n < p.size() && -std::log2(p[n]) <= mu) ++n;
  list.items.resize(n);
}

}  // namespace

FinalDraw::Kind FinalDraw::kind_of(const SamplingParams& params) {
  if (params.mirostat == 1) return Kind::mirostat_1;
  if (params.mirostat == 2) return Kind::mirostat_2;
  const bool listed = std::find(params.samplers.begin(), params.samplers.end(), "adaptive_p") != params.samplers.end();
  return listed && params.adaptive_target >= 0 ? Kind::adaptive : Kind::plain;
}

FinalDraw::FinalDraw(const SamplingParams& params, uint32_t n_vocab)
    : kind_(kind_of(params)),
      n_vocab_(n_vocab),
      tau_(static_cast<double>(params.mirostat_tau)),
      eta_(static_cast<double>(params.mirostat_eta)),
      mu_(2 * tau_),
      target_(static_cast<double>(params.adaptive_target)),
      decay_(static_cast<double>(params.adaptive_decay)),
      weighted_sum_(target_ / (1 - decay_)),  // as if every draw before had met the target
      total_weight_(1 / (1 - decay_)) {}

int32_t FinalDraw::draw_from(CandidateList& list, double u) {
  switch (kind_) {
    case Kind::mirostat_1:
    case Kind::mirostat_2:
      return draw_mirostat(list, u);
    case Kind::adaptive:
      return draw_adaptive(list, u);
    case Kind::plain:
      break;
  }
  return list.items[draw(list, u)].id;
}

// Source: Basu et al. 2020, arXiv:2007.14966, algorithm 1; version 2 cuts at the surprise itself.
int32_t FinalDraw::draw_mirostat(CandidateList& list, double u) {
  list.sort();
  if (list.items.size() > 1 && std::isfinite(list.max_logit())) {
    if (kind_ == Kind::mirostat_1) {
      list.keep_first(mirostat_top_k(list, mu_, n_vocab_));
    } else {
      drop_surprising(list, mu_);
    }
  }
  const size_t chosen = draw(list, u);
  const std::vector<double> p = list.probabilities();
  if (!p.empty() && p[chosen] > 0) mu_ -= eta_ * (-std::log2(p[chosen]) - tau_);
  return list.items[chosen].id;
}

// Favours candidates whose probability is near a target, which moves against the average of earlier draws.
// Source: MrJackSpade and ddh0 2025, llama.cpp pull request 17927.
int32_t FinalDraw::draw_adaptive(CandidateList& list, double u) {
  constexpr double kWidth = 0.3, kPeak = 5, kSharpness = 10;
  const std::vector<double> p = list.probabilities();
  if (p.empty()) return list.items[draw(list, u)].id;
  const double aim = std::clamp(2 * target_ - weighted_sum_ / total_weight_, 0.0, 1.0);
  for (size_t i = 0; i < p.size(); ++i) {
    if (std::isinf(list.items[i].logit)) continue;
    const double distance = std::abs(p[i] - aim) / kWidth;
    list.items[i].logit = static_cast<float>(kPeak - kSharpness * distance * distance / (1 + distance));
  }
  list.sorted = false;
  const size_t chosen = draw(list, u);
  weighted_sum_ = p[chosen] + decay_ * weighted_sum_;
  total_weight_ = 1 + decay_ * total_weight_;
  return list.items[chosen].id;
}

}  // namespace caravan::engine
