// Times the CPU kernels alone, one thread unless said otherwise, on every instruction set of this processor.
// Counters: bytes_per_second for what streams memory (weights or cache, as packed), ops_per_second (a multiply and an
// add are two) for products. Compare with the limits printed first; docs/performance.md explains the figures.
//   bench_kernels --benchmark_filter=mul_mat/avx2
#include <benchmark/benchmark.h>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "base/memory.h"
#include "device/cpu/kernels/kernels.h"
#include "device/cpu/limits.h"

namespace caravan::device::cpu {
namespace {

using tensor::DType;

constexpr int64_t kEmbd = 2048;

// Packed weights from random bytes, with every scale a small normal number so that no arithmetic is slow.
struct Weights {
  AnonymousMemory memory;
  PackedMatrix matrix;

  Weights(DType dtype, int64_t n_in, int64_t n_out) : memory(packed_bytes(dtype, n_in, n_out)) {
    const tensor::DTypeInfo& info = tensor::dtype_info(dtype);
    const auto row_bytes = tensor::row_bytes(dtype, static_cast<uint64_t>(n_in));
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    std::vector<float> row(static_cast<size_t>(n_in));
    for (float& x : row) x = normal(engine);
    std::vector<std::byte> panel(row_bytes * kPanelRows);
    for (size_t j = 0; j < static_cast<size_t>(kPanelRows); ++j)
      info.quantize(row.data(), panel.data() + j * row_bytes, n_in);
    for (int64_t j = 0; j < n_out; j += kPanelRows) pack(dtype, n_in, panel.data(), j, kPanelRows, memory.data());
    matrix = {dtype, n_in, n_out, memory.data()};
  }
};

// One activation row repeated.
std::vector<ActivationBlock> make_activations(const Kernels& kernels, DType dtype, int64_t n_in, int64_t n_rows) {
  std::vector<float> x(static_cast<size_t>(n_in));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.3f;
  const size_t row_bytes = activation_row_bytes(activation_kind(dtype), n_in);
  std::vector<ActivationBlock> blocks(row_bytes * static_cast<size_t>(n_rows) / sizeof(ActivationBlock) + 1);
  for (int64_t row = 0; row < n_rows; ++row) {
    std::byte* out = reinterpret_cast<std::byte*>(blocks.data()) + row_bytes * static_cast<size_t>(row);
    if (activation_kind(dtype) == ActivationKind::q8)
      kernels.quantize_row(x.data(), n_in, reinterpret_cast<ActivationBlock*>(out));
    else
      std::copy(x.begin(), x.end(), reinterpret_cast<float*>(out));
  }
  return blocks;
}

// From memory: weights of 256 MiB, beyond every cache. From cache: 8 panels, which shows the arithmetic alone.
// Layer: the rows of a feed-forward matrix.
enum class Size { memory, cache, layer };
void mul_mat(benchmark::State& state, Isa isa, DType dtype, int64_t n_rows, Size size) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t panels = size == Size::memory
                             ? (int64_t{256} << 20) / static_cast<int64_t>(packed_panel_bytes(dtype, kEmbd))
                         : size == Size::cache ? 8
                                               : 5632 / kPanelRows;
  const int64_t n_out = panels * kPanelRows;
  const Weights weights(dtype, kEmbd, n_out);
  const auto activations = make_activations(kernels, dtype, kEmbd, n_rows);
  const size_t stride = activation_row_bytes(activation_kind(dtype), kEmbd);
  std::vector<float> out(static_cast<size_t>(n_out * n_rows));
  for (auto _ : state) {
    kernels.mul_mat(weights.matrix, 0, panels, activations.data(), stride, n_rows, out.data(), n_out);
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(packed_bytes(dtype, kEmbd, n_out)));
  state.counters["ops"] = benchmark::Counter(2.0 * static_cast<double>(kEmbd * n_out * n_rows),
                                             benchmark::Counter::kIsIterationInvariantRate);
}

void attention(benchmark::State& state, Isa isa, DType dtype, int64_t n_rows, int64_t context) {
  const Kernels& kernels = kernels_for(isa);
  constexpr int64_t kHeads = 32, kHeadsKv = 4, kDim = 64, kBlock = 64;
  const KvLayout keys{KvKind::keys, dtype, kBlock, kHeadsKv, kDim},
      values{KvKind::values, dtype, kBlock, kHeadsKv, kDim};
  const auto n_blocks = static_cast<size_t>((context + kBlock - 1) / kBlock);
  AnonymousMemory key_cache(n_blocks * kv_block_bytes(keys)), value_cache(n_blocks * kv_block_bytes(values));
  std::vector<int32_t> blocks(n_blocks), from(static_cast<size_t>(n_rows), 0), to;
  for (size_t i = 0; i < n_blocks; ++i) blocks[i] = static_cast<int32_t>(i);
  for (int64_t r = 0; r < n_rows; ++r) to.push_back(static_cast<int32_t>(context - n_rows + r + 1));
  std::vector<float> row(kHeads * kDim, 0.1f), q(static_cast<size_t>(n_rows) * kHeads * kDim, 0.1f), out(q.size());
  for (int64_t t = 0; t < context; ++t) {
    kernels.kv_store(keys, key_cache.data(), blocks.data(), t, row.data());
    kernels.kv_store(values, value_cache.data(), blocks.data(), t, row.data());
  }
  AnonymousMemory scratch(attention_scratch_bytes(kDim, kDim));
  const AttentionArgs args{.q = q.data(),
                           .q_stride = kHeads * kDim,
                           .out = out.data(),
                           .out_stride = kHeads * kDim,
                           .n_head = kHeads,
                           .keys = keys,
                           .values = values,
                           .key_cache = key_cache.data(),
                           .value_cache = value_cache.data(),
                           .blocks = blocks.data(),
                           .visible_from = from.data(),
                           .visible_to = to.data(),
                           .scale = 0.125f,
                           .softcap = 0,
                           .sinks = nullptr};
  for (auto _ : state) {
    for (int64_t head = 0; head < kHeadsKv; ++head) kernels.attention(args, 0, n_rows, head, scratch.data());
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(key_cache.size() + value_cache.size()));
  double seen = 0;
  for (const int32_t t : to) seen += t;
  state.counters["ops"] = benchmark::Counter(4.0 * seen * kHeads * kDim, benchmark::Counter::kIsIterationInvariantRate);
}

using RowOp = void (*)(const Kernels&, const float* x, const float* w, int64_t n, float* out);
void row_op(benchmark::State& state, Isa isa, RowOp op) {
  std::vector<float> x(5632, 0.5f), w(5632, 1.5f), out(x.size() * 2);
  for (auto _ : state) {
    op(kernels_for(isa), x.data(), w.data(), static_cast<int64_t>(x.size()), out.data());
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<int64_t>(x.size()));
}

// Repacking a matrix of 64 MiB of GGUF bytes.
void packing(benchmark::State& state, DType dtype) {
  const auto row_bytes = tensor::row_bytes(dtype, kEmbd);
  const auto n_out = static_cast<int64_t>((size_t{64} << 20) / row_bytes / kPanelRows * kPanelRows);
  AnonymousMemory rows(row_bytes * static_cast<size_t>(n_out)), packed(packed_bytes(dtype, kEmbd, n_out));
  for (auto _ : state) {
    pack(dtype, kEmbd, rows.data(), 0, n_out, packed.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(rows.size()));
}

void register_all() {
  const auto add = [](const std::string& name, auto... arguments) {
    benchmark::RegisterBenchmark(name.c_str(), arguments...)->Unit(benchmark::kMicrosecond);
  };
  constexpr DType kTypes[] = {DType::q4_0, DType::q4_1, DType::q5_0, DType::q8_0, DType::q2_k,
                              DType::q3_k, DType::q4_k, DType::q5_k, DType::q6_k, DType::iq4_xs,
                              DType::f16,  DType::bf16, DType::f32};
  constexpr std::pair<const char*, RowOp> kRowOps[] = {
      {"quantize_row", [](auto& k, auto* x, auto*, auto n,
                          auto* out) { k.quantize_row(x, n, reinterpret_cast<ActivationBlock*>(out)); }},
      {"rms_norm", [](auto& k, auto* x, auto* w, auto n, auto* out) { k.rms_norm(x, w, n, 1e-5f, out); }},
      {"silu_mul", [](auto& k, auto* x, auto* w, auto n, auto* out) { k.silu_mul(x, w, n, out); }},
      {"softmax", [](auto& k, auto* x, auto*, auto n, auto* out) { k.softmax(x, n, out); }},
  };
  for (const Isa isa : supported_isas()) {
    const std::string isa_part = "/" + std::string(isa_name(isa)) + "/";
    for (const DType dtype : kTypes) {
      const std::string name = "mul_mat" + isa_part + std::string(tensor::dtype_name(dtype)) + "/";
      add(name + "1/memory", mul_mat, isa, dtype, 1, Size::memory);
      add(name + "1/cache", mul_mat, isa, dtype, 1, Size::cache);
      add(name + "8/memory", mul_mat, isa, dtype, 8, Size::memory);
      add(name + "8/layer", mul_mat, isa, dtype, 8, Size::layer);
      add(name + "256/layer", mul_mat, isa, dtype, 256, Size::layer);
    }
    for (const DType dtype : {DType::f16, DType::q8_0, DType::f32})
      for (const int64_t n_rows : {1, 256})
        add("attention" + isa_part + std::string(tensor::dtype_name(dtype)) + "/" + std::to_string(n_rows), attention,
            isa, dtype, n_rows, int64_t{4096});
    for (const DType dtype : {DType::f16, DType::q8_0})
      add("attention" + isa_part + std::string(tensor::dtype_name(dtype)) + "/1/memory", attention, isa, dtype, 1,
          int64_t{65536});
    for (const auto& [name, op] : kRowOps) add(name + isa_part + "5632", row_op, isa, op);
  }
  for (const DType dtype : kTypes) add("pack/" + std::string(tensor::dtype_name(dtype)), packing, dtype);
}

}  // namespace
}  // namespace caravan::device::cpu

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const int n_threads : {1, caravan::usable_cpu_count()}) {
    const auto limits = caravan::device::cpu::measure_limits(n_threads);
    std::fprintf(stderr, "limits, %d threads: read %.1f GB/s, int8 %.0f Gop/s, f32 %.0f GFLOP/s\n", n_threads,
                 limits.read_bytes_per_s * 1e-9, limits.int8_ops_per_s * 1e-9, limits.f32_flop_per_s * 1e-9);
  }
  caravan::device::cpu::register_all();
  benchmark::RunSpecifiedBenchmarks();
}
