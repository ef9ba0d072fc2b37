#include "stage/candidates.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace caravan::stage {
namespace {

std::vector<float> many_logits(size_t n) {
  std::vector<float> logits(n);
  for (size_t i = 0; i < n; ++i) logits[i] = static_cast<float>((i * 7919) % 101) / 10 - 5;  // with many ties
  return logits;
}

TEST(TopK, GivesTheFirstOfASortForEveryK) {
  const std::vector<float> logits = many_logits(300);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (uint32_t k = 0; k <= 300; k += k < 20 ? 1 : 40) {
    const TopK best = top_k(logits, k);
    ASSERT_EQ(best.ids, std::vector<int32_t>(order.begin(), order.begin() + k)) << "k " << k;
    for (uint32_t i = 0; i < k; ++i) EXPECT_EQ(best.logits[i], logits[static_cast<size_t>(best.ids[i])]);
  }
  EXPECT_EQ(top_k(logits, 1000).ids, order);
}

TEST(TopK, PutsNaNLast) {
  const std::vector<float> logits{std::nanf(""), 1, std::nanf(""), -3};
  EXPECT_EQ(top_k(logits, 4).ids, (std::vector<int32_t>{1, 3, 0, 2}));
}

TEST(LogSumExp, IsAccurateForLargeAndManyValues) {
  const std::vector<float> logits = many_logits(30000);
  long double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<long double>(logit));
  EXPECT_NEAR(log_sum_exp(logits), static_cast<double>(std::log(sum)), 1e-6 * static_cast<double>(std::log(sum)));
  EXPECT_FLOAT_EQ(log_sum_exp(std::vector<float>{1e30f, 1e30f}), 1e30f);
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_FLOAT_EQ(log_sum_exp(std::vector<float>{-infinity, 2.5f}), 2.5f);
}

}  // namespace
}  // namespace caravan::stage
