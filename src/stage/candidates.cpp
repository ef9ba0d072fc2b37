#include "stage/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace caravan::stage {

TopK top_k(std::span<const float> logits, uint32_t k) {
  const auto value = [&](int32_t id) {
    const float logit = logits[static_cast<size_t>(id)];
    return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
  };
  const auto better = [&](int32_t a, int32_t b) { return value(a) != value(b) ? value(a) > value(b) : a < b; };

  // A heap of the best so far with the worst of them on top: most ids fail one comparison.
  const size_t n = std::min<size_t>(k, logits.size());
  TopK result;
  std::vector<int32_t>& best = result.ids;
  if (n == 0) return result;
  best.reserve(n);
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (best.size() < n) {
      best.push_back(id);
      std::push_heap(best.begin(), best.end(), better);
    } else if (better(id, best.front())) {
      std::pop_heap(best.begin(), best.end(), better);
      best.back() = id;
      std::push_heap(best.begin(), best.end(), better);
    }
  }
  std::sort_heap(best.begin(), best.end(), better);
  result.logits.reserve(n);
  for (const int32_t id : best) result.logits.push_back(logits[static_cast<size_t>(id)]);
  return result;
}

float log_sum_exp(std::span<const float> logits) {
  float largest = -std::numeric_limits<float>::infinity();
  for (const float logit : logits) largest = std::max(largest, logit);
  if (!std::isfinite(largest)) return largest;
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - largest));
  return static_cast<float>(static_cast<double>(largest) + std::log(sum));
}

}  // namespace caravan::stage
