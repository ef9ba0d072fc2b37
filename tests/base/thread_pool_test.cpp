// The fork-join pool: every worker runs once, barriers separate steps, whatever the number of threads.
#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <vector>

namespace caravan {
namespace {

TEST(ThreadPool, RunsEveryWorkerOnceInEveryRun) {
  for (int n_threads = 1; n_threads <= 5; ++n_threads) {
    ThreadPool pool(n_threads);
    EXPECT_EQ(pool.n_threads(), n_threads);
    std::vector<int> calls(static_cast<size_t>(n_threads), 0);
    for (int round = 1; round <= 500; ++round) {
      pool.run([&](int worker) { ++calls[static_cast<size_t>(worker)]; });
      for (const int n : calls) ASSERT_EQ(n, round) << n_threads << " threads";
    }
  }
}

TEST(ThreadPool, ShowsEveryWorkersResultsAfterTheBarrier) {
  for (int n_threads = 1; n_threads <= 5; ++n_threads) {
    ThreadPool pool(n_threads);
    std::vector<int64_t> step_of_worker(static_cast<size_t>(n_threads), -1);
    std::atomic<int> n_wrong = 0;
    constexpr int kSteps = 300;
    for (int round = 0; round < 3; ++round) {
      pool.run([&](int worker) {
        for (int step = 0; step < kSteps; ++step) {
          step_of_worker[static_cast<size_t>(worker)] = step;
          pool.barrier();
          for (const int64_t seen : step_of_worker) n_wrong += seen != step;
          pool.barrier();
        }
      });
    }
    EXPECT_EQ(n_wrong, 0) << n_threads << " threads";
  }
}

TEST(ThreadPool, WakesWorkersThatWentToSleep) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    // Longer than the workers spin: a run that they all miss while spinning must still reach them.
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    while (std::chrono::steady_clock::now() < end) {
    }
    std::atomic<int> n_calls = 0;
    pool.run([&](int) { ++n_calls; });
    ASSERT_EQ(n_calls, 3);
  }
}

TEST(ThreadPool, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(1 + i % 5);
}

TEST(SplitWork, CoversEverythingOnceInMultiplesOfTheGranularity) {
  for (const int64_t n : {0, 1, 7, 8, 63, 64, 65, 1000})
    for (int n_workers = 1; n_workers <= 5; ++n_workers)
      for (const int64_t granularity : {1, 4, 16}) {
        int64_t next = 0;
        for (int worker = 0; worker < n_workers; ++worker) {
          const WorkRange range = split_work(n, worker, n_workers, granularity);
          EXPECT_EQ(range.begin, next);
          EXPECT_LE(range.begin, range.end);
          EXPECT_TRUE(range.end == n || range.end % granularity == 0) << range.end;
          next = range.end;
        }
        EXPECT_EQ(next, n);
      }
}

}  // namespace
}  // namespace caravan
