// The kernels compiled for NEON with the 8-bit dot product of Armv8.2. How such a file is built, and why: isa.h.
#include "device/cpu/kernels/isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define CARAVAN_DOTPROD
namespace caravan::device::cpu {
namespace {
// clang-format off: order matters
#include "device/cpu/kernels/simd_neon.h"
#include "device/cpu/kernels/impl_table.h"
// clang-format on

constexpr Kernels kTable = make_kernels<Isa::neon_dot>();
// Processors with i8mm have sdot too, and run the same code.
constexpr Kernels kI8mmTable = make_kernels<Isa::neon_i8mm>();
}  // namespace
}  // namespace caravan::device::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace caravan::device::cpu {
const Kernels& neon_dot_kernels() { return kTable; }
const Kernels& neon_i8mm_kernels() { return kI8mmTable; }
}  // namespace caravan::device::cpu
#endif
