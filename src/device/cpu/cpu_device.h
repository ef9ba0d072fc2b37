// The CPU as a device: kernels of one instruction set, a thread pool, and a memory cap.
#pragma once

#include <atomic>
#include <memory>

#include "base/cpu_features.h"
#include "device/cpu/executable.h"
#include "device/device.h"

namespace caravan::device::cpu {

class CpuDevice final : public Device {
 public:
  // isa must be one of supported_isas() (select_isa() gives the usual one). memory_cap_bytes counts weights, KV caches
  // and scratch; 0: what the machine has.
  CpuDevice(int n_threads, Isa isa, uint64_t memory_cap_bytes);

  DeviceInfo info() const override;
  bool supports(graph::Op op, tensor::DType weight_dtype) const override;
  uint64_t weight_bytes(const graph::WeightSpec& spec) const override;
  uint64_t cache_bytes(const CacheSpec& spec) const override;
  uint64_t cache_block_bytes(const CacheSpec& spec, int group) const override;
  uint64_t scratch_bytes(const graph::Graph& graph, const CacheSpec& cache, const RunLimits& limits) const override;
  std::shared_ptr<WeightSet> create_weights(std::vector<graph::WeightSpec> specs) override;
  std::shared_ptr<Cache> create_cache(const CacheSpec& spec) override;
  std::unique_ptr<Executable> compile(const graph::Graph& graph, std::shared_ptr<const WeightSet> weights,
                                      std::shared_ptr<Cache> cache, const RunLimits& limits) override;
  void rank(std::span<Ranking> rows) override;
  uint64_t n_compiled() const override { return n_compiled_.load(std::memory_order_relaxed); }

 private:
  CpuEngine engine_;
  std::shared_ptr<MemoryAccount> account_;
  std::atomic<uint64_t> n_compiled_{0};
};

}  // namespace caravan::device::cpu
