// One accepted request while the engine works on it: its tokens, its block tables, its sampler and its answer.
#pragma once

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <vector>

#include "engine/answer.h"
#include "engine/block_table.h"
#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/stream_state.h"
#include "stage/batch.h"

namespace caravan::engine {

// What only a generating sequence has.
struct Generation {
  std::shared_ptr<const GenerateParams> params;  // as asked for, without the prompt; shared with SlotStatus
  int32_t n_predict = -1;
  int64_t max_predict_ms = -1;
  bool report_progress = false;
  Sampler sampler;
  AnswerText answer;
  bool has_new_line = false;
};

// What only an embedding sequence has. Rows come in any order of batches and are kept by position.
struct Embedding {
  Pooling pooling = Pooling::mean;
  std::vector<float> rows;  // the wanted positions, n_embd values each
  uint32_t n_received = 0;

  // Whether the hidden row at position is wanted, and where it goes in rows.
  std::optional<uint32_t> index_of(uint32_t position, uint32_t n_tokens) const {
    if (pooling == Pooling::cls) return position == 0 ? std::optional<uint32_t>(0) : std::nullopt;
    if (pooling == Pooling::last) return position + 1 == n_tokens ? std::optional<uint32_t>(0) : std::nullopt;
    return position;
  }
  uint32_t n_wanted(uint32_t n_tokens) const {
    return pooling == Pooling::cls || pooling == Pooling::last ? 1 : n_tokens;
  }
};

// Owned by the engine's thread from the moment it leaves the inbox.
struct Sequence {
  uint64_t id = 0;              // grows with every request: age
  std::vector<int32_t> tokens;  // prompt and answer
  uint32_t n_prompt = 0;
  std::optional<uint32_t> wanted_slot;
  // Context shifts: how many tokens left `tokens`, and prompt and answer with them, for the sampler.
  uint32_t n_discarded = 0;
  std::vector<int32_t> full_history;     // empty without a shift
  bool uses_cache = false;               // takes blocks of the prefix cache and leaves its own there
  std::shared_ptr<StreamState> stream;   // shared with the consumer
  std::optional<Generation> generation;  // exactly one of
  std::optional<Embedding> embedding;    // these two

  // Set by dispatcher and scheduler.
  std::optional<stage::Slot> slot;   // unset: waiting
  uint64_t replica = 0;              // that computes it, while there is a slot
  std::vector<BlockTable> tables;    // one per cache group while there is a slot
  uint32_t n_scheduled = 0;          // leading tokens that are in the KV cache or in a batch in flight
  bool awaits_output = false;        // the row after which a token is sampled is in flight
  std::optional<uint32_t> n_cached;  // prompt tokens that the prefix cache had when the sequence first ran
  uint32_t incarnation = 0;          // grows when the KV cache is lost: results of older batches are void
  uint32_t n_evaluated = 0;          // most tokens that were ever scheduled: fewer means computing again

  // Set by the engine, for Timings.
  using Clock = std::chrono::steady_clock;
  std::optional<Clock::time_point> first_scheduled, first_token, last_token;

  std::optional<Clock::time_point> waits_since;  // set while there is no plan
  uint32_t n_ctx = 0;                            // the context it may fill: that of the plan it began with; 0: none yet
  uint32_t n_reported = 0;                       // tokens of the prompt in the last ProgressEvent

  // Its KV cache is gone: it waits, to be computed again from its first token.
  void lose_cache() {
    slot.reset();
    tables.clear();
    n_scheduled = 0;
    awaits_output = false;
    ++incarnation;
    if (embedding) embedding->n_received = 0;
  }
  uint32_t n_tokens() const { return static_cast<uint32_t>(tokens.size()); }
  uint32_t n_remaining() const { return n_tokens() - n_scheduled; }
  bool holds_blocks() const {
    return std::any_of(tables.begin(), tables.end(), [](const BlockTable& table) { return table.end() > 0; });
  }
  // The row after which a token is sampled may be computed once more, for all of its logits.
  bool may_repeat_row() const { return generation && generation->sampler.may_need_all_logits(); }
  uint32_t n_predicted() const { return n_tokens() + n_discarded - n_prompt; }
  bool decodes() const { return generation && n_predicted() > 0 && n_remaining() <= 1; }
  // Prompt and answer, for the sampler: its penalties and its random stream know no shift.
  const std::vector<int32_t>& history() const { return full_history.empty() ? tokens : full_history; }
};

}  // namespace caravan::engine
