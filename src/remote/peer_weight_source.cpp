#include "remote/peer_weight_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <optional>
#include <set>
#include <thread>
#include <unordered_set>

#include "base/error.h"
#include "base/log.h"

namespace caravan::remote {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSilence = std::chrono::seconds(60);
constexpr size_t kMaxSilent = 256;
// Chunks in flight: two of each backend fill its link while one is verified; all of them are held in memory.
constexpr int kFetchersPerPeer = 2;
constexpr int kMaxFetchers = 8;
// A damaged file gives one wrong chunk, a liar all.
constexpr uint32_t kMaxWrong = 4;

}  // namespace

void SilentPeers::add(const PeerAddress& peer) {
  const std::lock_guard lock(mutex_);
  const Clock::time_point now = Clock::now();
  std::erase_if(until_, [&](const auto& item) { return item.second <= now; });
  if (until_.size() < kMaxSilent) until_[peer] = now + kSilence;
}

bool SilentPeers::contains(const PeerAddress& peer) const {
  const std::lock_guard lock(mutex_);
  const auto found = until_.find(peer);
  return found != until_.end() && Clock::now() < found->second;
}

// One backend that is asked. Its link calls it on an I/O thread, the load's threads wait here.
class PeerWeightSource::Neighbour {
 public:
  // What the link holds of a neighbour, which itself holds the link.
  class Ear : public BackendLink::Listener {
   public:
    explicit Ear(const std::shared_ptr<Neighbour>& neighbour) : neighbour_(neighbour) {}
    void on_frame(net::Frame frame) override {
      if (const auto neighbour = neighbour_.lock()) neighbour->on_frame(std::move(frame));
    }
    void on_lost(const std::string& reason) override {
      if (const auto neighbour = neighbour_.lock()) neighbour->on_lost(reason);
    }
    uint64_t max_output_bytes() const override { return 0; }

   private:
    const std::weak_ptr<Neighbour> neighbour_;
  };

  Neighbour(std::shared_ptr<BackendLink> link, Patience patience) : link_(std::move(link)), patience_(patience) {}

  std::string who() const { return link_->info().endpoint.text(); }
  // Asks what it has of these. Throws Error when it does not answer.
  void ask(std::span<const Digest> digests);
  bool has(const Digest& digest) const { return has_.contains(digest); }
  // False: it does not have it after all, or its size is another one (then is_wrong is set). Throws Error when it is
  // lost.
  bool fetch(const Digest& digest, std::span<std::byte> out, bool& is_wrong);
  // Nothing more comes from it.
  void leave(const std::string& reason);
  bool is_lost() const {
    const std::lock_guard lock(mutex_);
    return !lost_.empty();
  }

  // Throws ProtocolError for an answer to no question.
  void on_frame(net::Frame frame);
  void on_lost(const std::string& reason);

  uint32_t n_in_flight = 0, n_asked = 0, n_wrong = 0;  // under the source's mutex

 private:
  struct Answer {
    std::string have;
    bool missing = false;
    std::vector<std::byte> bytes;
  };
  struct Question {
    MessageType answer_type;
    std::optional<Answer> answer;
  };
  uint64_t begin(MessageType answer_type);
  Answer wait(uint64_t sequence, std::chrono::milliseconds patience);

  const std::shared_ptr<BackendLink> link_;
  const Patience patience_;
  std::unordered_set<Digest> has_;  // const after ask()

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, Question> questions_;  // under mutex_; by sequence
  uint64_t last_sequence_ = 0;              // under mutex_
  Clock::time_point last_answer_{};         // under mutex_
  std::string lost_;                        // under mutex_; not empty: why
};

uint64_t PeerWeightSource::Neighbour::begin(MessageType answer_type) {
  const std::lock_guard lock(mutex_);
  questions_.emplace(++last_sequence_, Question{answer_type, {}});
  return last_sequence_;
}

PeerWeightSource::Neighbour::Answer PeerWeightSource::Neighbour::wait(uint64_t sequence,
                                                                      std::chrono::milliseconds patience) {
  const Clock::time_point asked = Clock::now();
  std::unique_lock lock(mutex_);
  while (true) {
    if (!lost_.empty()) throw Error(lost_);
    Question& question = questions_.at(sequence);
    if (question.answer) {
      Answer answer = std::move(*question.answer);
      questions_.erase(sequence);
      return answer;
    }
    const Clock::time_point until = std::max(asked, last_answer_) + patience;
    if (Clock::now() >= until) break;
    changed_.wait_until(lock, until);
  }
  lock.unlock();
  const std::string reason =
      fmt::format("backend {} does not answer for {:.1f} s", who(), std::chrono::duration<double>(patience).count());
  leave(reason);
  throw Error(reason);
}

