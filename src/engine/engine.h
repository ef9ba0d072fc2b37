// The engine: takes requests from any thread and answers them through a Pipeline. One thread of its own holds all
// mutable state (scheduler, sequences, block tables); everything else only queues a request or reads a snapshot.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/pipeline.h"
#include "engine/request.h"

namespace caravan::vocab {
class Vocabulary;
}

namespace caravan::engine {

struct EngineOptions {
  uint32_t n_parallel = 0;            // sequences computed at the same time; 0: the plan's max_slots
  uint32_t max_queue = 256;           // requests that wait for a place; one more is refused
  uint32_t max_in_flight = 0;         // batches in the pipeline at the same time; 0: one per stage
  uint32_t max_stream_events = 8192;  // unread events after which a consumer counts as too slow
  uint64_t max_stream_bytes = uint64_t{8} << 20;
  // A request that finds no plan for so long after one was lost ends with an error.
  std::chrono::milliseconds recovery_timeout{60000};
  bool context_shift = false;  // a full context loses its older tokens instead of ending the answer
};

// Since the engine started; what /metrics shows.
struct EngineCounters {
  uint64_t requests = 0;              // accepted
  uint64_t finished = 0;              // answered to the end
  uint64_t failed = 0;                // ended with an ErrorEvent
  uint64_t cancelled = 0;             // the consumer left
  uint64_t refused = 0;               // submit() or embed() threw
  uint64_t prompt_tokens = 0;         // evaluated
  uint64_t cached_prompt_tokens = 0;  // taken from the prefix cache
  double prompt_seconds = 0;          // time sequences spent from their first prefill to their first token
  uint64_t predicted_tokens = 0;
  double predicted_seconds = 0;    // time sequences spent from their first to their last token
  uint64_t recomputed_tokens = 0;  // prefilled again after a preemption or a change of the plan
  uint64_t preemptions = 0;
  uint64_t plans_lost = 0;
  uint64_t batches = 0;
  uint64_t rows = 0;             // in all batches
  uint64_t busy_slot_steps = 0;  // sequences in each batch, summed
  uint64_t max_tokens = 0;       // longest sequence seen, prompt and answer
};

struct EngineStatus {
  enum class State : uint8_t {
    loading,  // no plan yet
    ready,
    no_plan,   // the plan was lost, reason says why; requests wait for the next
    stopping,  // shutdown() was called
  };
  State state = State::loading;
  std::string reason;
  std::optional<PlanSummary> plan;  // the current one; only when ready or stopping
  uint32_t slots_total = 0, slots_busy = 0;
  uint32_t queue_length = 0;
  double kv_usage_ratio =
      0;  // blocks held by sequences / all, of the fullest cache group, 0..1; what only a prefix cache keeps is free
  std::vector<double> replica_kv_usage;  // the same of each of the plan's replicas; empty: there is no plan
  EngineCounters counters;
};

// A slot and the generating request that runs in it or ran there last.
struct SlotStatus {
  struct Task {
    uint64_t id = 0;
    uint32_t n_prompt = 0;           // tokens
    uint32_t n_prompt_computed = 0;  // of them, until now, without the cached ones
    uint32_t n_cached = 0;
    uint32_t n_predicted = 0;
    bool has_new_line = false;                     // in the answer
    uint32_t seed = 0;                             // of the random stream
    std::shared_ptr<const GenerateParams> params;  // without the prompt; shared by snapshots
  };
  uint32_t id = 0;
  bool processing = false;
  std::optional<Task> task;  // unset: none yet
};

// Generates and embeds for many requests at once. All functions may be called from any thread.
class Engine {
 public:
  // Starts the engine's thread, which alone uses pipeline from now on (but for what any may). pipeline and vocabulary
  // must outlive the engine.
  Engine(Pipeline& pipeline, const vocab::Vocabulary& vocabulary, EngineOptions options = {});

  // shutdown() without patience.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues a request and returns the stream of its answer: TokenEvents, then a FinalEvent; or an ErrorEvent at any
  // point. While a lost plan is replaced, requests wait: the tokens of a running one come as if nothing had happened.
  // Throws RequestError: invalid (a bad parameter, named), unavailable (loading, queue full, stopping),
  // not_supported (the model is an encoder); ContextExceededError when the prompt leaves no room in the context.
  std::shared_ptr<TokenStream> submit(GenerateParams params);

  // Throws what submit() would throw for this grammar. What it compiles submit() finds again.
  void check_grammar(const GrammarSpec& grammar);

  // Queues an embedding: one EmbeddingEvent, or an ErrorEvent. Throws like submit(); an input that an encoder cannot
  // take in one batch is RequestError(invalid) with "too large to process".
  std::shared_ptr<TokenStream> embed(EmbedParams params);

  // A snapshot; cheap.
  EngineStatus status() const;

  // What the pipeline says of its machines.
  PipelineStatus pipeline_status() const;

  // All slots of the current plan, or of the lost one; empty before the first.
  std::vector<SlotStatus> slots() const;

  // The tokens that the last request left in a slot: prompt and answer, as far as they were computed. Throws
  // RequestError: invalid (no such slot), unavailable (a request is running there, or there is no plan).
  std::vector<int32_t> slot_tokens(uint32_t slot) const;

  // Forgets slot_tokens(slot), also in the prefix cache as far as no longer text shares them. Returns how many there
  // were. Throws like slot_tokens().
  size_t erase_slot(uint32_t slot);

  // Waits until there is a plan, at most timeout. False: there is none; status().reason may say why.
  bool wait_until_ready(std::chrono::milliseconds timeout) const;

  // Refuses new requests, lets the accepted ones finish for at most grace, ends the rest with an ErrorEvent
  // (unavailable), and stops the thread. Further calls return at once.
  void shutdown(std::chrono::milliseconds grace);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace caravan::engine
