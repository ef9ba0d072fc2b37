// Which instruction sets this processor offers, and which one the kernels shall use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace caravan {

// Kernel families, from the least to the most capable within an architecture.
// avx2 means AVX2 + FMA + F16C, avx_vnni AVX-VNNI on top; avx512 means F, BW, DQ, VL on top; avx512_vnni adds VNNI.
// neon_dot: Armv8.2 dotprod.
enum class Isa { scalar, avx2, avx_vnni, avx512, avx512_vnni, neon, neon_dot, neon_i8mm };

// The name used in logs, benchmarks and CARAVAN_ISA: "scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon", ...
std::string_view isa_name(Isa isa);

// Every instruction set that this processor (and operating system) can run, scalar first.
std::vector<Isa> supported_isas();

// The best of supported_isas(), or the one that the environment variable CARAVAN_ISA names.
// Throws RequestError, listing what is accepted, when that name is unknown or not supported here.
Isa select_isa();

// A short description of the processor for logs, e.g. "AMD EPYC 7B13".
std::string cpu_model_name();

// Hardware threads that this process may use (affinity mask and control-group quota), at least 1.
int usable_cpu_count();

}  // namespace caravan
