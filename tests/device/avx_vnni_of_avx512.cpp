// The kernels of isa_avx_vnni.cpp with their one special instruction in the encoding of AVX-512, so that they can be
// tested on processors that lack AVX-VNNI.
#include "device/cpu/kernels/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
#endif

#define CARAVAN_VNNI
#define CARAVAN_VNNI_OF_AVX512
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

namespace caravan::device::cpu::testing {
const Kernels& avx_vnni_kernels_of_avx512();
const Kernels& avx_vnni_kernels_of_avx512() { return kTable; }
}  // namespace caravan::device::cpu::testing
#endif
