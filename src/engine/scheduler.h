// Which rows go into the next batch: continuous batching over paged KV. Holds all accepted sequences, the block
// allocators and the block tables; knows neither threads nor streams nor text.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/pipeline.h"
#include "engine/prefix_cache.h"
#include "engine/sequence.h"
#include "engine/stage_cost.h"

namespace caravan::engine {

// True when rows attend within the batch and nothing is cached (BERT): a sequence must be one chunk.
bool is_encoder(const PlanSummary& plan);

// The longest sequence that a plan can hold: n_ctx, or less where the blocks of a group do not suffice.
uint32_t effective_context(const PlanSummary& plan);

// The rows of one sequence in a batch.
struct BatchPart {
  uint64_t sequence = 0;
  uint32_t incarnation = 0;
  uint32_t first_position = 0, n_rows = 0;
  uint32_t first_output = 0, n_outputs = 0;  // into Batch::outputs
  bool reaches_end = false;                  // holds the sequence's last token
};

struct ScheduledBatch {
  stage::Batch batch;
  std::vector<BatchPart> parts;
  uint32_t n_recomputed = 0;  // rows that were computed before, for sequences that lost their KV
  bool decodes = false;       // holds rows of answers
};

class Scheduler {
 public:
  // n_parallel 0: the plan's max_slots. max_in_flight: batches with rows of answers; 0: one per stage.
  Scheduler(uint32_t n_parallel, uint32_t max_in_flight) : n_parallel_(n_parallel), max_in_flight_(max_in_flight) {}

  // Takes the limits of a new plan with an empty KV cache: every sequence waits, to be computed again from its first
  // token.
  void set_plan(const PlanSummary& plan);

  // As set_plan() with the same plan: nothing that was computed is left. No batch is asked for before the next
  // set_plan().
  void lose_plan();

  // Adds a sequence that waits for a place. Its tokens are fewer than effective_context(plan).
  void add(std::unique_ptr<Sequence> sequence);

  // Removes a sequence; its blocks and slot are free from the next batch on. Results still in flight are void.
  std::unique_ptr<Sequence> remove(uint64_t id);

  // The sequence that a part of a completed batch belongs to, or nullptr when it is gone or was preempted since.
  Sequence* find(const BatchPart& part);

  // All sequences, oldest first. A function given the sequences must not add or remove.
  const std::map<uint64_t, std::unique_ptr<Sequence>>& sequences() const { return sequences_; }

  // Discards tokens [first, first + n) of a running sequence without a result in flight: what follows them moves up and
  // is computed again. Some token is left after them.
  void discard(Sequence& sequence, uint32_t first, uint32_t n);

  // Forgets what is cached for these tokens, as far as no longer text shares it.
  void erase_cached(std::span<const int32_t> tokens) { cache_.erase(tokens); }

  // The next batch: decode rows first, then prefill chunks, oldest first within each. The tokens it holds count as
  // scheduled. A batch without rows only frees blocks at the stages. nullopt: nothing to do before a result comes.
  // While something is in flight, freeing waits for the next rows, and a sequence that finds no block waits for a
  // result.
  struct InFlight {
    uint32_t n = 0, n_decoding = 0;  // batches, and those of them with rows of answers
  };
  std::optional<ScheduledBatch> next_batch(InFlight in_flight);

  // A completed batch took so long at each stage; empty: not known.
  void note_times(const ScheduledBatch& batch, std::span<const double> stage_seconds);

  // A batch failed, so it is unknown which of its block operations were applied: empties the prefix cache and all block
  // tables, here and, with the next batch, at the stages. Running sequences wait, to be computed again; results in
  // flight are void.
  void recompute_all();

  uint32_t n_slots() const { return static_cast<uint32_t>(slots_.size()); }
  uint32_t n_running() const { return n_running_; }
  uint32_t n_waiting() const { return static_cast<uint32_t>(sequences_.size()) - n_running_; }
  // On several stages there is room for one more batch, of prompts only: the first stage need not wait for a result.
  uint32_t max_in_flight() const;
  uint64_t n_preemptions() const { return n_preemptions_; }
  // Blocks held by sequences / all blocks of the fullest group; those that only the prefix cache keeps count as free.
  double kv_usage() const;

 private:
  struct Chunk {
    Sequence* sequence;
    uint32_t n_rows;
  };

  void admit();
  std::optional<stage::Slot> free_slot(const Sequence& waiting) const;
  Chunk oldest_chunk();
  bool fits_now(const Sequence& waiting) const;
  std::vector<Chunk> choose(InFlight in_flight);
  uint32_t n_groups() const;
  uint32_t prompt_rows();
  void take_cached_prefix(Sequence& sequence);
  void copy_partial(Sequence& sequence, const PrefixMatch& match);
  uint32_t allocate(uint32_t group, uint32_t n_wanted);
  void reserve(std::vector<Chunk>& chunks);
  uint32_t rows_that_fit(const Sequence& sequence) const;
  void drop_left_windows(Sequence& sequence);
  void append_blocks(Sequence& sequence, uint32_t n_rows);
  Sequence* newest_after(uint64_t id) const;
  void preempt(Sequence& sequence);
  enum class Blocks { cached, dropped };
  void release(Sequence& sequence, Blocks blocks = Blocks::cached);
  void add_rows(ScheduledBatch& scheduled, const Chunk& chunk);
  void add_outputs(ScheduledBatch& scheduled, BatchPart& part, Sequence& sequence, uint32_t first_row);

  const uint32_t n_parallel_;
  const uint32_t max_in_flight_;
  PlanSummary plan_;
  bool encoder_ = false;
  std::vector<BlockAllocator> allocators_;  // per cache group
  PrefixCache cache_;
  std::vector<bool> slots_;                                  // in use
  std::map<uint64_t, std::unique_ptr<Sequence>> sequences_;  // by age
  uint32_t n_running_ = 0;
  std::vector<stage::KvOp> ops_;  // changes since the last batch, in the order they happened
  uint64_t n_preemptions_ = 0;
  StageCost cost_;
  uint32_t prompt_rows_ = 0;     // rows of prompts per batch, chosen for what waited then
  uint64_t prompt_waiting_ = 0;  // tokens of prompts that waited when the last batch was chosen
};

}  // namespace caravan::engine
