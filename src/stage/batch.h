// A batch: plain data that says what one step of the model computes. It is built by the engine, travels from stage to
// stage unchanged, and holds nothing that grows with the context: block tables are state at the stage, changed by
// KvOps.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace caravan::stage {

// A sequence's place in the tables of a session, [0, max_slots).
using Slot = uint32_t;

// For a cache group with a cache: positions [from, to) of the row's own sequence that it attends to (its own included).
// For a group without one (encoders): rows [from, to) of the batch.
struct VisibleRange {
  int32_t from = 0, to = 0;
  bool operator==(const VisibleRange&) const = default;
};

// Changes of a slot's block table in one cache group. All ops of a batch are applied, in order, before its rows are
// computed. Block ids are chosen by the engine; every stage of a pipeline has the same number of blocks per group.
struct KvOp {
  enum class Kind : uint8_t {
    append,      // slot's table in group gets `block` as its next logical block
    truncate,    // slot's tables in all groups are cut to the blocks that hold the first `n_tokens` tokens
    drop_front,  // the first `n_tokens` / block_tokens logical blocks of slot's table in group are forgotten (left
                 // windows); a shorter table grows to as many
    fork,  // slot's tables in all groups become those of `source` cut to the blocks of the first `n_tokens` tokens
    free,  // slot's tables in all groups are emptied
    copy_block,  // the contents of block `source` are copied to `block` in group (before a shared block is written)
  };
  Kind kind = Kind::append;
  uint32_t group = 0;
  Slot slot = 0;
  uint32_t block = 0;
  uint32_t source = 0;
  uint32_t n_tokens = 0;
  bool operator==(const KvOp&) const = default;
};

// What is wanted back for a row by the stage that holds the output matrix.
enum class OutputKind : uint8_t {
  none,
  hidden,      // the row after the final norm (embeddings), n_embd values
  logits,      // all n_vocab logits
  candidates,  // the top_k largest logits (ties: lowest id first), the log-sum-exp of all, and the logits of named ids
};

struct OutputRequest {
  uint32_t row = 0;  // index into the batch's rows, ascending within a batch
  OutputKind kind = OutputKind::logits;
  uint32_t top_k = 0;              // candidates only
  std::vector<int32_t> named_ids;  // candidates only
  bool operator==(const OutputRequest&) const = default;
};

// Parallel arrays, one entry per row, unless said otherwise.
struct Batch {
  // Token ids; the first stage embeds them.
  std::vector<int32_t> tokens;
  // Positions; component 0 counts tokens, 1..3 belong to multi-axis rope and repeat component 0 otherwise.
  std::vector<std::array<int32_t, 4>> positions;
  std::vector<Slot> slots;
  // n_rows x n_groups, row by row.
  std::vector<VisibleRange> visible;
  // In-batch ancestor bits, n_rows x n_rows, row by row (tree speculation, image spans); empty: visible ranges say it
  // all.
  std::vector<uint64_t> ancestors;
  // LoRA adapter ids; empty: none.
  std::vector<uint32_t> adapters;
  // Which rows' outputs are wanted.
  std::vector<OutputRequest> outputs;
  std::vector<KvOp> kv_ops;

  uint32_t n_rows() const { return static_cast<uint32_t>(tokens.size()); }
  bool operator==(const Batch&) const = default;
};

// The result for one OutputRequest.
struct RowOutput {
  uint32_t row = 0;
  OutputKind kind = OutputKind::logits;
  std::vector<float> values;  // hidden, logits: all values; candidates: the top_k logits, then those of named_ids
  std::vector<int32_t> ids;   // candidates: ids of the top_k
  float log_sum_exp = 0;      // candidates: over all logits
};

// What the limits of a loaded plan are; a batch is checked against them before anything is computed.
struct BatchLimits {
  uint32_t max_rows = 512;
  uint32_t max_outputs = 512;
  uint32_t max_slots = 1;
  uint32_t n_vocab = 0;
  uint32_t block_tokens = 0;
  std::vector<uint32_t> n_blocks;  // per cache group (0: a group without cache)
};

// Checks a batch from outside against the limits: sizes of the arrays, token ids, slots, blocks, ranges, output rows.
// Throws ProtocolError naming the field, what was expected and found; NotSupportedError for ancestors and adapters.
void validate(const Batch& batch, const BatchLimits& limits);

}  // namespace caravan::stage
