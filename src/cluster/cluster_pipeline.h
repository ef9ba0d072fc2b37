// The pipeline over stages, here and on backends: places layers, loads, joins stages so that activations go from
// one to the next (or relays them where backends cannot reach each other), and plans again when backends come and go.
// A plan is one replica of the model or several, each a row of stages that is lost or replaced without the others.
// Implements engine::Pipeline.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "cluster/backend.h"
#include "cluster/membership.h"
#include "cluster/plan_loader.h"
#include "cluster/planner.h"
#include "cluster/replica.h"
#include "device/device.h"
#include "engine/pipeline.h"
#include "gguf/reader.h"
#include "models/arch.h"
#include "plan/placement.h"
#include "remote/reaper.h"
#include "stage/local_stage.h"

namespace caravan::cluster {

struct ClusterOptions : PlannerOptions {
  std::vector<std::string> backends;              // host:port, in the order of layers; empty: everything local
  std::chrono::seconds rpc_wait{60};              // for backends at the start
  bool waits_on = false;                          // after that, too, where start() would throw because some are missing
  std::chrono::milliseconds retry_interval{500};  // between attempts to connect, and to plan
  std::chrono::milliseconds ticket_patience{30000};         // see longest_wait()
  std::chrono::milliseconds first_ticket_patience{300000};  // the same for stages of which no speed is known yet
  std::chrono::milliseconds poll = stage::kDefaultPoll;     // of the server's own stages, see stage::LocalStage
  int n_hash_threads = 1;
  std::filesystem::path hash_folder;  // where hashes of models are remembered; empty: nowhere
  bool relay = false;                 // activations go through this process even where backends reach each other
};

class ClusterPipeline : public engine::Pipeline {
 public:
  // Reads nothing yet. model, device (for local stages) and connector outlive the pipeline; connector may be null when
  // there are no backends. Throws NotSupportedError for an unknown architecture, FormatError for a model that does not
  // fit it, RequestError for a tensor_split that does not match the backends.
  ClusterPipeline(const gguf::Model& model, device::Device& device, BackendConnector* connector,
                  ClusterOptions options);
  ~ClusterPipeline() override;

  // Connects, places, loads and opens the first plan; blocks. Afterwards a thread of its own watches the backends: a
  // lost one ends the plan at once, and what is left or returns gets the next; one that comes gets its part of a new
  // plan, which is loaded beside the one in use where memory allows.
  // Throws ResourceError with need and have, Error naming the missing backends, or what loading threw. With waits_on it
  // goes on waiting for missing backends instead, and logs for whom.
  void start();

  // Connects and places as start() would, and loads nothing. Instead of start(). Throws as start().
  struct Proposal {
    plan::Placement placement;
    std::vector<plan::DeviceOffer> offers;
    std::vector<std::optional<Backend::Speeds>> speeds;  // parallel to offers
    std::map<size_t, std::string> left_out;              // why, by index of the offer
    std::vector<std::string> missing;                    // backends that did not answer
  };
  Proposal propose();
  // Of the plan in use, where speeds are known.
  std::optional<plan::Prediction> prediction() const;

  uint64_t submit(stage::Batch batch, uint64_t replica) override;
  std::optional<engine::PipelineEvent> poll(std::chrono::milliseconds timeout) override;
  void wake() override;
  bool plan_is_loading() const override { return plan_is_loading_; }
  engine::PipelineStatus status() const override;

  const models::Hyperparameters& hyperparameters() const { return hp_; }
  // Tokens of a lost plan that came late and were dropped.
  uint64_t n_stale() const { return n_stale_.load(); }

 private:
  class Hop;
  struct ActivePlan;
  using Candidate = Planner::Candidate;
  using Choice = Planner::Choice;
  using Situation = Planner::Situation;
  struct Planning;
  struct Loading;
  // A replica in use that ends.
  struct Loss {
    uint64_t epoch;
    std::string reason;
    std::string device;  // that was lost or failed; empty: the model is placed anew
  };
  // What the watching thread waits for.
  struct Watch {
    std::mutex mutex;
    std::condition_variable changed;
    bool signalled = false;     // under mutex
    std::deque<Loss> failures;  // under mutex: of replicas whose connections stand
    void signal();
    void report(Loss failure);
  };

