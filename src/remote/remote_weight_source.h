// Weights pulled by chunk hash over a channel: the backend's end of WantChunks and Chunk.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "remote/channel.h"
#include "weights/source.h"

namespace caravan::remote {

// Keeps a few requests in flight, in the order that was announced. fetch() blocks a loader thread; chunks come in on
// the channel's executor. Shared between the two, hence held by shared_ptr.
class RemoteWeightSource : public weights::WeightSource {
 public:
  // Requests in flight: enough to fill a link while one chunk is verified and uploaded, 16 MiB of memory.
  static constexpr size_t kInFlight = 4;

  // stage: named in the requests.
  RemoteWeightSource(std::shared_ptr<Channel> channel, uint32_t stage);

  std::string_view name() const override { return "server"; }
  void announce(std::span<const weights::ChunkRef> chunks) override;
  // Throws Error when the source was ended, ProtocolError when the peer sent a chunk of another size.
  bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override;

  // A chunk that came. Throws ProtocolError when it was not asked for.
  void receive(const pb::Chunk& header, std::vector<std::byte> payload);
  // fetch() throws from now on.
  void end(const std::string& reason);
  // Payload bytes that came.
  uint64_t bytes_received() const;

 private:
  struct Arrived {
    bool missing = false;
    std::vector<std::byte> bytes;
  };
  void request_more(std::unique_lock<std::mutex>& lock);

  const std::shared_ptr<Channel> channel_;
  const uint32_t stage_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_changed_;
  std::deque<Digest> planned_;         // announced, not asked for yet
  std::set<Digest> asked_;             // asked for, not here yet
  std::map<Digest, Arrived> arrived_;  // here, not fetched yet
  std::string ended_;
  uint64_t bytes_received_ = 0;
};

}  // namespace caravan::remote
