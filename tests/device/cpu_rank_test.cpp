// Rows of logits reduced to candidates, on any number of threads.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "device/cpu/cpu_device.h"
#include "kernels_support.h"

namespace caravan::device::cpu::testing {
namespace {

TEST(CpuRank, FillsEveryRowWhateverTheThreads) {
  constexpr size_t kVocab = 1000, kRows = 7;
  std::vector<std::vector<float>> logits;
  for (size_t row = 0; row < kRows; ++row) logits.push_back(random_row(kVocab, static_cast<uint32_t>(row)));
  for (int n_threads = 1; n_threads <= 4; ++n_threads) {
    CpuDevice device(n_threads, select_isa(), 0);
    for (const size_t n_rows : {size_t{0}, size_t{1}, kRows}) {
      std::vector<std::vector<Candidate>> best(n_rows);
      std::vector<Ranking> rows(n_rows);
      for (size_t row = 0; row < n_rows; ++row) {
        best[row].resize(row);  // none for the first
        rows[row] = {logits[row], best[row]};
      }
      device.rank(rows);
      for (size_t row = 0; row < n_rows; ++row) {
        EXPECT_EQ(rows[row].log_sum_exp, scalar().log_sum_exp(logits[row].data(), kVocab));
        for (size_t i = 0; i < best[row].size(); ++i) {
          const auto greater =
              std::count_if(logits[row].begin(), logits[row].end(), [&](float x) { return x > best[row][i].logit; });
          EXPECT_EQ(static_cast<size_t>(greater), i);
          EXPECT_EQ(best[row][i].logit, logits[row][static_cast<size_t>(best[row][i].id)]);
        }
      }
    }
  }
}

TEST(CpuRank, PassesOverRowsWithoutLogits) {
  CpuDevice device(2, select_isa(), 0);
  const std::vector<float> logits{1, 3, 2};
  Candidate best{-1, 0};
  Ranking rows[3] = {{}, {logits, {&best, 1}}, {}};
  device.rank(rows);
  EXPECT_EQ(best.id, 1);
  EXPECT_EQ(rows[0].log_sum_exp, 0);
}

}  // namespace
}  // namespace caravan::device::cpu::testing
