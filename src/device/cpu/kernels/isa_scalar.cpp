// The kernels in plain C++, for processors without the instruction sets below and as the definition that the others are
// tested against. How such a file is built: isa.h.
#define CARAVAN_SCALAR
#include "device/cpu/kernels/isa.h"

namespace caravan::device::cpu {
namespace {
// clang-format off: order matters
#include "device/cpu/kernels/simd_scalar.h"
#include "device/cpu/kernels/impl_table.h"
// clang-format on

constexpr Kernels kTable = make_kernels<Isa::scalar>();
}  // namespace

const Kernels& scalar_kernels() { return kTable; }
}  // namespace caravan::device::cpu