void PeerWeightSource::Neighbour::ask(std::span<const Digest> digests) {
  while (!digests.empty()) {
    const auto some = digests.first(std::min<size_t>(digests.size(), kMaxChunksPerWant));
    digests = digests.subspan(some.size());
    pb::HaveChunks message;
    message.set_sequence(begin(MessageType::have_chunks_result));
    for (const Digest& digest : some) message.add_digests(digest.bytes.data(), digest.bytes.size());
    link_->channel().send(MessageType::have_chunks, message);
    const std::vector<bool> have = decode_bits(wait(message.sequence(), patience_.question).have, some.size());
    for (size_t i = 0; i < some.size(); ++i)
      if (have[i]) has_.insert(some[i]);
  }
}

bool PeerWeightSource::Neighbour::fetch(const Digest& digest, std::span<std::byte> out, bool& is_wrong) {
  pb::FetchChunk message;
  message.set_sequence(begin(MessageType::fetched_chunk));
  message.set_digest(digest.bytes.data(), digest.bytes.size());
  link_->channel().send(MessageType::fetch_chunk, message);
  const Answer answer = wait(message.sequence(), patience_.chunk);
  if (answer.missing) return false;
  if (answer.bytes.size() != out.size()) {
    spdlog::warn("chunk {} from backend {}: {} bytes, expected {}", digest.hex(), who(), answer.bytes.size(),
                 out.size());
    is_wrong = true;
    return false;
  }
  std::ranges::copy(answer.bytes, out.begin());
  return true;
}

void PeerWeightSource::Neighbour::on_frame(net::Frame frame) {
  uint64_t sequence = 0;
  Answer answer;
  if (frame.type == static_cast<uint16_t>(MessageType::have_chunks_result)) {
    auto message = parse_header<pb::HaveChunksResult>(frame);
    sequence = message.sequence();
    answer.have = std::move(*message.mutable_have());
  } else if (frame.type == static_cast<uint16_t>(MessageType::fetched_chunk)) {
    const auto message = parse_header<pb::FetchedChunk>(frame);
    sequence = message.sequence();
    answer.missing = message.missing();
    answer.bytes = std::move(frame.payload);
  } else {
    throw ProtocolError(fmt::format("{} is not expected here", message_name(frame.type)));
  }
  {
    const std::lock_guard lock(mutex_);
    const auto asked = questions_.find(sequence);
    if (asked == questions_.end() || asked->second.answer ||
        static_cast<uint16_t>(asked->second.answer_type) != frame.type)
      throw ProtocolError(fmt::format("{} answers nothing that was asked", message_name(frame.type)));
    asked->second.answer = std::move(answer);
    last_answer_ = Clock::now();
  }
  changed_.notify_all();
}

void PeerWeightSource::Neighbour::on_lost(const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (!lost_.empty()) return;
    lost_ = reason;
  }
  spdlog::warn("weights from another backend: {}", reason);
  changed_.notify_all();
}

void PeerWeightSource::Neighbour::leave(const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (lost_.empty()) lost_ = reason;
  }
  changed_.notify_all();
  link_->close();
}

PeerWeightSource::PeerWeightSource(net::IoThreads& io, std::vector<PeerAddress> peers, PeerOptions options,
                                   SilentPeers& silent, Patience patience)
    : io_(io), peers_(std::move(peers)), options_(std::move(options)), silent_(silent), patience_(patience) {}

PeerWeightSource::~PeerWeightSource() { end("the load is over"); }

void PeerWeightSource::end(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (ended_.empty()) ended_ = reason;
  for (const auto& neighbour : neighbours_) neighbour->leave(reason);
}