  // The first plan.
  void wait_for_backends(std::chrono::steady_clock::time_point deadline);
  void make_first_plan();
  void keep_waiting(const std::string& why);

  Situation situation() const;
  const Replica* in_use(const Candidate& candidate, size_t replica) const;
  std::vector<const ReplicaPart*> parts_in_use() const;
  void load_plan(Loading& loading);
  engine::PlanSummary limits(const plan::Placement& placement) const;
  void activate(Loading& loading);

  // The watching thread.
  void watch();
  void retire_broken();
  static std::optional<Loss> why_broken(const Replica& replica, const std::deque<Loss>& failures);
  void retire(const std::vector<Loss>& losses);
  void dispose(std::vector<std::unique_ptr<Replica>> replicas);
  void retire_for_another(const std::vector<uint64_t>& kept);
  std::optional<Loss> overdue(Replica& replica);
  std::optional<size_t> hanging_stage(const Replica& replica, size_t first) const;
  void begin_planning(Situation situation, Choice last, std::string why);
  void finish_planning();
  void planning_failed(const Planning& planning);
  void take_better(const Planning& planning, Candidate candidate);
  void begin_loading(Candidate candidate);
  std::string why_useless(const Loading& loading) const;
  void finish_loading();
  void loading_failed(Loading& loading);
  bool note_stall(const Loading& loading);
  void avoid(const std::string& device);
  void plan_again();
  void plan_better();

  void push_from(const Replica& replica, engine::PipelineEvent event);
  void start_step(Replica& replica, size_t stage, uint64_t ticket, std::shared_ptr<const stage::Batch> batch,
                  std::vector<float> input);
  void stage_delivered(Replica& replica, size_t stage, stage::StageOutput output) noexcept;
  bool stopping() const { return stopping_.load(); }

  BackendConnector* const connector_;
  const ClusterOptions options_;
  const models::Arch& arch_;
  const gguf::Metadata hyperparameter_metadata_;
  const models::Hyperparameters hp_;
  const uint64_t session_;  // random, names this server's use of the stages

  Planner planner_;    // used by start() and then by the thread that plans
  PlanLoader loader_;  // used by start() and then by the thread that loads a plan

  // Used by start() and then by the watching thread only.
  uint64_t n_plans_ = 0;
  struct Avoided {
    std::chrono::steady_clock::time_point until;
    std::chrono::milliseconds wait;
    bool was_over = false;
  };
  std::map<std::string, Avoided> avoided_;  // devices that failed lately, by name
  std::string numeric_class_;               // of all stages of the last plan; empty: they differ, or there is none
  std::unique_ptr<Planning> planning_;      // at most one of
  std::unique_ptr<Loading> loading_;        // these two
  std::chrono::steady_clock::time_point relay_until_;  // until then no stage hands its output on by itself
  bool hops_failed_ = false;                           // since the last plan was begun
  uint64_t considered_ = 0;  // the membership's generation that the plan in use was compared with
  uint32_t n_refused_ = 0;   // reservations, one after the other
  // Of backends whose stages were loaded for the next plan and stood still.
  std::set<std::shared_ptr<const Membership::Connection>> stalled_;
  std::optional<std::chrono::steady_clock::time_point> lost_since_;
  bool recovers_ = false;  // the plan was lost with a device, and not for another plan
  std::chrono::steady_clock::time_point next_attempt_, next_log_;

  mutable std::mutex plan_mutex_;
  std::unique_ptr<ActivePlan> active_;  // changed by the watching thread, under plan_mutex_
  engine::RecoveryCounters recovery_;   // the same
  std::atomic<uint64_t> next_ticket_{1};
  std::atomic<uint64_t> n_stale_{0};

  std::mutex events_mutex_;
  std::condition_variable events_changed_;
  std::deque<engine::PipelineEvent> events_;  // under events_mutex_
  bool woken_ = false;                        // under events_mutex_

  const std::shared_ptr<Watch> watch_ = std::make_shared<Watch>();  // shared with callbacks that may come late
  std::unique_ptr<Membership> membership_;  // null: there are no backends; set under plan_mutex_
  std::atomic<bool> stopping_{false}, plan_is_loading_{false};
  remote::Reaper reaper_;  // destroys replicas: their stages may finish a step first
  std::thread watcher_;
};

}  // namespace caravan::cluster
