// Weights from other backends: each is asked over a connection of its own what it has in its files and cache, and the
// chunks are fetched from all of them at the same time.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "remote/codec.h"
#include "remote/peer_link.h"
#include "weights/source.h"

namespace caravan::remote {

// Backends that could not be asked lately: loads do not wait for them again and again. Thread-safe.
class SilentPeers {
 public:
  void add(const PeerAddress& peer);
  // For a minute after it was added.
  bool contains(const PeerAddress& peer) const;

 private:
  using Clock = std::chrono::steady_clock;
  mutable std::mutex mutex_;
  std::map<PeerAddress, Clock::time_point> until_;  // under mutex_
};

// The backends that one load may ask. Used by its threads; end() by any.
class PeerWeightSource : public weights::WeightSource {
 public:
  struct Patience {
    std::chrono::milliseconds question{3000};  // until a backend says what it has
    std::chrono::milliseconds chunk{10000};    // without a chunk from a backend that was asked for one
  };

  // io and silent outlive the source.
  PeerWeightSource(net::IoThreads& io, std::vector<PeerAddress> peers, PeerOptions options, SilentPeers& silent,
                   Patience patience);
  PeerWeightSource(net::IoThreads& io, std::vector<PeerAddress> peers, PeerOptions options, SilentPeers& silent)
      : PeerWeightSource(io, std::move(peers), std::move(options), silent, Patience()) {}
  // Closes the connections.
  ~PeerWeightSource() override;

  std::string_view name() const override { return "other backends"; }
  // Connects to all at the same time, and asks them. One that cannot be reached or asked is logged and left out.
  void look_for(std::span<const weights::ChunkRef> chunks) override;
  // What somebody said he has.
  bool may_have(const weights::ChunkRef& chunk) override;
  int n_fetchers() const override { return n_fetchers_; }
  // Somebody's link may be slow; the server has everything.
  bool may_be_helped() const override { return true; }
  // From whoever has the chunk and is asked for the fewest now; then from the next. Throws Error when nobody is left.
  bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override;
  // Who sends wrong bytes again and again is left out.
  void rejected(const weights::ChunkRef& chunk) override;
  // look_for() and fetch() give up, now and later.
  void end(const std::string& reason);

 private:
  class Neighbour;
  void ask(const PeerAddress& peer, const std::vector<Digest>& digests);
  std::shared_ptr<Neighbour> choose(const Digest& digest, const std::vector<Neighbour*>& tried);
  void note_wrong(Neighbour& neighbour);

  net::IoThreads& io_;
  const std::vector<PeerAddress> peers_;
  const PeerOptions options_;
  SilentPeers& silent_;
  const Patience patience_;
  int n_fetchers_ = 1;  // const after look_for()

  std::mutex mutex_;
  std::vector<std::shared_ptr<Neighbour>> neighbours_;                // under mutex_; shared with who fetches
  std::unordered_map<Digest, std::shared_ptr<Neighbour>> came_from_;  // under mutex_
  std::string ended_;                                                 // under mutex_
};

}  // namespace caravan::remote
