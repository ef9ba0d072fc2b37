// What this machine can do at best: the 100% beside every benchmark figure.
#pragma once

#include <cstdint>
#include <memory>

namespace caravan::device::cpu {

struct MachineLimits {
  double read_bytes_per_s;  // sequential reads of a buffer much larger than the caches, all threads together
  double int8_ops_per_s;    // 8-bit multiply-adds on registers; a multiply and an add count as two operations
  double f32_flop_per_s;    // fused multiply-adds on registers, two operations each
};

// Measures with n_threads threads, again and again: the speed of a shared machine changes, so what is compared with its
// limits should be measured between two of their measurements.
// x86-64 with AVX2 uses 256-bit vectors (maddubs + madd + add) even where wider or fused ones exist, so that
// percentages compare between machines; arm64 uses NEON (sdot where there is one); other processors scalar code, which
// the compiler may vectorise.
class LimitsMeter {
 public:
  // Takes 256 MiB of memory, or 128 where little is free. Throws ResourceError when it cannot be had.
  explicit LimitsMeter(int n_threads);
  ~LimitsMeter();
  LimitsMeter(const LimitsMeter&) = delete;
  LimitsMeter& operator=(const LimitsMeter&) = delete;

  // Takes about a third of a second.
  MachineLimits measure() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The best of several measurements, each limit by itself: about two seconds.
MachineLimits measure_limits(int n_threads);

}  // namespace caravan::device::cpu
