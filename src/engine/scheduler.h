// Which rows go into the next batch of a replica: continuous batching over paged KV. Holds the block allocators and the
// block tables; knows neither threads nor streams nor text. The dispatcher gives it sequences and keeps those that
// wait.
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
  uint64_t replica = 0;  // ReplicaSummary::id
  stage::Batch batch;
  std::vector<BatchPart> parts;
  uint32_t n_recomputed = 0;  // rows that were computed before, for sequences that lost their KV
  bool decodes = false;       // holds rows of answers
};

class Scheduler {
 public:
  // For plan.replicas[replica], whose KV cache is empty. max_in_flight: batches with rows of answers; 0: one per stage.
  Scheduler(const PlanSummary& plan, size_t replica, uint32_t max_in_flight);

  // Takes in a sequence that waited and has a slot now. It outlives its time here.
  void admit(Sequence& sequence);

  // Whether a waiting sequence can be computed up to its next token from blocks that no running sequence holds or needs
  // for its own tokens, but for those of its prefix. Room for less would make it compute for nothing and be preempted
  // again.
  bool fits_now(const Sequence& waiting) const;

  // Tokens of a waiting sequence that need not be computed here.
  uint32_t n_cached(const Sequence& waiting) const;

  // Gives a sequence's blocks and slot back, from the next batch on: it waits again, or ends. Results still in flight
  // are void. dropped: what it leaves is of no use to others.
  enum class Blocks { cached, dropped };
  void release(Sequence& sequence, Blocks blocks = Blocks::cached);

  // Forgets what is cached for these tokens, as far as no longer text shares it.
  void erase_cached(std::span<const int32_t> tokens) { cache_.erase(tokens); }

  // Gives back the blocks that no later row of any sequence sees.
  void drop_left_windows();

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
  // tables, here and, with the next batch, at the stages. All sequences wait, to be computed again; results in flight
  // are void.
  void recompute_all();

  uint32_t n_running() const { return static_cast<uint32_t>(sequences_.size()); }
  uint64_t id() const { return replica_.id; }
  double speed() const { return replica_.speed; }
  // As another plan predicts it, beside other replicas.
  void set_speed(double speed) { replica_.speed = speed; }
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

  Chunk oldest_chunk();
  std::vector<Chunk> choose(InFlight in_flight);
  uint32_t n_groups() const;
  uint32_t prompt_rows();
  void take_cached_prefix(Sequence& sequence);
  void copy_partial(Sequence& sequence, const PrefixMatch& match);
  uint32_t allocate(uint32_t group, uint32_t n_wanted);
  void reserve(std::vector<Chunk>& chunks);
  uint32_t rows_that_fit(const Sequence& sequence) const;
  void drop_left_window(Sequence& sequence);
  void append_blocks(Sequence& sequence, uint32_t n_rows);
  Sequence* newest_after(uint64_t id) const;
  void preempt(Sequence& sequence);
  void add_rows(ScheduledBatch& scheduled, const Chunk& chunk);
  void add_outputs(ScheduledBatch& scheduled, BatchPart& part, Sequence& sequence, uint32_t first_row);

  const PlanSummary plan_;
  ReplicaSummary replica_;
  const uint32_t n_stages_;
  const uint32_t max_in_flight_;
  const bool encoder_;
  std::vector<BlockAllocator> allocators_;  // per cache group
  PrefixCache cache_;
  std::map<uint64_t, Sequence*> sequences_;  // that run here, by age
  std::vector<stage::KvOp> ops_;             // changes since the last batch, in the order they happened
  uint64_t n_preemptions_ = 0;
  StageCost cost_;
  uint32_t prompt_rows_ = 0;     // rows of prompts per batch, chosen for what waited then
  uint64_t prompt_waiting_ = 0;  // tokens of prompts that waited when the last batch was chosen
};

}  // namespace caravan::engine
