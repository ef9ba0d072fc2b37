// The memory of a backend's devices: what is reserved, what is resident, and which weights are kept though nobody uses
// them at the moment.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <vector>

#include "base/sha256.h"
#include "remote/slice_host.h"

namespace caravan::remote {

// Keeps the sum of weights, KV caches and scratch of each device under its memory_total: everything is reserved before
// it is allocated. Weights are counted once per content key, whoever uses them. Thread-safe.
class SliceStore {
 public:
  using Clock = std::chrono::steady_clock;

 private:
  struct Entry {
    uint64_t bytes = 0;
    uint32_t n_users = 0;  // leases that name it
    bool loading = false;
    uint64_t done_bytes = 0, n_signs = 0;            // of who loads: bytes done, and how often it said so
    std::unique_ptr<SliceLoad> unfinished;           // broken off; used by whoever set `loading`
    std::shared_ptr<const ResidentWeights> weights;  // null until loaded
    Clock::time_point unused_since;
  };
  struct DeviceMemory {
    std::string name;
    uint64_t total = 0;
    uint64_t leased = 0;  // KV caches and scratch
    std::map<Digest, Entry> entries;
    uint64_t used() const;
    uint64_t kept() const;  // of entries without users
  };

 public:
  // Memory of one stage: its KV cache and scratch, and a share in the weights of its content key. Released on
  // destruction; the store outlives it.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept { *this = std::move(other); }
    Lease& operator=(Lease&& other) noexcept;
    ~Lease() { release(); }
    uint64_t bytes() const { return bytes_; }
    explicit operator bool() const { return store_ != nullptr; }

   private:
    friend class SliceStore;
    void release() noexcept;
    SliceStore* store_ = nullptr;
    size_t device_ = 0;
    uint64_t bytes_ = 0;  // without the weights
    Digest key_;
  };

  // host outlives the store. keep_alive: how long weights stay when nobody uses them.
  SliceStore(SliceHost& host, std::chrono::seconds keep_alive);
  ~SliceStore();

  // Takes memory for need; weights that are resident under key are not counted again, and unused ones of others make
  // room, oldest first. What `replaced` held counts as free, with nobody else in between. Throws ResourceError with
  // need and have, ProtocolError when there is no such device; then it is released, too.
  Lease reserve(size_t device, const stage::MemoryNeed& need, const Digest& key, Lease replaced);
  Lease reserve(size_t device, const stage::MemoryNeed& need, const Digest& key) {
    return reserve(device, need, key, Lease());
  }

  struct Loaded {
    std::shared_ptr<const ResidentWeights> weights;
    bool shared = false;  // they were there already
  };
  // The weights of a lease: those that are there, those that somebody else is loading just now (waits for them, and
  // passes that one's progress on), or else loaded from sources. A load that its sources failed is kept like weights
  // that nobody uses, and the next one goes on with it. Throws as SliceLoad::run(), Error when stop is requested while
  // it waits.
  Loaded load(const Lease& lease, const stage::LoadRequest& request, std::span<weights::WeightSource* const> sources,
              const stage::Stage::ProgressFunction& on_progress, std::stop_token stop);

  // Frees all weights that nobody uses.
  void clear();
  // Frees weights that nobody has used for keep_alive.
  void expire(Clock::time_point now);

  // Bytes per device that a reserve() could get now; weights that nobody uses count as free.
  std::vector<uint64_t> memory_free() const;
  // Bytes of a device that nothing is in, weights that nobody uses included. 0 for a device that is not there.
  uint64_t memory_unused(size_t device) const;
  // Content keys that are resident, whether used or kept.
  size_t n_resident() const;

 private:
  void release(size_t device, uint64_t bytes, const Digest& key) noexcept;
  void release_locked(size_t device, uint64_t bytes, const Digest& key) noexcept;
  static void evict_until(DeviceMemory& memory, uint64_t need_bytes);

  SliceHost& host_;
  const std::chrono::seconds keep_alive_;
  mutable std::mutex mutex_;
  std::condition_variable_any loaded_;
  std::vector<DeviceMemory> devices_;  // under mutex_
};

}  // namespace caravan::remote
