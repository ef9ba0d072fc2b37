#include "remote/remote_weight_source.h"

#include <fmt/format.h>

#include <algorithm>

namespace caravan::remote {

RemoteWeightSource::RemoteWeightSource(std::shared_ptr<Channel> channel, uint32_t stage)
    : channel_(std::move(channel)), stage_(stage) {}

void RemoteWeightSource::announce(std::span<const weights::ChunkRef> chunks) {
  std::unique_lock lock(mutex_);
  for (const weights::ChunkRef& chunk : chunks) planned_.push_back(*chunk.digest());
  request_more(lock);
}

// Fills up the requests in flight, in one message.
void RemoteWeightSource::request_more(std::unique_lock<std::mutex>&) {
  pb::WantChunks want;
  want.set_stage(stage_);
  while (!planned_.empty() && asked_.size() + arrived_.size() < kInFlight) {
    const Digest digest = planned_.front();
    planned_.pop_front();
    // Equal chunks (zeros) have one hash: the second is asked for when the first has been fetched.
    if (asked_.contains(digest) || arrived_.contains(digest)) continue;
    asked_.insert(digest);
    want.add_digests(digest.bytes.data(), digest.bytes.size());
  }
  if (want.digests_size() > 0) channel_->send(MessageType::want_chunks, want);
}

bool RemoteWeightSource::fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) {
  const Digest digest = *chunk.digest();
  std::unique_lock lock(mutex_);
  if (!asked_.contains(digest) && !arrived_.contains(digest)) {
    // Not announced, or an equal chunk was fetched before.
    const auto planned = std::ranges::find(planned_, digest);
    if (planned != planned_.end()) planned_.erase(planned);
    asked_.insert(digest);
    pb::WantChunks want;
    want.set_stage(stage_);
    want.add_digests(digest.bytes.data(), digest.bytes.size());
    channel_->send(MessageType::want_chunks, want);
  }
  arrived_changed_.wait(lock, [&] { return !ended_.empty() || arrived_.contains(digest); });
  if (!ended_.empty()) throw Error(ended_);
  const Arrived chunk_bytes = std::move(arrived_.extract(digest).mapped());
  request_more(lock);
  lock.unlock();
  if (chunk_bytes.missing) return false;
  if (chunk_bytes.bytes.size() != out.size())
    throw ProtocolError(fmt::format("{}: chunk {} has {} bytes, expected {}", channel_->peer(), digest.hex(),
                                    chunk_bytes.bytes.size(), out.size()));
  std::ranges::copy(chunk_bytes.bytes, out.begin());
  return true;
}

void RemoteWeightSource::receive(const pb::Chunk& header, std::vector<std::byte> payload) {
  const Digest digest = Digest::from_bytes(header.digest());
  {
    const std::lock_guard lock(mutex_);
    if (asked_.erase(digest) == 0) throw ProtocolError(fmt::format("Chunk: {} was not asked for", digest.hex()));
    bytes_received_ += payload.size();
    arrived_[digest] = {header.missing(), std::move(payload)};
  }
  arrived_changed_.notify_all();
}

void RemoteWeightSource::end(const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_.empty()) ended_ = reason;
  }
  arrived_changed_.notify_all();
}

uint64_t RemoteWeightSource::bytes_received() const {
  const std::lock_guard lock(mutex_);
  return bytes_received_;
}

}  // namespace caravan::remote
