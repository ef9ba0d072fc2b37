#include "remote/local_weights.h"

namespace caravan::remote {

void LocalWeights::count(const WeightOrigins& origins) {
  const std::lock_guard lock(mutex_);
  totals_.models_dir += origins.models_dir;
  totals_.cache += origins.cache;
  totals_.server += origins.server;
  totals_.peers += origins.peers;
}

WeightOrigins LocalWeights::totals() const {
  const std::lock_guard lock(mutex_);
  return totals_;
}

LoadSources::LoadSources(LocalWeights& local, std::shared_ptr<PeerWeightSource> peers,
                         std::shared_ptr<RemoteWeightSource> server)
    : local_(local), peers_(std::move(peers)), server_(std::move(server)) {
  if (local.library() != nullptr) {
    library_ = std::make_unique<weights::LibrarySource>(*local.library());
    list_.push_back(library_.get());
  }
  if (local.cache() != nullptr) {
    cache_ = std::make_unique<weights::CacheSource>(*local.cache());
    list_.push_back(cache_.get());
  }
  list_.push_back(peers_.get());
  list_.push_back(server_.get());
}

LoadSources::~LoadSources() { local_.count(origins()); }

WeightOrigins LoadSources::origins() const {
  WeightOrigins origins;
  if (library_) origins.models_dir = library_->delivered_bytes();
  if (cache_) origins.cache = cache_->delivered_bytes();
  origins.server = server_->delivered_bytes();
  origins.peers = peers_->delivered_bytes();
  return origins;
}

}  // namespace caravan::remote
