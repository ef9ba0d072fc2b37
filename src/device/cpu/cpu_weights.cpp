#include "device/cpu/cpu_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/bytes.h"
#include "base/error.h"

namespace caravan::device::cpu {
namespace {

using graph::WeightRole;
using graph::WeightSpec;

constexpr uint64_t kAlignment = 64;

uint64_t align(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

uint64_t raw_bytes(const WeightSpec& spec) {
  return tensor::row_bytes(spec.dtype, static_cast<uint64_t>(tensor::n_elements(spec.ne)));
}

void check(const WeightSpec& spec) {
  const auto& info = tensor::dtype_info(spec.dtype);
  if (!tensor::can_dequantize(spec.dtype))
    throw NotSupportedError(fmt::format("tensor '{}': type {} is not supported", spec.name, info.name));
  uint64_t count = 1;
  for (const int64_t dim : spec.ne) {
    if (dim < 1) throw FormatError(fmt::format("tensor '{}': dimension {}", spec.name, dim));
    count = checked_multiply(count, static_cast<uint64_t>(dim), spec.name);
  }
  checked_multiply(count, 8, spec.name);
  if (spec.ne[0] % info.block_length != 0)
    throw FormatError(fmt::format("tensor '{}': rows of {} values; type {} needs a multiple of {}", spec.name,
                                  spec.ne[0], info.name, info.block_length));
}

uint64_t expert_bytes(const WeightSpec& spec) { return align(packed_bytes(spec.dtype, spec.ne[0], spec.ne[1])); }

uint64_t total_bytes(const std::vector<WeightSpec>& specs) {
  uint64_t total = 0;
  for (const WeightSpec& spec : specs) total = checked_add(total, cpu_weight_bytes(spec), spec.name);
  return total;
}

}  // namespace

uint64_t cpu_weight_bytes(const WeightSpec& spec) {
  check(spec);
  switch (spec.role) {
    case WeightRole::matrix:
      return expert_bytes(spec) * static_cast<uint64_t>(spec.ne[2] * spec.ne[3]);
    case WeightRole::vector:
      return align(static_cast<uint64_t>(tensor::n_elements(spec.ne)) * sizeof(float));
    case WeightRole::embedding:
      return align(raw_bytes(spec));
  }
  return 0;
}

CpuWeightSet::CpuWeightSet(std::vector<WeightSpec> specs, std::shared_ptr<MemoryAccount> account)
    : specs_(std::move(specs)), progress_(specs_.size()), memory_(std::move(account), total_bytes(specs_), "weights") {
  uint64_t offset = 0;
  for (size_t i = 0; i < specs_.size(); ++i) {
    offsets_.push_back(offset);
    offset += cpu_weight_bytes(specs_[i]);
    if (!index_.emplace(std::pair(specs_[i].name, specs_[i].role), static_cast<int>(i)).second)
      throw FormatError(fmt::format("tensor '{}' is listed twice as {}", specs_[i].name, to_string(specs_[i].role)));
  }
}

int CpuWeightSet::find(const std::string& name, WeightRole role) const {
  const auto found = index_.find({name, role});
  return found == index_.end() ? -1 : found->second;
}

PackedMatrix CpuWeightSet::matrix(size_t index, int64_t expert) const {
  const WeightSpec& spec = specs_[index];
  return {spec.dtype, spec.ne[0], spec.ne[1], data(index) + expert_bytes(spec) * static_cast<uint64_t>(expert)};
}

// The next bytes that are converted together: a panel of rows, a block of values, or any byte.
uint64_t CpuWeightSet::unit_bytes(size_t index) const {
  const WeightSpec& spec = specs_[index];
  if (spec.role == WeightRole::embedding) return 1;
  if (spec.role == WeightRole::vector) return tensor::dtype_info(spec.dtype).block_bytes;
  const uint64_t row = tensor::row_bytes(spec.dtype, static_cast<uint64_t>(spec.ne[0]));
  const auto first = static_cast<int64_t>(progress_[index].consumed / row) % spec.ne[1];
  return row * static_cast<uint64_t>(std::min(kPanelRows, spec.ne[1] - first));
}

// Converts whole units that lie within one expert.
void CpuWeightSet::convert(size_t index, const std::byte* bytes, uint64_t n_bytes) {
  const WeightSpec& spec = specs_[index];
  const auto& info = tensor::dtype_info(spec.dtype);
  Progress& progress = progress_[index];
  std::byte* const out = memory_.data() + offsets_[index];
  if (spec.role == WeightRole::embedding) {
    std::memcpy(out + progress.consumed, bytes, n_bytes);
  } else if (spec.role == WeightRole::vector) {
    const uint64_t first = progress.consumed / info.block_bytes * info.block_length;
    info.dequantize(bytes, reinterpret_cast<float*>(out) + first,
                    static_cast<int64_t>(n_bytes / info.block_bytes * info.block_length));
  } else {
    const uint64_t row = tensor::row_bytes(spec.dtype, static_cast<uint64_t>(spec.ne[0]));
    const auto first = static_cast<int64_t>(progress.consumed / row);
    pack(spec.dtype, spec.ne[0], bytes, first % spec.ne[1], static_cast<int64_t>(n_bytes / row),
         out + expert_bytes(spec) * static_cast<uint64_t>(first / spec.ne[1]));
  }
  progress.consumed += n_bytes;
}

void CpuWeightSet::upload(size_t index, uint64_t offset, std::span<const std::byte> bytes) {
  CARAVAN_ASSERT(!finished_ && index < specs_.size(), "upload comes before finish and names a weight of the set");
  const WeightSpec& spec = specs_[index];
  Progress& progress = progress_[index];
  if (offset != progress.received)
    throw FormatError(
        fmt::format("tensor '{}': bytes at offset {} arrived, expected {}", spec.name, offset, progress.received));
  if (bytes.size() > raw_bytes(spec) - progress.received)
    throw FormatError(
        fmt::format("tensor '{}': offset {} + {} bytes > size {}", spec.name, offset, bytes.size(), raw_bytes(spec)));
  progress.received += bytes.size();
  while (!bytes.empty()) {
    const uint64_t unit = unit_bytes(index);
    if (progress.pending.empty() && bytes.size() >= unit) {
      // Units of full panels are alike, so that many can go at once; the last panel of an expert goes alone.
      uint64_t n = unit;
      if (spec.role != WeightRole::matrix) {
        n = bytes.size() / unit * unit;
      } else if (unit == tensor::row_bytes(spec.dtype, static_cast<uint64_t>(spec.ne[0])) * kPanelRows) {
        const uint64_t panels_left = (static_cast<uint64_t>(spec.ne[1]) * (unit / kPanelRows) -
                                      progress.consumed % (spec.ne[1] * (unit / kPanelRows))) /
                                     unit;
        n = std::min(bytes.size() / unit, panels_left) * unit;
      }
      convert(index, bytes.data(), n);
      bytes = bytes.subspan(n);
      continue;
    }
    const size_t take = std::min<size_t>(bytes.size(), unit - progress.pending.size());
    progress.pending.insert(progress.pending.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(take));
    bytes = bytes.subspan(take);
    if (progress.pending.size() < unit) continue;
    convert(index, progress.pending.data(), unit);
    progress.pending.clear();
  }
  if (progress.pending.empty()) progress.pending.shrink_to_fit();
}

void CpuWeightSet::finish() {
  for (size_t i = 0; i < specs_.size(); ++i)
    if (progress_[i].consumed != raw_bytes(specs_[i]))
      throw FormatError(fmt::format("tensor '{}' is not complete: expected {} bytes, found {}", specs_[i].name,
                                    raw_bytes(specs_[i]), progress_[i].received));
  progress_.clear();
  finished_ = true;
}

}  // namespace caravan::device::cpu
