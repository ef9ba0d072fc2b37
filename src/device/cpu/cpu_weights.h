// Weights of the CPU device: matrices in panels of 16 rows, vectors as f32, embeddings as raw GGUF rows.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "device/cpu/kernels/kernels.h"
#include "device/cpu/memory_account.h"
#include "device/device.h"

namespace caravan::device::cpu {

// Bytes that a weight takes. Throws NotSupportedError (type) or FormatError (row length no multiple of the block).
uint64_t cpu_weight_bytes(const graph::WeightSpec& spec);

class CpuWeightSet final : public WeightSet {
 public:
  CpuWeightSet(std::vector<graph::WeightSpec> specs, std::shared_ptr<MemoryAccount> account);

  std::span<const graph::WeightSpec> specs() const override { return specs_; }
  uint64_t size_bytes() const override { return memory_.size(); }
  void upload(size_t index, uint64_t offset, std::span<const std::byte> bytes) override;
  void finish() override;

  bool finished() const { return finished_; }
  // Index of the weight, or -1.
  int find(const std::string& name, graph::WeightRole role) const;
  const std::byte* data(size_t index) const { return memory_.data() + offsets_[index]; }
  // One expert's matrix (0 for a matrix without experts).
  PackedMatrix matrix(size_t index, int64_t expert) const;

 private:
  // Where the upload of one weight stands.
  struct Progress {
    uint64_t received = 0;           // bytes of the tensor
    uint64_t consumed = 0;           // bytes converted; the rest waits in pending
    std::vector<std::byte> pending;  // the beginning of the next unit
  };
  uint64_t unit_bytes(size_t index) const;
  void convert(size_t index, const std::byte* bytes, uint64_t n_bytes);

  std::vector<graph::WeightSpec> specs_;
  std::vector<uint64_t> offsets_;
  std::vector<Progress> progress_;
  std::map<std::pair<std::string, graph::WeightRole>, int> index_;
  AccountedMemory memory_;
  bool finished_ = false;
};

}  // namespace caravan::device::cpu
