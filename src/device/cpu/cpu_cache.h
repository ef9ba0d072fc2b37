// Paged K and V of the CPU device: per group, layer and part an array of physical blocks in the kernels' layout.
#pragma once

#include <memory>
#include <vector>

#include "device/cpu/kernels/kernels.h"
#include "device/cpu/memory_account.h"
#include "device/device.h"

namespace caravan::device::cpu {

// Throws NotSupportedError for a dtype, block size or head size that the kernels cannot hold.
void check_cache_spec(const CacheSpec& spec);
uint64_t cpu_cache_block_bytes(const CacheSpec& spec, int group);
uint64_t cpu_cache_bytes(const CacheSpec& spec);
KvLayout kv_layout(const CacheSpec& spec, int group, int layer, graph::CacheRef::Part part);

class CpuCache final : public Cache {
 public:
  CpuCache(const CacheSpec& spec, std::shared_ptr<MemoryAccount> account);

  const CacheSpec& spec() const override { return spec_; }
  uint64_t size_bytes() const override { return memory_.size(); }
  uint64_t block_bytes(int group) const override { return cpu_cache_block_bytes(spec_, group); }
  void copy_block(int group, int32_t from, int32_t to) override;
  void read_block(int group, int32_t block, std::span<std::byte> out) const override;
  void write_block(int group, int32_t block, std::span<const std::byte> in) override;

  // The blocks of one part of a layer.
  struct Part {
    KvLayout layout{};
    size_t block_bytes = 0;
    std::byte* data = nullptr;
  };
  const Part& part(const graph::CacheRef& ref) const {
    return parts_[static_cast<size_t>(ref.group)]
                 [static_cast<size_t>(ref.layer) * 2 + (ref.part == graph::CacheRef::Part::v ? 1 : 0)];
  }

 private:
  void check_block(int group, int32_t block) const;

  CacheSpec spec_;
  AccountedMemory memory_;
  std::vector<std::vector<Part>> parts_;  // per group: K and V of layer 0, of layer 1, ...
};

}  // namespace caravan::device::cpu
