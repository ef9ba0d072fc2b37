#include "remote/chunk_giver.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "remote/codec.h"

namespace caravan::remote {

namespace {

// Bytes that wait at a channel before its next chunk is read: one is written while the other is ready.
constexpr uint64_t kMaxWaiting = 2 * weights::kChunkBytes;
// How often channels are looked at that had no room.
constexpr auto kLookInterval = std::chrono::milliseconds(5);
constexpr int kNiceness = 10;

}  // namespace

ChunkGiver::ChunkGiver(LocalWeights& local)
    : local_(local), thread_([this](std::stop_token stop) { work(std::move(stop)); }) {}

ChunkGiver::~ChunkGiver() { stop(); }

void ChunkGiver::stop() {
  thread_.request_stop();
  if (thread_.joinable()) thread_.join();
  const std::lock_guard lock(mutex_);
  askers_.clear();
}

void ChunkGiver::have(const std::shared_ptr<Channel>& channel, const pb::HaveChunks& message) {
  if (static_cast<uint32_t>(message.digests_size()) > kMaxChunksPerWant)
    throw ProtocolError(
        fmt::format("HaveChunks: {} chunks, at most {} are accepted", message.digests_size(), kMaxChunksPerWant));
  Question question{message.sequence(), {}, false};
  for (const std::string& digest : message.digests()) question.digests.push_back(Digest::from_bytes(digest));
  add(channel, std::move(question));
}

void ChunkGiver::fetch(const std::shared_ptr<Channel>& channel, const pb::FetchChunk& message) {
  add(channel, {message.sequence(), {Digest::from_bytes(message.digest())}, true});
}

void ChunkGiver::add(const std::shared_ptr<Channel>& channel, Question question) {
  {
    const std::lock_guard lock(mutex_);
    auto asker = std::ranges::find(askers_, channel, &Asker::channel);
    if (asker == askers_.end()) asker = askers_.insert(askers_.end(), Asker{channel, {}});
    if (asker->questions.size() >= kMaxChunkRequests)
      throw ProtocolError(fmt::format("more than {} questions for chunks wait", kMaxChunkRequests));
    asker->questions.push_back(std::move(question));
  }
  changed_.notify_all();
}

// Under mutex_: the first whose question can be answered now. Those who asked for nothing more, or left, are forgotten.
std::list<ChunkGiver::Asker>::iterator ChunkGiver::next_asker() {
  std::erase_if(askers_, [](const Asker& asker) { return asker.questions.empty() || asker.channel->closed(); });
  return std::ranges::find_if(askers_, [](const Asker& asker) { return asker.channel->queued_bytes() < kMaxWaiting; });
}

void ChunkGiver::work(std::stop_token stop) {
  // Of this thread only, on Linux. The devices compute first.
  setpriority(PRIO_PROCESS, 0, kNiceness);
  std::unique_lock lock(mutex_);
  while (!stop.stop_requested()) {
    const auto asker = next_asker();
    if (askers_.empty()) {
      changed_.wait(lock, stop, [&] { return !askers_.empty(); });
      continue;
    }
    if (asker == askers_.end()) {
      changed_.wait_for(lock, stop, kLookInterval, [] { return false; });
      continue;
    }
    const Question question = std::move(asker->questions.front());
    asker->questions.pop_front();
    const std::shared_ptr<Channel> channel = asker->channel;
    askers_.splice(askers_.end(), askers_, asker);  // the others come first now
    lock.unlock();
    answer(*channel, question);
    lock.lock();
  }
}

void ChunkGiver::answer(Channel& channel, const Question& question) {
  if (!question.fetches) {
    std::vector<bool> have;
    for (const Digest& digest : question.digests) have.push_back(has(digest));
    pb::HaveChunksResult result;
    result.set_sequence(question.sequence);
    result.set_have(encode_bits(have));
    return channel.send(MessageType::have_chunks_result, result);
  }
  std::optional<std::vector<std::byte>> bytes;
  try {
    bytes = read(question.digests.front());
  } catch (const std::exception& error) {
    spdlog::warn("{}: chunk {}: {}", channel.peer(), question.digests.front().hex(), error.what());
  }
  pb::FetchedChunk chunk;
  chunk.set_sequence(question.sequence);
  chunk.set_missing(!bytes);
  given_bytes_ += bytes ? bytes->size() : 0;
  channel.send(MessageType::fetched_chunk, chunk, std::move(bytes).value_or(std::vector<std::byte>()));
}

bool ChunkGiver::has(const Digest& digest) const {
  return (local_.library() != nullptr && local_.library()->contains(digest)) ||
         (local_.cache() != nullptr && local_.cache()->contains(digest));
}

std::optional<std::vector<std::byte>> ChunkGiver::read(const Digest& digest) const {
  std::optional<std::vector<std::byte>> bytes;
  if (local_.library() != nullptr) bytes = local_.library()->read(digest);
  if (!bytes && local_.cache() != nullptr) bytes = local_.cache()->read(digest);
  return bytes;
}

}  // namespace caravan::remote
