// Reduces a row of logits to what sampling needs, where the output matrix is: deterministic, ties by lowest id.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace caravan::stage {

struct TopK {
  std::vector<int32_t> ids;   // descending by logit, ties by lowest id
  std::vector<float> logits;  // of ids
};

// The k largest logits (at most logits.size()); NaN counts as the smallest.
TopK top_k(std::span<const float> logits, uint32_t k);

// log(sum(exp(logits))), summed in double in index order.
float log_sum_exp(std::span<const float> logits);

}  // namespace caravan::stage
