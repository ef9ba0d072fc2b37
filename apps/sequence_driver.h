// Runs the tokens of one sequence through a pipeline, without an engine: for logits and benchmarks.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/pipeline.h"

namespace caravan::app {

// Sequences [0, n_sequences) with block tables of their own. Used by one thread, which alone uses the pipeline.
class SequenceDriver {
 public:
  // Waits for the pipeline's plan. Throws Error when it is lost or does not come within a minute.
  explicit SequenceDriver(engine::Pipeline& pipeline);

  const engine::PlanSummary& plan() const { return plan_; }

  // Computes tokens that follow what the sequence of this slot holds, in chunks of at most max_chunk rows (0: the
  // plan's), and returns the outputs of the rows in `wanted` (indices into tokens, ascending), in that order. Throws
  // Error when the pipeline fails, ResourceError when the context is full.
  std::vector<stage::RowOutput> forward(stage::Slot slot, std::span<const int32_t> tokens,
                                        std::span<const uint32_t> wanted, const stage::OutputRequest& output,
                                        uint32_t max_chunk = 0);
  // One token for each of the slots, as one batch; their outputs in that order.
  std::vector<stage::RowOutput> step(std::span<const stage::Slot> slots, std::span<const int32_t> tokens,
                                     const stage::OutputRequest& output);
  // Forgets the sequence of a slot.
  void clear(stage::Slot slot);
  uint32_t length(stage::Slot slot) const { return sequences_[slot].length; }

 private:
  struct Sequence {
    uint32_t length = 0;
    std::vector<std::vector<uint32_t>> blocks;  // per group, by logical index
    std::vector<uint32_t> n_dropped;            // per group: leading blocks given back
  };
  void add_row(stage::Batch& batch, stage::Slot slot, int32_t token);
  void append_blocks(stage::Batch& batch, stage::Slot slot, uint32_t position);
  std::vector<stage::RowOutput> run(stage::Batch batch);

  engine::Pipeline& pipeline_;
  engine::PlanSummary plan_;
  std::vector<Sequence> sequences_;
  std::vector<std::vector<uint32_t>> free_blocks_;  // per group
  std::vector<stage::KvOp> pending_ops_;            // of cleared sequences
};

}  // namespace caravan::app
