// Three loops that do nothing but what they measure, each per instruction set, run on all threads at once.
// Vector code is confined to functions with a target attribute; see kernels/isa.h for why.
#include "device/cpu/limits.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace caravan::device::cpu {
namespace {

// Each loop returns something computed from all it did, so that none of it can be left out. Rates per iteration are
// stated beside the functions in MachineLoops.
struct MachineLoops {
  uint64_t (*read)(const std::byte* p, size_t n);  // n is a multiple of 128
  uint64_t (*int8)(int64_t iterations);
  double int8_ops_per_iteration;
  float (*f32)(int64_t iterations);
  double f32_flop_per_iteration;
};

uint64_t read_words(const std::byte* p, size_t n) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i + 64 <= n; i += 64) {
    uint64_t words[8];
    std::memcpy(words, p + i, 64);
    for (int j = 0; j < 8; ++j) sum[j] ^= words[j];
  }
  uint64_t all = 0;
  for (const uint64_t s : sum) all ^= s;
  return all;
}

// 32 multiply-adds per iteration, in whatever the compiler makes of them at the baseline.
uint64_t int8_words(int64_t iterations) {
  int32_t sum[32] = {};
  int16_t a[32], b[32];
  for (int16_t i = 0; i < 32; ++i) a[i] = i, b[i] = static_cast<int16_t>(3 - i);
  for (int64_t k = 0; k < iterations; ++k) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int i = 0; i < 32; ++i) sum[i] += a[i] * b[i];
  }
  uint64_t all = 0;
  for (const int32_t s : sum) all ^= static_cast<uint64_t>(static_cast<uint32_t>(s));
  return all;
}

// 32 multiply-adds (unfused: the baseline may have no fma).
float f32_words(int64_t iterations) {
  float x[32];
  for (int i = 0; i < 32; ++i) x[i] = static_cast<float>(i);
  for (int64_t k = 0; k < iterations; ++k)
    for (int i = 0; i < 32; ++i) x[i] = x[i] * 0.999f + 0.5f;
  float all = 0;
  for (const float v : x) all += v;
  return all;
}

constexpr MachineLoops kWords{read_words, int8_words, 64, f32_words, 64};

#if defined(__x86_64__)

__attribute__((target("avx2"))) uint64_t read_avx2(const std::byte* p, size_t n) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i + 128 <= n; i += 128) {
    const auto* q = reinterpret_cast<const __m256i*>(p + i);
    a = _mm256_xor_si256(a, _mm256_load_si256(q));
    b = _mm256_xor_si256(b, _mm256_load_si256(q + 1));
    c = _mm256_xor_si256(c, _mm256_load_si256(q + 2));
    d = _mm256_xor_si256(d, _mm256_load_si256(q + 3));
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  const __m128i half = _mm_xor_si128(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  return static_cast<uint64_t>(_mm_extract_epi64(half, 0) ^ _mm_extract_epi64(half, 1));
}

// Six chains of maddubs, madd and add; the barrier keeps the compiler from taking the products out of the loop.
__attribute__((target("avx2"))) uint64_t int8_avx2(int64_t iterations) {
  __m256i acc0 = _mm256_setzero_si256(), acc1 = acc0, acc2 = acc0, acc3 = acc0, acc4 = acc0, acc5 = acc0;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i x = _mm256_set1_epi8(3), w0 = _mm256_set1_epi8(1), w1 = _mm256_set1_epi8(2);
#define CARAVAN_STEP(acc, w) acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), one))
  for (int64_t k = 0; k < iterations; ++k) {
    asm volatile("" : "+x"(w0), "+x"(w1), "+x"(x));
    CARAVAN_STEP(acc0, w0);
    CARAVAN_STEP(acc1, w1);
    asm volatile("" : "+x"(w0), "+x"(w1), "+x"(x));
    CARAVAN_STEP(acc2, w0);
    CARAVAN_STEP(acc3, w1);
    asm volatile("" : "+x"(w0), "+x"(w1), "+x"(x));
    CARAVAN_STEP(acc4, w0);
    CARAVAN_STEP(acc5, w1);
  }
#undef CARAVAN_STEP
  acc0 = _mm256_add_epi32(_mm256_add_epi32(acc0, acc1), _mm256_add_epi32(acc2, acc3));
  acc0 = _mm256_add_epi32(acc0, _mm256_add_epi32(acc4, acc5));
  return static_cast<uint64_t>(_mm256_extract_epi64(acc0, 0));
}

__attribute__((target("avx2,fma"))) float f32_avx2(int64_t iterations) {
  __m256 x[12];
  for (int i = 0; i < 12; ++i) x[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 m = _mm256_set1_ps(0.999f), a = _mm256_set1_ps(0.5f);
  for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = _mm256_fmadd_ps(x[i], m, a);
  for (int i = 1; i < 12; ++i) x[0] = _mm256_add_ps(x[0], x[i]);
  return _mm256_cvtss_f32(x[0]);
}

constexpr MachineLoops kAvx2{read_avx2, int8_avx2, 6 * 32 * 2, f32_avx2, 12 * 8 * 2};

#elif defined(__aarch64__)

uint64_t read_neon(const std::byte* p, size_t n) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(p);
  uint8x16_t sum[8];
  for (auto& s : sum) s = vdupq_n_u8(0);
  for (size_t i = 0; i + 128 <= n; i += 128)
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) sum[j] = veorq_u8(sum[j], vld1q_u8(bytes + i + 16 * j));
  for (size_t j = 1; j < 8; ++j) sum[0] = veorq_u8(sum[0], sum[j]);
  const uint64x2_t all = vreinterpretq_u64_u8(sum[0]);
  return vgetq_lane_u64(all, 0) ^ vgetq_lane_u64(all, 1);
}

