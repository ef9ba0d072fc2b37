// What a backend has of weights on its own machine, and the sources of one load in the order they are asked.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "remote/peer_weight_source.h"
#include "remote/remote_weight_source.h"
#include "weights/chunk_cache.h"
#include "weights/model_library.h"

namespace caravan::remote {

// Weight bytes by where they came from.
struct WeightOrigins {
  uint64_t models_dir = 0, cache = 0, server = 0, peers = 0;
};

// Shared by all stages of a backend. Thread-safe.
class LocalWeights {
 public:
  // Either may be null; they outlive this.
  LocalWeights(weights::ModelLibrary* library, weights::ChunkCache* cache) : library_(library), cache_(cache) {}
  weights::ModelLibrary* library() const { return library_; }
  weights::ChunkCache* cache() const { return cache_; }

  void count(const WeightOrigins& origins);
  // Of all loads since the start.
  WeightOrigins totals() const;

 private:
  weights::ModelLibrary* const library_;
  weights::ChunkCache* const cache_;
  mutable std::mutex mutex_;
  WeightOrigins totals_;  // under mutex_
};

// The sources of one load: files here, the cache, other backends, the server.
class LoadSources {
 public:
  // local outlives this.
  LoadSources(LocalWeights& local, std::shared_ptr<PeerWeightSource> peers, std::shared_ptr<RemoteWeightSource> server);
  // Counts what was delivered.
  ~LoadSources();
  LoadSources(const LoadSources&) = delete;
  LoadSources& operator=(const LoadSources&) = delete;

  std::span<weights::WeightSource* const> list() const { return list_; }
  WeightOrigins origins() const;

 private:
  LocalWeights& local_;
  std::unique_ptr<weights::LibrarySource> library_;
  std::unique_ptr<weights::CacheSource> cache_;
  const std::shared_ptr<PeerWeightSource> peers_;     // shared with who may end the load
  const std::shared_ptr<RemoteWeightSource> server_;  // shared with the channel's executor
  std::vector<weights::WeightSource*> list_;
};

}  // namespace caravan::remote
