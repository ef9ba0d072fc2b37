// A Pipeline for tests whose model is a hash: the output of a row depends on every token it sees, read through the
// block tables that the batch's KvOps build. A wrong table, range or stale block changes the output, and most mistakes
// are also noted by name in errors(). Batches are computed at once; their results can be held back. Every replica of a
// plan has tables and blocks of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/pipeline.h"
#include "vocab/vocabulary.h"

namespace caravan::engine::test {

// The model without any cache: the state after the last of tokens, its logits, its hidden row. Depends on the window of
// every group, as a row's own state is what later rows see of it.
class ToyModel {
 public:
  ToyModel(std::vector<GroupLimits> groups, uint32_t n_vocab, uint32_t n_embd)
      : groups_(std::move(groups)), n_vocab_(n_vocab), n_embd_(n_embd) {}

  // One state per position.
  std::vector<uint64_t> states(const std::vector<int32_t>& tokens) const;
  // The state of a row from its token, position and what it sees of earlier rows, per group.
  static uint64_t state(int32_t token, uint32_t position, const std::vector<std::vector<uint64_t>>& seen);
  std::vector<float> logits(uint64_t state) const;
  std::vector<float> hidden(uint64_t state) const;

 private:
  std::vector<GroupLimits> groups_;
  uint32_t n_vocab_, n_embd_;
};

// A plan with one stage; groups as given.
PlanSummary make_plan(std::vector<GroupLimits> groups, uint32_t n_ctx = 256, uint32_t max_rows = 16,
                      uint32_t max_slots = 4, uint32_t block_tokens = 4);
GroupLimits full_group(uint32_t n_blocks);
GroupLimits window_group(uint32_t window, uint32_t n_blocks);
GroupLimits encoder_group();

class FakePipeline : public Pipeline {
 public:
  // From the test.
  // A plan without replicas gets one that was not there before; a replica that was there keeps its blocks and results.
  void ready(PlanSummary plan);
  void lose(std::string reason);
  // Results wait from now on until release() or until the gate is opened.
  void close_gate();
  void open_gate();
  // Lets n results pass; waits until so many are there.
  void release(uint32_t n);
  // Waits until n batches in all were submitted.
  void wait_for_batches(size_t n);
  // Waits until predicate(batches so far) is true.
  void wait_until(const std::function<bool(const std::vector<stage::Batch>&)>& predicate);
  // From now on the logit of forced(position) is raised far above all others, for the row at position.
  void force(std::function<std::optional<int32_t>(uint32_t position)> forced);
  // Batches for which predicate is true fail without being computed, with this reason.
  void fail_when(std::function<bool(const stage::Batch&)> predicate, std::string reason);
  std::vector<stage::Batch> batches() const;
  // Batches that each replica got.
  std::map<uint64_t, size_t> n_batches() const;
  std::vector<std::string> errors() const;
  uint32_t max_in_flight() const;
  // Blocks that are in a table, over all groups and slots.
  size_t n_blocks_in_tables() const;

  // Whether the next plan is being loaded.
  void set_loading(bool loading) { loading_ = loading; }

  uint64_t submit(stage::Batch batch, uint64_t replica) override;
  std::optional<PipelineEvent> poll(std::chrono::milliseconds timeout) override;
  void wake() override;
  bool plan_is_loading() const override { return loading_; }
  PipelineStatus status() const override { return machines; }

  PipelineStatus machines;  // set before the engine is asked

 private:
  struct Cell {
    int64_t position = -1;
    uint64_t state = 0;
  };
  // As at a real stage, contents outlive tables.
  struct Block {
    std::vector<Cell> cells;
    uint32_t n_tables = 0;
  };
  struct Table {
    uint32_t n_dropped = 0;
    std::deque<uint32_t> blocks;
  };

  struct Replica {
    std::vector<std::vector<Table>> tables;         // [group][slot]
    std::vector<std::map<uint32_t, Block>> blocks;  // [group][block], all that were ever in a table
  };

  void drop_results_of_gone_replicas();
  void apply(const stage::KvOp& op);
  void empty(uint32_t group, Table& table);
  Block* block_of(uint32_t group, stage::Slot slot, uint32_t position);
  Cell* cell(uint32_t group, stage::Slot slot, uint32_t position);
  std::vector<uint64_t> compute(const stage::Batch& batch);
  uint64_t compute_encoder_row(const stage::Batch& batch, uint32_t row);
  stage::RowOutput output(const stage::OutputRequest& wanted, uint64_t state, uint32_t position) const;
  void note(const std::string& error) { errors_.push_back(error); }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<PipelineEvent> events_;  // to be polled
  std::deque<Completion> held_;       // behind the gate
  bool gate_open_ = true;
  bool woken_ = false;
  std::atomic<bool> loading_{false};
  uint64_t next_ticket_ = 1;
  uint64_t next_replica_ = 1000;
  std::map<uint64_t, uint64_t> in_flight_;  // replicas by ticket
  uint32_t max_in_flight_ = 0;
  std::vector<stage::Batch> batches_;
  std::vector<std::string> errors_;
  std::function<std::optional<int32_t>(uint32_t)> forced_;
  std::function<bool(const stage::Batch&)> fails_;
  std::string fail_reason_;

  std::optional<PlanSummary> plan_;
  std::map<uint64_t, Replica> replicas_;  // batches for others are dropped
  std::map<uint64_t, size_t> n_batches_;
  Replica* at_ = nullptr;  // that computes a batch
};

// A SentencePiece vocabulary: <unk>, <s>, </s>, the 256 byte tokens (3 + byte), then " a", " b", "ab", "the end".
std::unique_ptr<const vocab::Vocabulary> make_vocabulary();
// The same with the tokens for filling in the middle: kFimPre and the ones after it.
std::unique_ptr<const vocab::Vocabulary> make_fim_vocabulary();
constexpr int32_t kEos = 2;
constexpr int32_t kFirstByte = 3;
constexpr int32_t kPieceA = 259, kPieceB = 260, kPieceAB = 261, kPieceTheEnd = 262;
constexpr uint32_t kVocabularySize = 263;
constexpr int32_t kFimPre = 263, kFimSuf = 264, kFimMid = 265, kFimRep = 266, kFimSep = 267;
constexpr uint32_t kFimVocabularySize = 268;
inline int32_t byte_token(char byte) { return kFirstByte + static_cast<uint8_t>(byte); }

}  // namespace caravan::engine::test
