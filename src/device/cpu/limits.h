// What this machine can do at best: the 100% beside every benchmark figure.
#pragma once

#include <cstdint>

namespace caravan::device::cpu {

struct MachineLimits {
  double read_bytes_per_s;  // sequential reads of a buffer much larger than the caches, all threads together
  double int8_ops_per_s;    // 8-bit multiply-adds on registers; a multiply and an add count as two operations
  double f32_flop_per_s;    // fused multiply-adds on registers, two operations each
};

// Measures with n_threads threads, best of several runs; takes about three seconds and 1 GiB of memory.
// x86-64 with AVX2 uses 256-bit vectors (maddubs + madd + add) even where wider or fused ones exist, so that
// percentages compare between machines; arm64 uses NEON (sdot where there is one); other processors scalar code, which
// the compiler may vectorise. Throws ResourceError when the buffer cannot be had.
MachineLimits measure_limits(int n_threads);

}  // namespace caravan::device::cpu
