// The shared queue of work: every unit is taken once, by whoever is free.
#include "base/work_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace caravan {
namespace {

TEST(WorkQueue, GivesEveryUnitOnceWhateverTheShares) {
  for (const int n_workers : {1, 2, 3, 5, 12})
    for (const int64_t n : {0, 1, 3, 16, 17, 100, 4097})
      for (const int64_t max_piece : {1, 7, 64}) {
        ThreadPool pool(n_workers);
        WorkQueue queue(n_workers);
        for (int round = 0; round < 3; ++round) {
          std::vector<std::atomic<int>> taken(static_cast<size_t>(n));
          std::atomic<int64_t> longest = 0;
          queue.reset(n);
          pool.run([&](int worker) {
            for (WorkRange piece = queue.take(worker, max_piece); piece.begin < piece.end;
                 piece = queue.take(worker, max_piece)) {
              if (piece.end - piece.begin > max_piece) longest = piece.end - piece.begin;
              for (int64_t i = piece.begin; i < piece.end; ++i) ++taken[static_cast<size_t>(i)];
            }
          });
          EXPECT_EQ(longest, 0) << "a piece longer than " << max_piece;
          for (const auto& times : taken) ASSERT_EQ(times, 1) << n_workers << " workers, " << n << " units";
        }
      }
}

TEST(WorkQueue, GivesTheFirstOfAWorkersShareAndTheLastOfOthers) {
  WorkQueue queue(2);
  queue.reset(100);
  const WorkRange first = queue.take(0, 8), second = queue.take(0, 8);
  EXPECT_EQ(first.begin, 0);
  EXPECT_EQ(first.end, 8);
  EXPECT_EQ(second.begin, 8);
  int64_t n_left = 100 - 8 - (second.end - second.begin);
  WorkRange piece = queue.take(0, 8);
  for (; piece.end <= 50; piece = queue.take(0, 8)) n_left -= piece.end - piece.begin;
  EXPECT_EQ(piece.end, 100) << "worker 1 has not begun: its work is taken from the end";
  EXPECT_EQ(queue.take(1, 8).begin, 50);
  EXPECT_EQ(n_left, 50);
}

}  // namespace
}  // namespace caravan
