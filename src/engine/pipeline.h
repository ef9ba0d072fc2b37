// What the engine sees of the machines: batches go in, rows come out, plans come and go. It cannot tell local from
// remote.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "stage/batch.h"

namespace caravan::engine {

// One cache group as the engine needs it: which blocks to allocate and what a row may see.
struct GroupLimits {
  enum class Kind : uint8_t { full, window, none };  // none: an encoder, attends within the batch
  Kind kind = Kind::full;
  uint32_t window = 0;  // tokens, for Kind::window: a row at position p sees [p - window + 1, p]
  uint32_t n_blocks = 0;

  // The first position that the row at `position` sees.
  uint32_t first_visible(uint32_t position) const {
    return kind == Kind::window && position + 1 > window ? position + 1 - window : 0;
  }
};

// What one stage has done since its plan began; written while it computes.
struct StageCounters {
  std::atomic<uint64_t> batches{0};
  std::atomic<uint64_t> compute_us{0};
};

// One stage of the current plan, for people.
struct StageSummary {
  std::string device;  // "127.0.0.1:50052" or "local"
  uint32_t layer_begin = 0, layer_end = 0;
  bool embeds = false, outputs = false;
  uint64_t weight_bytes = 0, kv_bytes = 0, scratch_bytes = 0;
  // Weight bytes of a backend's stage by where they came from: names and bytes.
  std::vector<std::pair<std::string, uint64_t>> weights_from = {};
  std::shared_ptr<const StageCounters> counters = nullptr;  // shared with the plan, which goes on counting
  uint32_t replica = 0;                                     // index into PlanSummary::replicas
};

// A copy of the model: stages in a row with a KV cache of their own. The same id in the next plan means that it goes
// on, with what is in its cache and in flight; one that comes has an empty cache, and the tickets of one that goes are
// lost.
struct ReplicaSummary {
  uint64_t id = 0;
  double speed = 0;  // tokens per second of many sequences, as predicted; 0: not known
};

// The limits and parts of a usable plan. Limits (slots, rows, blocks) are those of each replica.
struct PlanSummary {
  uint64_t epoch = 0;                    // another one for every plan
  std::vector<ReplicaSummary> replicas;  // at least one
  uint32_t n_ctx = 0;                    // longest sequence
  uint32_t n_embd = 0;
  uint32_t n_vocab = 0;
  uint32_t block_tokens = 0;
  uint32_t max_rows = 0;     // rows per batch
  uint32_t max_outputs = 0;  // rows of a batch for which outputs may be wanted, at least max_slots; 0: all
  uint32_t max_slots = 0;
  std::vector<GroupLimits> groups;
  std::string numeric_class;
  std::vector<StageSummary> stages;  // replica by replica, in the order of layers
};

struct Completion {
  uint64_t ticket = 0;
  std::vector<stage::RowOutput> rows;  // in the order of Batch::outputs
  std::vector<double> stage_seconds;   // spent computing at each stage; empty: not known
};

// The ticket failed although the plan stands, e.g. the batch was refused; the reason is for the client.
struct TicketFailed {
  uint64_t ticket = 0;
  std::string reason;
};

// A usable plan: the first, or another one after a change; also what is left when a replica is lost.
struct PlanReady {
  PlanSummary plan;
};

// There is no usable plan: all tickets in flight are lost, and submit() must wait for the next PlanReady.
struct PlanLost {
  std::string reason;  // names the backend and what happened
};

using PipelineEvent = std::variant<Completion, TicketFailed, PlanReady, PlanLost>;

// What was lost since the start, and came back.
struct RecoveryCounters {
  uint64_t replicas_lost = 0;              // with a machine that was lost or failed, or with the way to it
  std::map<std::string, uint64_t> losses;  // the same, by machine
  uint64_t recoveries = 0;                 // requests could go on: at other replicas, or under the next plan
  double seconds = 0;                      // that these took
};

// What the machines of a pipeline do at the moment, for metrics.
struct PipelineStatus {
  // One that is connected, with layers or without.
  struct Machine {
    std::string name;
    double rtt_seconds = 0, mean_rtt_seconds = 0;  // of heartbeats: the latest, and a running mean; 0: none yet
    uint64_t received_bytes = 0, sent_bytes = 0;   // over its connection, from and to it
  };
  std::vector<Machine> machines;
  uint64_t epoch = 0;            // of the plan in use; 0: none
  std::vector<uint64_t> queues;  // per stage of it: batches that are there and not computed
  RecoveryCounters recovery;
};

// Used by one thread, the engine's. Completions, plan changes and failures arrive through one queue, in order.
class Pipeline {
 public:
  virtual ~Pipeline() = default;

  // Starts a batch on a replica of the plan and returns its ticket; never blocks. Only between PlanReady and PlanLost.
  virtual uint64_t submit(stage::Batch batch, uint64_t replica) = 0;

  // The next event, waiting at most timeout; nullopt when there is none, or when wake() was called.
  virtual std::optional<PipelineEvent> poll(std::chrono::milliseconds timeout) = 0;

  // Ends a poll() early, from any thread: something else is to be done. Without a poll() at the moment, the next one
  // returns at once.
  virtual void wake() = 0;

  // Whether a place for the next plan was found and is being filled: then a lost one is only a matter of time.
  virtual bool plan_is_loading() const { return false; }

  // From any thread.
  virtual PipelineStatus status() const { return {}; }
};

}  // namespace caravan::engine
