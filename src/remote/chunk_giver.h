// Gives chunks of this machine's files and cache to other backends, which ask for them by hash.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>
#include <vector>

#include "remote/channel.h"
#include "remote/local_weights.h"

namespace caravan::remote {

// One thread at low priority reads from disk for all who ask, a question of each in turn; nobody gets the next chunk
// before he has taken most of those before. What is given is not verified here: who asked does that.
class ChunkGiver {
 public:
  // local is used until stop().
  explicit ChunkGiver(LocalWeights& local);
  ~ChunkGiver();

  // Queue a question, to be answered over the channel in the order of questions; return at once. Throw ProtocolError
  // when more than kMaxChunkRequests wait, or one asks for more than kMaxChunksPerWant; FormatError for what is no
  // hash.
  void have(const std::shared_ptr<Channel>& channel, const pb::HaveChunks& message);
  void fetch(const std::shared_ptr<Channel>& channel, const pb::FetchChunk& message);

  // Weight bytes given since the start.
  uint64_t given_bytes() const { return given_bytes_.load(); }
  // Answers no more; waits for the answer in progress. Idempotent.
  void stop();

 private:
  struct Question {
    uint64_t sequence = 0;
    std::vector<Digest> digests;
    bool fetches = false;
  };
  struct Asker {
    std::shared_ptr<Channel> channel;  // shared with those who serve the connection, which may end first
    std::deque<Question> questions;
  };

  void add(const std::shared_ptr<Channel>& channel, Question question);
  void work(std::stop_token stop);
  std::list<Asker>::iterator next_asker();
  void answer(Channel& channel, const Question& question);
  bool has(const Digest& digest) const;
  std::optional<std::vector<std::byte>> read(const Digest& digest) const;

  LocalWeights& local_;
  std::atomic<uint64_t> given_bytes_{0};
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::list<Asker> askers_;  // under mutex_; whose turn it is first
  std::jthread thread_;
};

}  // namespace caravan::remote
