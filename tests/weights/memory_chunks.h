// Tensors of random bytes in memory, their manifest, and a source that holds some of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "weights/source.h"

namespace caravan::weights::testing {

// A manifest of f32 tensors of the given numbers of bytes, with hashes, and the bytes.
struct MemoryTensors {
  explicit MemoryTensors(const std::vector<uint64_t>& sizes, uint32_t seed = 1) {
    std::mt19937 random(seed);
    for (size_t t = 0; t < sizes.size(); ++t) {
      std::vector<std::byte> data(sizes[t]);
      for (std::byte& b : data) b = static_cast<std::byte>(random());
      TensorEntry entry{
          "t" + std::to_string(t), tensor::DType::f32, {static_cast<int64_t>(sizes[t] / 4), 1, 1, 1}, sizes[t], {}};
      for (uint64_t at = 0; at < sizes[t]; at += kChunkBytes)
        entry.chunks.push_back(sha256(std::span(data).subspan(at, std::min(kChunkBytes, sizes[t] - at))));
      manifest.tensors.push_back(std::move(entry));
      bytes.push_back(std::move(data));
    }
  }
  std::vector<ChunkRef> chunks() const {
    std::vector<ChunkRef> all;
    for (const TensorEntry& tensor : manifest.tensors)
      for (uint64_t i = 0; i < n_chunks(tensor.size_bytes); ++i) all.push_back({&tensor, i});
    return all;
  }
  std::span<const std::byte> bytes_of(const ChunkRef& chunk) const {
    const auto t = static_cast<size_t>(chunk.tensor - manifest.tensors.data());
    return std::span(bytes[t]).subspan(chunk.offset(), chunk.size_bytes());
  }
  Manifest manifest;
  std::vector<std::vector<std::byte>> bytes;
};

// Holds the chunks whose number in the manifest is in `held`; delivers wrong bytes for those in `wrong`; throws from
// the fetch number `breaks_at` on.
class PartialSource : public WeightSource {
 public:
  PartialSource(const MemoryTensors& tensors, std::set<size_t> held) : tensors_(tensors), held_(std::move(held)) {}
  bool may_have(const ChunkRef& chunk) override { return claims_all || held_.contains(number(chunk)); }
  void look_for(std::span<const ChunkRef> chunks) override {
    for (const ChunkRef& chunk : chunks) looked_for.push_back(number(chunk));
  }
  int n_fetchers() const override { return fetchers; }
  bool may_be_helped() const override { return is_slow; }
  void announce(std::span<const ChunkRef> chunks) override {
    for (const ChunkRef& chunk : chunks) announced.push_back(number(chunk));
  }
  bool fetch(const ChunkRef& chunk, std::span<std::byte> out) override {
    if (begins_to_fetch) begins_to_fetch();
    if (n_fetches++ >= breaks_at) throw ProtocolError("the source broke");
    if (!held_.contains(number(chunk))) return false;
    std::ranges::copy(tensors_.bytes_of(chunk), out.begin());
    if (wrong.contains(number(chunk))) out[0] ^= std::byte{1};
    return true;
  }
  void rejected(const ChunkRef& chunk) override { n_rejected += number(chunk) != ~size_t{0}; }
  void offer(const ChunkRef& chunk, std::span<const std::byte> bytes) override {
    n_wrong_offers += !std::ranges::equal(bytes, tensors_.bytes_of(chunk));
    ++n_offers;
  }
  size_t number(const ChunkRef& wanted) const {
    const auto all = tensors_.chunks();
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].tensor == wanted.tensor && all[i].index == wanted.index) return i;
    return ~size_t{0};
  }

  std::set<size_t> wrong;
  std::vector<size_t> looked_for, announced;
  bool claims_all = false, is_slow = false;
  std::function<void()> begins_to_fetch;
  int fetchers = 1;
  size_t breaks_at = ~size_t{0};
  std::atomic<size_t> n_fetches{0}, n_rejected{0}, n_offers{0}, n_wrong_offers{0};

 private:
  const MemoryTensors& tensors_;
  const std::set<size_t> held_;
};

}  // namespace caravan::weights::testing
