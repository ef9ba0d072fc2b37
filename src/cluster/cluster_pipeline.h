// The pipeline over stages, here and on backends: connects, places layers, loads, relays activations from stage to
// stage, notices losses and plans again. Implements engine::Pipeline.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cluster/backend.h"
#include "device/device.h"
#include "engine/pipeline.h"
#include "gguf/reader.h"
#include "models/arch.h"
#include "plan/placement.h"
#include "weights/hash_memory.h"

namespace caravan::cluster {

struct ClusterOptions {
  std::vector<std::string> backends;              // host:port, in the order of layers; empty: everything local
  std::chrono::seconds rpc_wait{60};              // for backends at the start
  std::chrono::seconds return_wait{10};           // for a lost backend, before a plan is tried without it
  std::chrono::milliseconds retry_interval{500};  // between attempts to connect
  // Types, sizes and slots of the cache; n_blocks is chosen by placement.
  stage::CacheConfig cache;
  uint32_t n_ctx = 0;  // 0: the largest that fits
  std::optional<uint32_t> n_gpu_layers;
  std::vector<double> tensor_split;
  uint64_t local_memory = 0;  // bytes the server's own stages may take; 0: no local stages beside backends
  int n_hash_threads = 1;
  std::filesystem::path hash_folder;  // where hashes of models are remembered; empty: nowhere
};

class ClusterPipeline : public engine::Pipeline {
 public:
  // Reads nothing yet. model, device (for local stages) and connector outlive the pipeline; connector may be null when
  // there are no backends. Throws NotSupportedError for an unknown architecture, FormatError for a model that does not
  // fit it, RequestError for a tensor_split that does not match the backends.
  ClusterPipeline(const gguf::Model& model, device::Device& device, BackendConnector* connector,
                  ClusterOptions options);
  ~ClusterPipeline() override;

  // Connects, places, loads and opens the first plan; blocks. Afterwards a thread of its own watches the backends.
  // Throws ResourceError with need and have, Error naming the missing backends, or what loading threw.
  void start();

  uint64_t submit(stage::Batch batch) override;
  std::optional<engine::PipelineEvent> poll(std::chrono::milliseconds timeout) override;
  void wake() override;

  const models::Hyperparameters& hyperparameters() const { return hp_; }
  // Tokens of a lost plan that came late and were dropped.
  uint64_t n_stale() const { return n_stale_.load(); }

 private:
  class Hop;
  struct ActivePlan;
  struct Seat;
  // A connection that ended: which one of which seat, and why.
  struct Loss {
    size_t seat;
    uint64_t connection;
    std::string reason;
  };
  // What the watching thread waits for.
  struct Watch {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Loss> lost;  // under mutex
    void report(Loss loss);
  };

  enum class Refusal { fails, waits };  // what a backend that refuses us for good does to the others
  void connect_missing(std::chrono::steady_clock::time_point deadline, Refusal refusal);
  bool connect(size_t index, Refusal refusal);
  std::vector<std::string> missing() const;
  engine::PlanSummary make_plan();
  void load_stage(const plan::PlacedStage& placed, const plan::Placement& placement, stage::Stage& stage,
                  const std::string& name);
  weights::Manifest manifest_of(const stage::Slice& slice, bool hashed);
  plan::PlacementRequest placement_request() const;
  void watch();
  void recover(const std::string& reason);
  void drop_lost_connections();
  void push(engine::PipelineEvent event);
  void push_from(const ActivePlan& plan, engine::PipelineEvent event);
  void stage_delivered(ActivePlan& plan, size_t stage, stage::StageOutput output) noexcept;
  bool stopping() const { return stopping_.load(); }

  const gguf::Model& model_;
  device::Device& device_;
  BackendConnector* const connector_;
  const ClusterOptions options_;
  const models::Arch& arch_;
  const gguf::Metadata hyperparameter_metadata_;
  const models::Hyperparameters hp_;
  const uint64_t session_;  // random, names this server's use of the stages

  // Used by start() and then by the watching thread only.
  std::vector<Seat> seats_;      // one per backend
  weights::ModelHashes hashes_;  // of the model's tensors, computed when a backend first needs them
  uint64_t epoch_ = 0;

  std::mutex plan_mutex_;
  std::unique_ptr<ActivePlan> active_;  // under plan_mutex_
  std::atomic<uint64_t> next_ticket_{1};
  uint64_t polled_epoch_ = 0;  // of the plan that poll() told of last; only the polling thread uses it
  std::atomic<uint64_t> n_stale_{0};

  std::mutex events_mutex_;
  std::condition_variable events_changed_;
  std::deque<engine::PipelineEvent> events_;  // under events_mutex_
  bool woken_ = false;                        // under events_mutex_

  const std::shared_ptr<Watch> watch_ = std::make_shared<Watch>();  // shared with callbacks that may come late
  std::atomic<bool> stopping_{false};
  std::thread watcher_;
};

}  // namespace caravan::cluster
