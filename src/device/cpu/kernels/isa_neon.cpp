// The kernels compiled for 64-bit NEON, which every arm64 processor has. How such a file is built, and why: isa.h.
#include "device/cpu/kernels/isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace caravan::device::cpu {
namespace {
// clang-format off: order matters
#include "device/cpu/kernels/simd_neon.h"
#include "device/cpu/kernels/impl_table.h"
// clang-format on

constexpr Kernels kTable = make_kernels<Isa::neon>();
}  // namespace
}  // namespace caravan::device::cpu

namespace caravan::device::cpu {
const Kernels& neon_kernels() { return kTable; }
}  // namespace caravan::device::cpu
#endif
