#include "device/cpu/cpu_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <mutex>

#include "base/error.h"

namespace caravan::device::cpu {

CpuDevice::CpuDevice(int n_threads, Isa isa, uint64_t memory_cap_bytes)
    : engine_(n_threads, kernels_for(isa)), account_(std::make_shared<MemoryAccount>(memory_cap_bytes)) {}

DeviceInfo CpuDevice::info() const {
  DeviceInfo info;
  info.name = "CPU";
  info.kind = "cpu";
  info.description = fmt::format("{}, {}", cpu_model_name(), isa_name(engine_.kernels.isa));
  info.memory_total = account_->total();
  info.memory_free = account_->available();
  info.numeric_class = kNumericClass;
  info.n_threads = engine_.pool.n_threads();
  return info;
}

bool CpuDevice::supports(graph::Op op, tensor::DType weight_dtype) const {
  switch (op) {
    case graph::Op::get_rows:
    case graph::Op::mul_mat:
    case graph::Op::mul_mat_id:
    case graph::Op::moe:
      return tensor::can_dequantize(weight_dtype);
    default:
      return true;
  }
}

uint64_t CpuDevice::weight_bytes(const graph::WeightSpec& spec) const { return cpu_weight_bytes(spec); }
uint64_t CpuDevice::cache_bytes(const CacheSpec& spec) const { return cpu_cache_bytes(spec); }
uint64_t CpuDevice::cache_block_bytes(const CacheSpec& spec, int group) const {
  return cpu_cache_block_bytes(spec, group);
}

uint64_t CpuDevice::scratch_bytes(const graph::Graph& graph, const CacheSpec& cache, const RunLimits& limits) const {
  return CpuPlan(graph, limits, &cache, engine_.pool.n_threads()).scratch_bytes();
}

std::shared_ptr<WeightSet> CpuDevice::create_weights(std::vector<graph::WeightSpec> specs) {
  return std::make_shared<CpuWeightSet>(std::move(specs), account_);
}

std::shared_ptr<Cache> CpuDevice::create_cache(const CacheSpec& spec) {
  check_cache_spec(spec);
  return std::make_shared<CpuCache>(spec, account_);
}

std::unique_ptr<Executable> CpuDevice::compile(const graph::Graph& graph, std::shared_ptr<const WeightSet> weights,
                                               std::shared_ptr<Cache> cache, const RunLimits& limits) {
  graph::validate(graph);
  CARAVAN_ASSERT(limits.max_rows >= 1 && limits.max_output_rows >= 0 && limits.max_context >= 0,
                 "limits come from a checked configuration");
  auto cpu_weights = std::dynamic_pointer_cast<const CpuWeightSet>(std::move(weights));
  auto cpu_cache = std::dynamic_pointer_cast<CpuCache>(std::move(cache));
  CARAVAN_ASSERT(cpu_weights == nullptr || cpu_weights->finished(), "weights are finished before a graph uses them");
  auto executable =
      std::make_unique<CpuExecutable>(graph, std::move(cpu_weights), std::move(cpu_cache), limits, engine_, account_);
  n_compiled_.fetch_add(1, std::memory_order_relaxed);
  return executable;
}

void CpuDevice::rank(std::span<Ranking> rows) {
  const auto rank_row = [&](Ranking& row) {
    const auto n = static_cast<int64_t>(row.logits.size());
    if (n == 0) return;
    const auto k = static_cast<int32_t>(row.best.size());
    row.log_sum_exp = engine_.kernels.log_sum_exp(row.logits.data(), n);
    if (k > 0) engine_.kernels.top_k(row.logits.data(), n, k, row.best.data());
  };
  // One row is sooner done than threads are called, and all are than another session's run ends.
  std::unique_lock lock(engine_.run_mutex, std::defer_lock);
  if (rows.size() < 2 || !lock.try_lock()) {
    std::for_each(rows.begin(), rows.end(), rank_row);
    return;
  }
  engine_.pool.run([&](int worker) {
    const auto part = split_work(static_cast<int64_t>(rows.size()), worker, engine_.pool.n_threads());
    for (int64_t row = part.begin; row < part.end; ++row) rank_row(rows[static_cast<size_t>(row)]);
  });
}

}  // namespace caravan::device::cpu
