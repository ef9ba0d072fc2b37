// Fork-join pool for compute. The calling thread is worker 0; the others spin briefly for the next task, then park.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace caravan {

// Runs a task on n_threads workers at once. One thread at a time may call run(). Nothing spins when idle.
class ThreadPool {
 public:
  // Starts n_threads - 1 threads (n_threads >= 1).
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }

  // Calls task(worker) once for every worker in [0, n_threads()) in parallel and returns when all have finished.
  // A task must not throw. Inside a task, barrier() may be used.
  template <typename Task>
  void run(Task&& task) {
    run_erased([](void* context, int worker) { (*static_cast<std::remove_reference_t<Task>*>(context))(worker); },
               const_cast<void*>(static_cast<const void*>(&task)));
  }

  // Waits until every worker of the current run() has called it: steps of one graph are separated by it.
  void barrier();

 private:
  using Function = void (*)(void* context, int worker);
  void run_erased(Function function, void* context);

  struct State;
  int n_threads_;
  std::unique_ptr<State> state_;
};

// The half-open part of [0, n) that worker of n_workers takes, as equal as possible in multiples of granularity.
struct WorkRange {
  int64_t begin, end;
};
inline WorkRange split_work(int64_t n, int worker, int n_workers, int64_t granularity = 1) {
  const int64_t units = (n + granularity - 1) / granularity;
  const int64_t begin = units * worker / n_workers * granularity;
  const int64_t end = units * (worker + 1) / n_workers * granularity;
  return {begin < n ? begin : n, end < n ? end : n};
}

}  // namespace caravan
