#include "base/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/poller.h"

namespace caravan {
namespace {

// About 20 us of waiting before a thread parks: longer than the gap between two operations of a graph.
constexpr int kSpins = 2000;
// Inside a run the others are at work: yield after this many spins, in case there are fewer cores than threads.
constexpr int kBarrierSpins = 2000;

}  // namespace

struct ThreadPool::State {
  std::atomic<uint64_t> generation{0};  // only has to differ from the last one a worker saw
  std::atomic<int> unfinished{0};
  std::atomic<int> barrier_arrived{0};
  std::atomic<uint64_t> barrier_phase{0};
  std::atomic<bool> stopping{false};
  Function function = nullptr;
  void* context = nullptr;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<int> parked{0};
  std::vector<std::jthread> threads;

  // Returns when the generation differs from seen (true) or the pool stops (false).
  bool wait_for_work(uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (generation.load(std::memory_order_acquire) != seen) return !stopping.load(std::memory_order_relaxed);
      cpu_relax();
    }
    std::unique_lock lock(mutex);
    parked.fetch_add(1);
    // Sequentially consistent, as publish() is: either it sees this thread parked, or this thread sees its generation.
    wake.wait(lock, [&] { return generation.load(std::memory_order_seq_cst) != seen; });
    parked.fetch_sub(1);
    return !stopping.load(std::memory_order_relaxed);
  }

  void worker_loop(int worker) {
    uint64_t seen = 0;
    while (wait_for_work(seen)) {
      seen = generation.load(std::memory_order_acquire);
      function(context, worker);
      unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  // Makes a new generation visible and wakes those who sleep.
  void publish() {
    generation.fetch_add(1, std::memory_order_seq_cst);
    if (parked.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard lock(mutex);
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), state_(std::make_unique<State>()) {
  CARAVAN_ASSERT(n_threads >= 1, "callers check the thread count");
  for (int worker = 1; worker < n_threads; ++worker)
    state_->threads.emplace_back([state = state_.get(), worker] { state->worker_loop(worker); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping.store(true);
    state_->generation.fetch_add(1);
  }
  state_->wake.notify_all();
  state_->threads.clear();
}

void ThreadPool::run_erased(Function function, void* context) {
  state_->function = function;
  state_->context = context;
  state_->unfinished.store(n_threads_ - 1, std::memory_order_relaxed);
  if (n_threads_ > 1) state_->publish();
  function(context, 0);
  for (int spin = 0; state_->unfinished.load(std::memory_order_acquire) != 0; ++spin)
    spin < kBarrierSpins ? cpu_relax() : std::this_thread::yield();
}

void ThreadPool::barrier() {
  if (n_threads_ == 1) return;
  const uint64_t phase = state_->barrier_phase.load(std::memory_order_acquire);
  if (state_->barrier_arrived.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
    state_->barrier_arrived.store(0, std::memory_order_relaxed);
    state_->barrier_phase.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; state_->barrier_phase.load(std::memory_order_acquire) == phase; ++spin)
    spin < kBarrierSpins ? cpu_relax() : std::this_thread::yield();
}

}  // namespace caravan
