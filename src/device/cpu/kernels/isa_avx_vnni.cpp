// The kernels compiled for AVX2, FMA and F16C with the vector neural network instructions of 256 bits. How such a file
// is built, and why: isa.h.
#include "device/cpu/kernels/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#define CARAVAN_VNNI
namespace caravan::device::cpu {
namespace {
// clang-format off: order matters
#include "device/cpu/kernels/simd_avx2.h"
#include "device/cpu/kernels/impl_table.h"
// clang-format on

constexpr Kernels kTable = make_kernels<Isa::avx_vnni>();
}  // namespace
}  // namespace caravan::device::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace caravan::device::cpu {
const Kernels& avx_vnni_kernels() { return kTable; }
}  // namespace caravan::device::cpu
#endif
