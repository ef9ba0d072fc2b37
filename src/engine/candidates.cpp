#include "engine/candidates.h"

#include <algorithm>

#include "base/error.h"

namespace caravan::engine {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

void CandidateList::sort() {
  if (sorted) return;
  std::sort(items.begin(), items.end(), before);
  sorted = true;
}

void CandidateList::keep_first(size_t k) {
  k = std::min(k, items.size());
  if (!sorted) std::partial_sort(items.begin(), items.begin() + static_cast<ptrdiff_t>(k), items.end(), before);
  items.resize(k);
  sorted = true;
}

void CandidateList::check_order() { sorted = std::is_sorted(items.begin(), items.end(), before); }

float CandidateList::max_logit() const {
  float max = kMinusInfinity;
  for (const Candidate& candidate : items) max = std::max(max, candidate.logit);
  return max;
}

std::vector<double> CandidateList::probabilities() const {
  const auto max = static_cast<double>(max_logit());
  if (std::isinf(max)) return {};
  std::vector<double> p(items.size());
  double total = 0;
  for (size_t i = 0; i < items.size(); ++i) total += p[i] = std::exp(static_cast<double>(items[i].logit) - max);
  for (double& value : p) value /= total;
  return p;
}

size_t draw(const CandidateList& list, double u) {
  const std::vector<Candidate>& items = list.items;
  CARAVAN_ASSERT(!items.empty(), "every sampler leaves a candidate");
  const float max = list.max_logit();
  if (max == kMinusInfinity) {
    return static_cast<size_t>(std::min_element(items.begin(), items.end(), before) - items.begin());
  }
  double total = 0;
  for (const Candidate& candidate : items) total += static_cast<double>(std::exp(candidate.logit - max));
  const double target = u * total;
  double sum = 0;
  size_t last_possible = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto p = static_cast<double>(std::exp(items[i].logit - max));
    if (p > 0) last_possible = i;
    sum += p;
    if (sum > target) return i;
  }
  return last_possible;
}

}  // namespace caravan::engine
