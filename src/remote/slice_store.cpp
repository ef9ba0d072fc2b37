#include "remote/slice_store.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"

namespace caravan::remote {

uint64_t SliceStore::DeviceMemory::used() const {
  uint64_t bytes = leased;
  for (const auto& [key, entry] : entries) bytes += entry.bytes;
  return bytes;
}

uint64_t SliceStore::DeviceMemory::kept() const {
  uint64_t bytes = 0;
  for (const auto& [key, entry] : entries)
    if (entry.n_users == 0) bytes += entry.bytes;
  return bytes;
}

SliceStore::Lease& SliceStore::Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  release();
  store_ = std::exchange(other.store_, nullptr);
  device_ = other.device_;
  bytes_ = std::exchange(other.bytes_, 0);
  key_ = other.key_;
  return *this;
}

void SliceStore::Lease::release() noexcept {
  if (store_ != nullptr) std::exchange(store_, nullptr)->release(device_, bytes_, key_);
}

SliceStore::SliceStore(SliceHost& host, std::chrono::seconds keep_alive) : host_(host), keep_alive_(keep_alive) {
  for (const device::DeviceInfo& info : host.devices()) {
    devices_.emplace_back();
    devices_.back().name = info.name;
    devices_.back().total = info.memory_total;
  }
}

SliceStore::~SliceStore() = default;

// Frees the longest unused weights until need_bytes more fit, or nothing unused is left.
void SliceStore::evict_until(DeviceMemory& memory, uint64_t need_bytes) {
  while (memory.used() + need_bytes > memory.total) {
    auto oldest = memory.entries.end();
    for (auto it = memory.entries.begin(); it != memory.entries.end(); ++it)
      if (it->second.n_users == 0 &&
          (oldest == memory.entries.end() || it->second.unused_since < oldest->second.unused_since))
        oldest = it;
    if (oldest == memory.entries.end()) return;
    spdlog::info("{}: {} of weights that nobody uses make room", memory.name, format_bytes(oldest->second.bytes));
    memory.entries.erase(oldest);
  }
}

SliceStore::Lease SliceStore::reserve(size_t device, const stage::MemoryNeed& need, const Digest& key, Lease replaced) {
  const std::lock_guard lock(mutex_);
  if (device >= devices_.size())
    throw ProtocolError(fmt::format("device {} of a backend with {} devices", device, devices_.size()));
  DeviceMemory& memory = devices_[device];
  const uint64_t own = checked_add(need.kv_cache, need.scratch, "KV cache and scratch");
  const uint64_t all = checked_add(own, need.weights, "memory of a stage");
  if (all > memory.total)
    throw ResourceError(fmt::format("{}: need {} (weights {}, KV cache {}, scratch {}), have {} altogether",
                                    memory.name, format_bytes(all), format_bytes(need.weights),
                                    format_bytes(need.kv_cache), format_bytes(need.scratch),
                                    format_bytes(memory.total)));

  const auto [found, added] = memory.entries.try_emplace(key);
  Entry& entry = found->second;
  ++entry.n_users;  // from here on it is not evicted, nor freed with what is replaced
  if (replaced) {
    replaced.store_ = nullptr;
    release_locked(replaced.device_, replaced.bytes_, replaced.key_);
  }
  // An estimate that nobody else relies on, and nothing was loaded by, is replaced.
  const uint64_t estimate = entry.bytes;
  if (entry.weights == nullptr && !entry.loading && entry.n_users == 1) entry.bytes = 0;
  const uint64_t weights = entry.bytes == 0 ? need.weights : 0;
  evict_until(memory, own + weights);
  if (memory.used() + own + weights > memory.total) {
    const uint64_t have = memory.total - memory.used();
    if (--entry.n_users == 0) {
      entry.unused_since = Clock::now();
      entry.bytes = estimate;
      if (entry.weights == nullptr && entry.unfinished == nullptr) memory.entries.erase(found);
    }
    throw ResourceError(fmt::format("{}: need {} (weights {}, KV cache {}, scratch {}), have {} of {} free",
                                    memory.name, format_bytes(own + weights), format_bytes(weights),
                                    format_bytes(need.kv_cache), format_bytes(need.scratch), format_bytes(have),
                                    format_bytes(memory.total)));
  }
  entry.bytes += weights;
  memory.leased += own;
  Lease lease;
  lease.store_ = this;
  lease.device_ = device;
  lease.bytes_ = own;
  lease.key_ = key;
  return lease;
}