void PeerWeightSource::look_for(std::span<const weights::ChunkRef> chunks) {
  std::set<Digest> wanted;
  for (const weights::ChunkRef& chunk : chunks)
    if (chunk.digest() != nullptr) wanted.insert(*chunk.digest());
  if (wanted.empty()) return;
  const std::vector<Digest> digests(wanted.begin(), wanted.end());
  {
    std::vector<std::jthread> asking;
    for (const PeerAddress& peer : peers_)
      if (!silent_.contains(peer)) asking.emplace_back([this, &peer, &digests] { ask(peer, digests); });
  }
  const std::lock_guard lock(mutex_);
  n_fetchers_ = std::clamp(static_cast<int>(neighbours_.size()) * kFetchersPerPeer, 1, kMaxFetchers);
}

// On a thread of its own.
void PeerWeightSource::ask(const PeerAddress& peer, const std::vector<Digest>& digests) {
  try {
    const std::shared_ptr<BackendLink> link = connect_peer(io_, peer.endpoint, peer.backend_id, options_);
    if (link->info().protocol_minor < kMinorWithSharedWeights)
      throw NotSupportedError(fmt::format("it speaks protocol {}.{}, which does not share weights", kProtocolMajor,
                                          link->info().protocol_minor));
    const auto neighbour = std::make_shared<Neighbour>(link, patience_);
    {
      const std::lock_guard lock(mutex_);
      if (!ended_.empty()) return;
      neighbours_.push_back(neighbour);
    }
    link->attach(std::make_shared<Neighbour::Ear>(neighbour), 0);  // what it sends is about no stage
    neighbour->ask(digests);
  } catch (const std::exception& error) {
    {
      const std::lock_guard lock(mutex_);
      if (!ended_.empty()) return;
    }
    silent_.add(peer);
    spdlog::info("no weights are asked of backend {}: {}", peer.endpoint, error.what());
  }
}

bool PeerWeightSource::may_have(const weights::ChunkRef& chunk) {
  return chunk.digest() != nullptr && choose(*chunk.digest(), {}) != nullptr;
}

// Of those that have the chunk, are not lost and were not tried yet, the one with the least to do, then with the least
// done; null: none.
std::shared_ptr<PeerWeightSource::Neighbour> PeerWeightSource::choose(const Digest& digest,
                                                                      const std::vector<Neighbour*>& tried) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Neighbour> best;
  for (const auto& neighbour : neighbours_) {
    if (neighbour->is_lost() || !neighbour->has(digest) || std::ranges::count(tried, neighbour.get()) > 0) continue;
    const auto load = [](const Neighbour& n) { return std::pair(n.n_in_flight, n.n_asked); };
    if (!best || load(*neighbour) < load(*best)) best = neighbour;
  }
  return best;
}

bool PeerWeightSource::fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) {
  const Digest digest = *chunk.digest();
  std::vector<Neighbour*> tried;
  while (const std::shared_ptr<Neighbour> neighbour = choose(digest, tried)) {
    bool fetched = false, is_wrong = false;
    {
      const std::lock_guard lock(mutex_);
      ++neighbour->n_in_flight;
      ++neighbour->n_asked;
    }
    try {
      fetched = neighbour->fetch(digest, out, is_wrong);
    } catch (const Error& error) {
      spdlog::debug("chunk {}: {}", digest.hex(), error.what());  // the next one is asked
    }
    {
      const std::lock_guard lock(mutex_);
      --neighbour->n_in_flight;
      if (fetched) came_from_[digest] = neighbour;
    }
    if (fetched) return true;
    if (is_wrong) note_wrong(*neighbour);
    tried.push_back(neighbour.get());
  }
  const std::lock_guard lock(mutex_);
  if (!ended_.empty()) throw Error(ended_);
  if (std::ranges::all_of(neighbours_, [](const auto& neighbour) { return neighbour->is_lost(); }))
    throw Error("none is left");
  return false;
}

void PeerWeightSource::rejected(const weights::ChunkRef& chunk) {
  std::shared_ptr<Neighbour> neighbour;
  {
    const std::lock_guard lock(mutex_);
    neighbour = came_from_.at(*chunk.digest());
  }
  note_wrong(*neighbour);
}

void PeerWeightSource::note_wrong(Neighbour& neighbour) {
  {
    const std::lock_guard lock(mutex_);
    if (++neighbour.n_wrong < kMaxWrong) return;
  }
  if (neighbour.is_lost()) return;
  spdlog::warn("backend {} sent wrong bytes for {} chunks: it is asked for no more", neighbour.who(), kMaxWrong);
  neighbour.leave("it sent wrong bytes");
}

}  // namespace caravan::remote
