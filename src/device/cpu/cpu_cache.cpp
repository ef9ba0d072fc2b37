#include "device/cpu/cpu_cache.h"

#include <fmt/format.h>

#include <cstring>

#include "base/error.h"

namespace caravan::device::cpu {
namespace {

using Part = graph::CacheRef::Part;

size_t part_bytes(const CacheSpec& spec, int group, int layer, Part part) {
  return kv_block_bytes(kv_layout(spec, group, layer, part));
}

}  // namespace

KvLayout kv_layout(const CacheSpec& spec, int group, int layer, Part part) {
  const CacheLayer& shape = spec.groups[static_cast<size_t>(group)].layers[static_cast<size_t>(layer)];
  return {part == Part::k ? KvKind::keys : KvKind::values, part == Part::k ? spec.dtype_k : spec.dtype_v,
          spec.block_tokens, shape.n_head_kv, part == Part::k ? shape.head_dim_k : shape.head_dim_v};
}

void check_cache_spec(const CacheSpec& spec) {
  for (const tensor::DType type : {spec.dtype_k, spec.dtype_v})
    if (type != tensor::DType::f32 && type != tensor::DType::f16 && type != tensor::DType::q8_0)
      throw NotSupportedError(fmt::format("KV cache of type {}; supported: F32, F16, Q8_0", tensor::dtype_name(type)));
  const int tokens = spec.block_tokens;
  if (tokens < 16 || tokens % 16 != 0 || (kAttentionSpan % tokens != 0 && tokens % kAttentionSpan != 0))
    throw NotSupportedError(fmt::format("KV blocks of {} tokens; supported: 16, 32, 64, 128, 256, 512, ...", tokens));
  for (const CacheGroup& group : spec.groups) {
    if (group.n_blocks < 0 || group.n_blocks > INT32_MAX / tokens)
      throw NotSupportedError(fmt::format("cache group '{}' of {} blocks", group.name, group.n_blocks));
    for (const CacheLayer& layer : group.layers)
      if (layer.n_head_kv < 1 || layer.head_dim_k < 8 || layer.head_dim_k % 8 != 0 || layer.head_dim_v < 8 ||
          layer.head_dim_v % 8 != 0)
        throw NotSupportedError(fmt::format("KV heads {} of {} and {} values; head sizes must be multiples of 8",
                                            layer.n_head_kv, layer.head_dim_k, layer.head_dim_v));
  }
}

uint64_t cpu_cache_block_bytes(const CacheSpec& spec, int group) {
  check_cache_spec(spec);
  uint64_t bytes = 0;
  for (size_t layer = 0; layer < spec.groups[static_cast<size_t>(group)].layers.size(); ++layer)
    for (const Part part : {Part::k, Part::v}) bytes += part_bytes(spec, group, static_cast<int>(layer), part);
  return bytes;
}

uint64_t cpu_cache_bytes(const CacheSpec& spec) {
  uint64_t bytes = 0;
  for (size_t group = 0; group < spec.groups.size(); ++group)
    bytes += cpu_cache_block_bytes(spec, static_cast<int>(group)) * static_cast<uint64_t>(spec.groups[group].n_blocks);
  return bytes;
}

CpuCache::CpuCache(const CacheSpec& spec, std::shared_ptr<MemoryAccount> account)
    : spec_(spec), memory_(std::move(account), cpu_cache_bytes(spec), "KV cache"), parts_(spec.groups.size()) {
  std::byte* next = memory_.data();
  for (size_t group = 0; group < spec.groups.size(); ++group)
    for (size_t layer = 0; layer < spec.groups[group].layers.size(); ++layer)
      for (const graph::CacheRef::Part kind : {graph::CacheRef::Part::k, graph::CacheRef::Part::v}) {
        Part part;
        part.layout = kv_layout(spec, static_cast<int>(group), static_cast<int>(layer), kind);
        part.block_bytes = kv_block_bytes(part.layout);
        part.data = next;
        next += part.block_bytes * static_cast<size_t>(spec.groups[group].n_blocks);
        parts_[group].push_back(part);
      }
}

void CpuCache::check_block(int group, int32_t block) const {
  if (group < 0 || static_cast<size_t>(group) >= parts_.size() || block < 0 ||
      block >= spec_.groups[static_cast<size_t>(group)].n_blocks)
    throw RequestError(fmt::format("cache group {} has no block {}", group, block));
}

void CpuCache::copy_block(int group, int32_t from, int32_t to) {
  check_block(group, from);
  check_block(group, to);
  if (from == to) return;
  for (const Part& part : parts_[static_cast<size_t>(group)])
    std::memcpy(part.data + part.block_bytes * static_cast<size_t>(to),
                part.data + part.block_bytes * static_cast<size_t>(from), part.block_bytes);
}

void CpuCache::read_block(int group, int32_t block, std::span<std::byte> out) const {
  check_block(group, block);
  CARAVAN_ASSERT(out.size() == block_bytes(group), "the caller sizes the span by block_bytes()");
  std::byte* next = out.data();
  for (const Part& part : parts_[static_cast<size_t>(group)]) {
    std::memcpy(next, part.data + part.block_bytes * static_cast<size_t>(block), part.block_bytes);
    next += part.block_bytes;
  }
}

void CpuCache::write_block(int group, int32_t block, std::span<const std::byte> in) {
  check_block(group, block);
  if (in.size() != block_bytes(group))
    throw RequestError(fmt::format("KV block of {} bytes, expected {}", in.size(), block_bytes(group)));
  const std::byte* next = in.data();
  for (const Part& part : parts_[static_cast<size_t>(group)]) {
    std::memcpy(part.data + part.block_bytes * static_cast<size_t>(block), next, part.block_bytes);
    next += part.block_bytes;
  }
}

}  // namespace caravan::device::cpu