SliceStore::Loaded SliceStore::load(const Lease& lease, const stage::LoadRequest& request,
                                    std::span<weights::WeightSource* const> sources,
                                    const stage::Stage::ProgressFunction& on_progress, std::stop_token stop) {
  CARAVAN_ASSERT(lease.store_ == this, "a stage reserves before it loads");
  std::unique_lock lock(mutex_);
  // Stays valid without the lock: the lease keeps the entry, and a map's nodes do not move.
  Entry& entry = devices_[lease.device_].entries.at(lease.key_);
  while (entry.loading) {
    const uint64_t heard = entry.n_signs, done_bytes = entry.done_bytes;
    lock.unlock();
    on_progress(done_bytes);
    lock.lock();
    if (!loaded_.wait(lock, stop, [&] { return !entry.loading || entry.n_signs != heard; }))
      throw Error("loading was given up");
  }
  if (entry.weights != nullptr) return {entry.weights, true};
  entry.loading = true;
  lock.unlock();
  std::shared_ptr<const ResidentWeights> weights;
  std::exception_ptr failure;
  try {
    if (!entry.unfinished) entry.unfinished = host_.begin_load(lease.device_, request);
    weights = entry.unfinished->run(sources, [&](uint64_t done_bytes) {
      {
        const std::lock_guard signs_lock(mutex_);
        entry.done_bytes = done_bytes;
        ++entry.n_signs;
      }
      loaded_.notify_all();
      on_progress(done_bytes);
    });
    entry.unfinished.reset();
  } catch (const weights::SourceError&) {
    failure = std::current_exception();
  } catch (...) {
    failure = std::current_exception();
    entry.unfinished.reset();  // trying again would end the same way
  }
  lock.lock();
  entry.loading = false;
  entry.weights = weights;
  lock.unlock();
  loaded_.notify_all();  // after a failure, the next one that waits loads from its own source
  if (failure) std::rethrow_exception(failure);
  return {std::move(weights), false};
}

void SliceStore::release(size_t device, uint64_t bytes, const Digest& key) noexcept {
  const std::lock_guard lock(mutex_);
  release_locked(device, bytes, key);
}

void SliceStore::release_locked(size_t device, uint64_t bytes, const Digest& key) noexcept {
  DeviceMemory& memory = devices_[device];
  memory.leased -= bytes;
  const auto found = memory.entries.find(key);
  if (--found->second.n_users > 0) return;
  found->second.unused_since = Clock::now();
  const bool is_empty = found->second.weights == nullptr && found->second.unfinished == nullptr;
  if (is_empty || keep_alive_.count() == 0) memory.entries.erase(found);
}

void SliceStore::clear() {
  const std::lock_guard lock(mutex_);
  for (DeviceMemory& memory : devices_)
    std::erase_if(memory.entries, [](const auto& item) { return item.second.n_users == 0; });
}

void SliceStore::expire(Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  for (DeviceMemory& memory : devices_) {
    std::erase_if(memory.entries, [&](const auto& item) {
      const Entry& entry = item.second;
      const bool expired = entry.n_users == 0 && now - entry.unused_since >= keep_alive_;
      if (expired)
        spdlog::info("{}: {} of weights freed, unused for {} s", memory.name, format_bytes(entry.bytes),
                     keep_alive_.count());
      return expired;
    });
  }
}

std::vector<uint64_t> SliceStore::memory_free() const {
  // What the machine says counts too: others may use memory that our cap would allow.
  const std::vector<device::DeviceInfo> infos = host_.devices();
  const std::lock_guard lock(mutex_);
  std::vector<uint64_t> free;
  for (size_t i = 0; i < devices_.size(); ++i) {
    const uint64_t kept = devices_[i].kept();
    free.push_back(std::min(devices_[i].total - devices_[i].used() + kept, infos[i].memory_free + kept));
  }
  return free;
}

uint64_t SliceStore::memory_unused(size_t device) const {
  const std::lock_guard lock(mutex_);
  if (device >= devices_.size()) return 0;
  const DeviceMemory& memory = devices_[device];
  return memory.total - std::min(memory.total, memory.used());
}

size_t SliceStore::n_resident() const {
  const std::lock_guard lock(mutex_);
  size_t n = 0;
  for (const DeviceMemory& memory : devices_)
    for (const auto& [key, entry] : memory.entries) n += entry.weights != nullptr;
  return n;
}

}  // namespace caravan::remote
