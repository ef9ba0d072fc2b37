// What every isa_*.cpp includes before it opens its target region: all standard headers, so that none of their inline
// functions are compiled with wide instructions, and the declarations of the tables.
//
// An isa_*.cpp is: this header; its intrinsics; a target region around an anonymous namespace with one vocabulary
// (simd_*.h) and all kernels (impl_table.h); a function that returns the table. No translation unit has -m flags.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "device/cpu/kernels/kernels.h"
#include "device/cpu/kernels/layout.h"
#include "tensor/blocks.h"
#include "tensor/dtype.h"
#include "tensor/half.h"

// The vocabulary's functions are one instruction or a few and must vanish; loops over a tile must become registers.
// For sixteen plain floats neither holds (and compiling would take minutes), hence isa_scalar.cpp's own definitions.
#if !defined(CARAVAN_SCALAR)
#define CARAVAN_INLINE inline __attribute__((always_inline))
#define CARAVAN_UNROLL _Pragma("GCC unroll 16")
#define CARAVAN_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define CARAVAN_INLINE inline
#define CARAVAN_UNROLL
#define CARAVAN_UNROLL_4
#endif

namespace caravan::device::cpu {

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
const Kernels& neon_dot_kernels();
const Kernels& neon_i8mm_kernels();
#endif

}  // namespace caravan::device::cpu
