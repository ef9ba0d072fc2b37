// A folder of weight chunks named by their SHA-256, which several processes may share.
//
//   DIR/chunks/ab/abcd...   one chunk of raw GGUF bytes; its name is its hash
//   DIR/tmp/                chunks being written; what a crash leaves here is removed after an hour
//   DIR/lock                held (flock) by the one process that makes room
//
// A chunk gets its name by a rename when all of it is written, without fsync: whatever a power failure makes of a file,
// its hash is checked whenever it is read.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/sha256.h"
#include "weights/source.h"

namespace caravan::weights {

struct ChunkCacheStatus {
  uint64_t held_bytes = 0;  // in the folder, as of the last look and what was written since
  uint64_t limit_bytes = 0;
  uint64_t read_bytes = 0;  // by this process, as the others below
  uint64_t written_bytes = 0;
  uint64_t evicted_bytes = 0;
  uint64_t n_corrupt = 0;   // files whose bytes did not have their name's hash; deleted
  uint64_t n_not_kept = 0;  // chunks that were not written: no room under the limit, or the disk refused
};

// Thread-safe. Writing happens on a thread of the cache's own and never fails a load.
class ChunkCache {
 public:
  using Clock = std::filesystem::file_time_type::clock;

  // Creates the folder. Chunks of all processes together take at most limit_bytes (give or take what each writes
  // between two looks, 256 MiB); the longest unused go first. Throws SystemError when the folder cannot be used.
  ChunkCache(std::filesystem::path folder, uint64_t limit_bytes);
  // Waits for what is being written.
  ~ChunkCache();

  bool contains(const Digest& digest) const;
  // Whether the chunk is there; counts as a use of it.
  bool use(const Digest& digest);
  // Fills out with the chunk; false when it is not there, or has another size. The bytes are not verified. Counts as a
  // use of the chunk.
  bool read(const Digest& digest, std::span<std::byte> out);
  // The same for a chunk of unknown size; nullopt when it is not there.
  std::optional<std::vector<std::byte>> read(const Digest& digest);
  // Deletes a chunk whose bytes turned out to be wrong.
  void discard(const Digest& digest);
  // Queues a chunk to be written; waits while several are queued, so that memory stays bounded. Chunks that were used
  // since keep_since are not evicted for it: what is larger than the limit is kept in part.
  void write(const Digest& digest, std::span<const std::byte> bytes, Clock::time_point keep_since);
  // Waits until everything queued is written or given up.
  void flush();

  const std::filesystem::path& folder() const { return folder_; }
  ChunkCacheStatus status() const;
  // Why nothing can be written at the moment, for people; empty: it can.
  std::string problem() const;

 private:
  struct Job {
    Digest digest;
    std::vector<std::byte> bytes;
    Clock::time_point keep_since;
  };

  void note_read(const Digest& digest, uint64_t bytes);
  std::filesystem::path path_of(const Digest& digest) const;
  void work(std::stop_token stop);
  void store(const Job& job);
  bool make_room(uint64_t bytes, Clock::time_point keep_since);
  // Why the disk does not take so many bytes more; empty: it does.
  std::string disk_shortage(uint64_t bytes) const;
  void pause_writing(const std::string& why);
  void remove_stale_temporaries() const;

  const std::filesystem::path folder_;
  const uint64_t limit_bytes_;

  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Job> jobs_;     // under mutex_; the one being written included
  ChunkCacheStatus status_;  // under mutex_

  // On the writer's thread.
  uint64_t written_since_look_ = 0;
  Clock::time_point full_for_{};  // the load for which no room could be made
  std::chrono::steady_clock::time_point writing_paused_until_;

  std::jthread thread_;
};

// The cache as a source of one load; what it does not have and another source delivers, it keeps.
class CacheSource : public WeightSource {
 public:
  // cache outlives the source.
  explicit CacheSource(ChunkCache& cache) : cache_(cache), began_(ChunkCache::Clock::now() - kFileClockTick) {}
  std::string_view name() const override { return "cache"; }
  // What is there counts as used from here on, so that room for other chunks of this load is not made of it.
  bool may_have(const ChunkRef& chunk) override { return chunk.digest() != nullptr && cache_.use(*chunk.digest()); }
  int n_fetchers() const override { return 2; }
  bool fetch(const ChunkRef& chunk, std::span<std::byte> out) override {
    return chunk.digest() != nullptr && cache_.read(*chunk.digest(), out);
  }
  void rejected(const ChunkRef& chunk) override { cache_.discard(*chunk.digest()); }
  void offer(const ChunkRef& chunk, std::span<const std::byte> bytes) override {
    if (chunk.digest() != nullptr) cache_.write(*chunk.digest(), bytes, began_);
  }

 private:
  // By so much the times that a file system writes may be older than the clock.
  static constexpr std::chrono::milliseconds kFileClockTick{20};

  ChunkCache& cache_;
  const ChunkCache::Clock::time_point began_;
};

}  // namespace caravan::weights
