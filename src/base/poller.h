// Waiting for another thread with the core awake: one that sleeps takes some 100 us to come back.
#pragma once

#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace caravan {

// Tells the processor that this is a loop that waits.
inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__) || defined(__arm__)
  asm volatile("yield");
#endif
}

// How one thread waits for events that come one after another: awake while the next one is near, as the last one was,
// and as long as nobody else wants the core.
class Poller {
 public:
  using Clock = std::chrono::steady_clock;
  using Now = Clock::time_point (*)();

  // longest: events that took longer than this are waited for asleep; zero: all of them. now is for tests.
  explicit Poller(Clock::duration longest, Now now = Clock::now) : longest_(longest), now_(now) {}

  // Begins to wait. Returns true as soon as ready() does; false when the caller is to sleep until then.
  template <typename Ready>
  bool wait(Ready&& ready) {
    began_ = now_();
    if (last_ > longest_ || longest_ == Clock::duration::zero()) return false;
    if (n_passes_ > 0) {
      --n_passes_;
      return false;
    }
    for (Clock::time_point round = began_; round - began_ <= longest_;) {
      for (int i = 0; i < kPausesPerRound; ++i) {
        if (ready()) return true;
        cpu_relax();
      }
      std::this_thread::yield();
      const Clock::time_point end = now_();
      if (end - round > kLongestRound) {  // another thread ran here meanwhile, and more than briefly
        n_passes_ = kPassesWhenWanted;
        return false;
      }
      round = end;
    }
    return false;
  }

  // The event that wait() was about has come.
  void arrived() { last_ = now_() - began_; }

 private:
  static constexpr int kPausesPerRound = 2000;  // 30 to 100 us
  static constexpr auto kLongestRound = std::chrono::milliseconds(1);
  static constexpr int kPassesWhenWanted = 32;

  const Clock::duration longest_;
  const Now now_;
  Clock::time_point began_;
  Clock::duration last_ = Clock::duration::max();  // that the last event took
  int n_passes_ = 0;                               // how many more waits leave the core to others
};

}  // namespace caravan
