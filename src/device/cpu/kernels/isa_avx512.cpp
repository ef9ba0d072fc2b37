// The kernels compiled for AVX-512 F, BW, DQ and VL. How such a file is built, and why: isa.h.
#include "device/cpu/kernels/isa.h"

#if defined(__x86_64__)
#if !defined( \
    __clang__)  // GCC 12 takes the deliberately undefined operands in its own header for a mistake (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace caravan::device::cpu {
namespace {
// clang-format off: order matters
#include "device/cpu/kernels/simd_avx512.h"
#include "device/cpu/kernels/impl_table.h"
// clang-format on

constexpr Kernels kTable = make_kernels<Isa::avx512>();
}  // namespace
}  // namespace caravan::device::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace caravan::device::cpu {
const Kernels& avx512_kernels() { return kTable; }
}  // namespace caravan::device::cpu
#endif
