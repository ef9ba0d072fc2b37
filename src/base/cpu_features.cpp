#include "base/cpu_features.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

#include "base/error.h"

namespace caravan {
namespace {

constexpr std::pair<Isa, std::string_view> kIsaNames[] = {
    {Isa::scalar, "scalar"},           {Isa::avx2, "avx2"}, {Isa::avx_vnni, "avx_vnni"}, {Isa::avx512, "avx512"},
    {Isa::avx512_vnni, "avx512_vnni"}, {Isa::neon, "neon"}, {Isa::neon_dot, "neon_dot"}, {Isa::neon_i8mm, "neon_i8mm"},
};

#if defined(__x86_64__)
// Of processors with AVX2, on which it needs nothing more from the system.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

}  // namespace

std::string_view isa_name(Isa isa) {
  for (const auto& [value, name] : kIsaNames)
    if (value == isa) return name;
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back(Isa::avx2);
    if (has_avx_vnni()) isas.push_back(Isa::avx_vnni);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512vnni")) isas.push_back(Isa::avx512_vnni);
    }
  }
#elif defined(__aarch64__)
  isas.push_back(Isa::neon);
  constexpr unsigned long kAsimdDp = 1UL << 20, kI8mm2 = 1UL << 13;  // Linux hwcap.h for arm64
  if (getauxval(AT_HWCAP) & kAsimdDp) {
    isas.push_back(Isa::neon_dot);
    if (getauxval(AT_HWCAP2) & kI8mm2) isas.push_back(Isa::neon_i8mm);
  }
#elif defined(__arm__)
  constexpr unsigned long kNeon = 1UL << 12, kVfpv4 = 1UL << 16;  // Linux hwcap.h for arm
  if ((getauxval(AT_HWCAP) & kNeon) && (getauxval(AT_HWCAP) & kVfpv4)) isas.push_back(Isa::neon);
#endif
  return isas;
}

Isa select_isa() {
  const auto isas = supported_isas();
  const char* wanted = std::getenv("CARAVAN_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string accepted;
  for (const Isa isa : isas) {
    if (isa_name(isa) == wanted) return isa;
    accepted += accepted.empty() ? "" : ", ";
    accepted += isa_name(isa);
  }
  throw RequestError("CARAVAN_ISA='" + std::string(wanted) + "' cannot run on this processor; accepted: " + accepted);
}

std::string cpu_model_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.compare(0, 10, "model name") == 0) {
      const auto colon = line.find(": ");
      if (colon != std::string::npos) return line.substr(colon + 2);
    }
  return "unknown processor";
}

int usable_cpu_count() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
  double quota, period;
  if (quota_file >> quota >> period && period > 0)
    count = std::min(count, std::max(1, static_cast<int>(quota / period + 0.5)));
  return std::max(count, 1);
}

}  // namespace caravan
