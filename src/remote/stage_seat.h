// One stage of one peer on a backend: loading, sessions and tickets of that stage.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>

#include "remote/activity.h"
#include "remote/channel.h"
#include "remote/inlet.h"
#include "remote/local_weights.h"
#include "remote/peer_link.h"
#include "remote/reaper.h"
#include "remote/remote_weight_source.h"
#include "remote/slice_store.h"
#include "stage/stage.h"

namespace caravan::remote {

// What a seat needs of its backend; all of it outlives the seat.
struct SeatContext {
  SliceHost& host;
  SliceStore& store;
  LocalWeights& local;
  Reaper& reaper;
  net::IoThreads& io;  // for connections to other backends
  PeerOptions peers;
  InletTable& inlets;
  SilentPeers& silent_peers;
  std::chrono::milliseconds others_timeout;  // to connect to one that may have weights
};

// Handlers are called on the channel's executor and return at once; what blocks (loading, opening a session while a
// step computes, connecting to the next stage) runs on the seat's own thread, in order. Destroying a seat frees its
// memory; it waits for the step in progress, so it happens on the reaper's thread.
class StageSeat : private stage::OutputSink, private Inlet::Receiver {
 public:
  StageSeat(uint32_t stage, std::shared_ptr<Channel> channel, SeatContext context);
  ~StageSeat() override;

  // The seat's work can be abandoned: loading fails, what waits ends. The destructor does it too.
  void cancel(const std::string& reason);

  void reserve(const pb::Reserve& message);
  // Throws ProtocolError or FormatError for a request that does not decode.
  void load(const pb::LoadSlice& header, std::span<const std::byte> payload);
  void chunk(const pb::Chunk& header, std::vector<std::byte> payload);
  void open(const pb::OpenSession& message);
  void close_session(const pb::CloseSession& message);
  // A step from the server. Throws ProtocolError (wrong state, duplicate ticket, too many tickets) or FormatError (does
  // not decode).
  void forward(const pb::Forward& header, std::vector<std::byte> payload);

  // Longest payload of a Forward that this stage takes; 0 before it is loaded.
  uint64_t max_forward_bytes() const override;
  uint64_t n_stale() const { return n_stale_.load(); }
  // Tickets that have been enqueued and not delivered.
  size_t n_in_flight() const;
  StageQueue queue() const;
  StageStatus status() const;

 private:
  struct Shape {
    stage::BatchLimits limits;
    uint32_t n_embd = 0;
    stage::Slice slice;
  };

  // A step that was taken and not delivered.
  struct Ticket {
    uint64_t bytes = 0;
    std::vector<std::byte> batch;      // as it came, for the next stage; empty when the output goes to the server
    std::vector<uint32_t> compute_us;  // at the stages before
    std::chrono::steady_clock::time_point came;
  };
  enum class Source { server, peer };

  void deliver(stage::StageOutput output) noexcept override;
  void receive(const pb::Forward& header, std::vector<std::byte> payload) override;
  void peer_lost(uint64_t session, uint64_t epoch, const std::string& reason) override;
  void take(const pb::Forward& header, std::vector<std::byte> payload, Source source);
  void run_open(const pb::OpenSession& message);
  void connect_neighbours(const pb::OpenSession& message);
  void close_routes(const std::string& reason);
  void post(std::function<void()> job);
  void work(std::stop_token stop);
  void run_load(const stage::LoadRequest& request);
  void report(const std::exception& error, pb::Error::Code code);
  // Runs a job and reports what it throws as an Error of this stage.
  void guarded(const std::function<void()>& job);
  void send_output_error(const stage::Fence& fence, const std::string& error);

  const uint32_t id_;
  const std::shared_ptr<Channel> channel_;
  const SeatContext context_;
  std::atomic<uint64_t> n_stale_{0};
  // Shared with callbacks that may come late.
  const std::shared_ptr<std::atomic<uint64_t>> n_hops_lost_ = std::make_shared<std::atomic<uint64_t>>(0);

  mutable std::mutex mutex_;
  uint64_t session_ = 0, epoch_ = 0;            // under mutex_
  bool is_open_ = false;                        // under mutex_
  Source source_of_input_ = Source::server;     // under mutex_; of the session
  bool hands_on_ = false;                       // under mutex_; the session's output goes to the next stage
  std::shared_ptr<Inlet> inlet_;                // under mutex_
  std::shared_ptr<PeerLink> outlet_;            // under mutex_
  std::optional<Shape> shape_;                  // under mutex_; set while loaded
  std::map<stage::Fence, Ticket> in_flight_;    // under mutex_
  uint64_t in_flight_bytes_ = 0;                // under mutex_
  Activity activity_;                           // under mutex_
  stage::MemoryNeed held_;                      // under mutex_; of the loaded slice
  std::shared_ptr<RemoteWeightSource> source_;  // under mutex_; while loading
  std::shared_ptr<PeerWeightSource> others_;    // under mutex_; while loading
  std::string cancelled_;                       // under mutex_
  std::condition_variable_any jobs_changed_;
  std::deque<std::function<void()>> jobs_;  // under mutex_
  size_t n_pending_jobs_ = 0;               // under mutex_; the running one included

  // Destroyed in this order: thread, stage, lease.
  SliceStore::Lease lease_;              // on the seat's thread
  std::unique_ptr<stage::Stage> stage_;  // set on the seat's thread while shape_ is empty
  std::jthread thread_;
};

}  // namespace caravan::remote