// Twelve chains of 16-bit multiply-accumulates of 8 bytes.
uint64_t int8_neon(int64_t iterations) {
  int16x8_t acc[12];
  for (auto& a : acc) a = vdupq_n_s16(0);
  int8x8_t x = vdup_n_s8(3), w = vdup_n_s8(1);
  for (int64_t k = 0; k < iterations; ++k) {
    asm volatile("" : "+w"(x), "+w"(w));
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = vmlal_s8(acc[i], x, w);
  }
  for (int i = 1; i < 12; ++i) acc[0] = vaddq_s16(acc[0], acc[i]);
  return static_cast<uint64_t>(vaddlvq_s16(acc[0]));
}

// Twelve chains of sdot: 16 multiply-adds each.
__attribute__((target("arch=armv8.2-a+dotprod"))) uint64_t int8_neon_dot(int64_t iterations) {
  int32x4_t acc[12];
  for (auto& a : acc) a = vdupq_n_s32(0);
  int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(1);
  for (int64_t k = 0; k < iterations; ++k) {
    asm volatile("" : "+w"(x), "+w"(w));
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = vdotq_s32(acc[i], x, w);
  }
  for (int i = 1; i < 12; ++i) acc[0] = vaddq_s32(acc[0], acc[i]);
  return static_cast<uint64_t>(vaddlvq_s32(acc[0]));
}

