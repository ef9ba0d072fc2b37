// A stage on a backend, driven over a link.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "remote/backend_link.h"
#include "remote/local_weights.h"
#include "stage/stage.h"

namespace caravan::remote {

// A backend gives signs of life, but none of working on what its stage was asked.
class StalledError : public Error {
 public:
  using Error::Error;
};

// How long a backend may be silent about what its stage was asked. While it loads it tells at every chunk: 4 MiB, which
// take so long where less than 140 kB arrive a second. Shorter than engine::EngineOptions::recovery_timeout, so that
// time is left for others to take its place.
inline constexpr std::chrono::milliseconds kStagePatience{30000};

class RemoteStage : public stage::DirectStage {
 public:
  // device: index into BackendInfo::devices. reserve(), load() and open() with routes throw StalledError when nothing
  // is heard about them for patience.
  explicit RemoteStage(std::shared_ptr<BackendLink> link, size_t device = 0,
                       std::chrono::milliseconds patience = kStagePatience);
  // The backend frees the KV cache; the weights stay for its keep_alive. No sink is called afterwards. Does not wait:
  // what the backend is asked next, it does after this.
  ~RemoteStage() override;

  // Keeps memory on the device until load() or the destructor; blocks. key: content_key() of the request to come.
  // Throws ResourceError with need and have; Error when the link is lost.
  void reserve(const stage::MemoryNeed& need, const Digest& key);
  void reserve(const stage::LoadRequest& request, const stage::MemoryNeed& need) override;

  // Other backends that the next load() may ask for chunks, where the backend knows how to.
  void ask_others(std::vector<PeerAddress> others) { others_ = std::move(others); }

  // The manifest must have hashes: the backend asks for chunks by them, and they are read from sources on the calling
  // thread. on_progress is called for each chunk sent, too: what it throws ends the load.
  void load(const stage::LoadRequest& request, std::span<weights::WeightSource* const> sources,
            const ProgressFunction& on_progress) override;
  // What the backend said it holds for the loaded stage.
  const stage::MemoryNeed& held() const;
  // Weight bytes of the last load() that crossed the wire.
  uint64_t pulled_bytes() const;
  // Of the last load(): where the backend says that the weights came from. All 0 when they were resident.
  WeightOrigins origins() const;

  // Batches that are there and not computed, as of the last heartbeat.
  StageQueue queue() const { return link_->queue(stage_); }
  // The same as of now; nullopt when the backend does not answer within timeout.
  std::optional<StageQueue> ask_queue(std::chrono::milliseconds timeout) const;

  void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) override;
  stage::PeerRoute address() const override;
  void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink, const stage::Routes& routes) override;
  void expect(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch) override;
  // When the link is lost, the sink gets an error for this and every ticket in flight.
  void enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch, std::vector<float> input) override;
  std::string numeric_class() const override;

 private:
  class State;
  bool begin_session(uint64_t session, uint64_t epoch, stage::OutputSink& sink, const stage::Routes& routes);
  const std::shared_ptr<BackendLink> link_;
  const size_t device_;
  const std::chrono::milliseconds patience_;
  const std::shared_ptr<State> state_;  // shared with the link, which may be delivering to it
  const uint32_t stage_;
  std::vector<PeerAddress> others_;  // used by who loads
};

}  // namespace caravan::remote