float f32_neon(int64_t iterations) {
  float32x4_t x[12];
  for (int i = 0; i < 12; ++i) x[i] = vdupq_n_f32(static_cast<float>(i));
  const float32x4_t m = vdupq_n_f32(0.999f), a = vdupq_n_f32(0.5f);
  for (int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = vfmaq_f32(a, x[i], m);
  for (int i = 1; i < 12; ++i) x[0] = vaddq_f32(x[0], x[i]);
  return vaddvq_f32(x[0]);
}

constexpr MachineLoops kNeon{read_neon, int8_neon, 12 * 8 * 2, f32_neon, 12 * 4 * 2};
constexpr MachineLoops kNeonDot{read_neon, int8_neon_dot, 12 * 16 * 2, f32_neon, 12 * 4 * 2};

#endif

const MachineLoops& best_loops() {
  const auto isas = supported_isas();
  [[maybe_unused]] const auto has = [&](Isa isa) { return std::find(isas.begin(), isas.end(), isa) != isas.end(); };
#if defined(__x86_64__)
  if (has(Isa::avx2)) return kAvx2;
#elif defined(__aarch64__)
  return has(Isa::neon_dot) ? kNeonDot : kNeon;
#endif
  return kWords;
}

// Ordinary memory, for which no huge pages are asked: what a plain program reads at best. Weights lie in huge pages
// where the system gives them, and may be read faster than this limit (docs/performance.md).
struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
std::unique_ptr<std::byte[], Free> allocate_small_pages(size_t size) {
  auto* p = static_cast<std::byte*>(std::aligned_alloc(4096, size));
  if (p == nullptr) throw ResourceError("cannot allocate " + std::to_string(size) + " bytes to measure reading");
  return std::unique_ptr<std::byte[], Free>(p);
}

// Runs work(worker) on n_threads new threads at once and returns the wall time in seconds.
template <typename Work>
double seconds_of(int n_threads, const Work& work) {
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < n_threads; ++i) threads.emplace_back(work, i);
  for (auto& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr double kMeasureSeconds = 0.1;  // of one limit

// Iterations of a loop that keep one thread busy for about that long.
template <typename Loop>
int64_t iterations_for(Loop loop) {
  int64_t n = 100'000;
  for (;;) {
    volatile auto sink = loop(n);
    const double s = seconds_of(1, [&](int) { sink = loop(n); });
    if (s > 0.01) return static_cast<int64_t>(static_cast<double>(n) * kMeasureSeconds / s);
    n *= 4;
  }
}

struct alignas(64) Sink {
  volatile uint64_t value;
};

}  // namespace

struct LimitsMeter::State {
  explicit State(int threads)
      : n_threads(threads),
        size(available_memory_bytes() > (size_t{1} << 30) ? size_t{1} << 28 : size_t{1} << 27),
        buffer(allocate_small_pages(size)),
        sinks(static_cast<size_t>(threads)) {
    std::memset(buffer.get(), 1, size);
    int8_iterations = iterations_for(loops.int8);
    f32_iterations = iterations_for(loops.f32);
    const double s = read_seconds(1);
    n_reads = std::max(1, static_cast<int>(kMeasureSeconds / s));
  }

  size_t part() const { return size / static_cast<size_t>(n_threads) / 4096 * 4096; }  // of a thread
  volatile uint64_t& sink(int worker) { return sinks[static_cast<size_t>(worker)].value; }
  double read_seconds(int times) {
    return seconds_of(n_threads, [&](int i) {
      for (int n = 0; n < times; ++n) sink(i) = loops.read(buffer.get() + part() * static_cast<size_t>(i), part());
    });
  }

  const MachineLoops& loops = best_loops();
  int n_threads;
  size_t size;
  std::unique_ptr<std::byte[], Free> buffer;
  std::vector<Sink> sinks;
  int64_t int8_iterations = 0, f32_iterations = 0;
  int n_reads = 1;
};

LimitsMeter::LimitsMeter(int n_threads) : state_(std::make_unique<State>(n_threads)) {}
LimitsMeter::~LimitsMeter() = default;

MachineLimits LimitsMeter::measure() const {
  State& s = *state_;
  const double threads = s.n_threads;
  const double read = s.read_seconds(s.n_reads);
  const double int8 = seconds_of(s.n_threads, [&](int i) { s.sink(i) = s.loops.int8(s.int8_iterations); });
  const double f32 =
      seconds_of(s.n_threads, [&](int i) { s.sink(i) = static_cast<uint64_t>(s.loops.f32(s.f32_iterations) > 0); });
  return {static_cast<double>(s.part()) * threads * s.n_reads / read,
          threads * static_cast<double>(s.int8_iterations) * s.loops.int8_ops_per_iteration / int8,
          threads * static_cast<double>(s.f32_iterations) * s.loops.f32_flop_per_iteration / f32};
}

MachineLimits measure_limits(int n_threads) {
  const LimitsMeter meter(n_threads);
  MachineLimits best{};
  for (int run = 0; run < 5; ++run) {
    const MachineLimits now = meter.measure();
    best.read_bytes_per_s = std::max(best.read_bytes_per_s, now.read_bytes_per_s);
    best.int8_ops_per_s = std::max(best.int8_ops_per_s, now.int8_ops_per_s);
    best.f32_flop_per_s = std::max(best.f32_flop_per_s, now.f32_flop_per_s);
  }
  return best;
}

}  // namespace caravan::device::cpu
