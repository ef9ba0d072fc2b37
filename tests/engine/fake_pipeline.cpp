#include "engine/fake_pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "engine/random.h"
#include "gguf/metadata.h"

namespace caravan::engine::test {
namespace {

// Not GroupLimits::first_visible(), which is under test.
uint32_t first_visible(const GroupLimits& group, uint32_t position) {
  const bool limited = group.kind == GroupLimits::Kind::window && position + 1 > group.window;
  return limited ? position + 1 - group.window : 0;
}

}  // namespace

uint64_t ToyModel::state(int32_t token, uint32_t position, const std::vector<std::vector<uint64_t>>& seen) {
  uint64_t state = mix64(static_cast<uint64_t>(token) * 1000003u + position + 1);
  for (const auto& group : seen) {
    for (const uint64_t earlier : group) state = mix64(state * 31 + earlier);
    state = mix64(state + 77);
  }
  return state;
}

std::vector<uint64_t> ToyModel::states(const std::vector<int32_t>& tokens) const {
  std::vector<uint64_t> states;
  const auto n = static_cast<uint32_t>(tokens.size());
  const bool encoder = !groups_.empty() && groups_.front().kind == GroupLimits::Kind::none;
  for (uint32_t position = 0; position < n; ++position) {
    std::vector<std::vector<uint64_t>> seen;
    for (const GroupLimits& group : groups_) {
      seen.emplace_back();
      if (encoder) {
        for (uint32_t p = 0; p < n; ++p) seen.back().push_back(static_cast<uint64_t>(tokens[p]) + 5);
      } else {
        for (uint32_t p = first_visible(group, position); p < position; ++p) seen.back().push_back(states[p]);
      }
    }
    states.push_back(state(tokens[position], position, seen));
  }
  return states;
}

std::vector<float> ToyModel::logits(uint64_t state) const {
  std::vector<float> logits(n_vocab_);
  for (uint32_t id = 0; id < n_vocab_; ++id) {
    // Steps of 1/8, so that ties are common.
    logits[id] = static_cast<float>(mix64(state + id * 0x9e3779b97f4a7c15u) % 64) / 8.0f - 4.0f;
  }
  return logits;
}

std::vector<float> ToyModel::hidden(uint64_t state) const {
  std::vector<float> hidden(n_embd_);
  for (uint32_t i = 0; i < n_embd_; ++i) hidden[i] = static_cast<float>(mix64(state ^ (i + 1)) % 1000) / 1000.0f;
  return hidden;
}

PlanSummary make_plan(std::vector<GroupLimits> groups, uint32_t n_ctx, uint32_t max_rows, uint32_t max_slots,
                      uint32_t block_tokens) {
  PlanSummary plan;
  plan.epoch = 1;
  plan.n_ctx = n_ctx;
  plan.n_embd = 3;
  plan.n_vocab = kVocabularySize;
  plan.block_tokens = block_tokens;
  plan.max_rows = max_rows;
  plan.max_slots = max_slots;
  plan.groups = std::move(groups);
  plan.numeric_class = "toy";
  plan.stages.resize(1);
  return plan;
}

GroupLimits full_group(uint32_t n_blocks) { return {GroupLimits::Kind::full, 0, n_blocks}; }

GroupLimits window_group(uint32_t window, uint32_t n_blocks) { return {GroupLimits::Kind::window, window, n_blocks}; }

GroupLimits encoder_group() { return {GroupLimits::Kind::none, 0, 0}; }

void FakePipeline::ready(PlanSummary plan) {
  std::lock_guard lock(mutex_);
  if (plan.replicas.empty()) plan.replicas = {{next_replica_++}};
  plan_ = plan;
  std::map<uint64_t, Replica> replicas;
  for (const ReplicaSummary& summary : plan.replicas) {
    Replica& replica = replicas[summary.id];
    if (replicas_.contains(summary.id)) {
      replica = std::move(replicas_[summary.id]);
    } else {
      replica.tables.assign(plan.groups.size(), std::vector<Table>(plan.max_slots));
      replica.blocks.assign(plan.groups.size(), {});
    }
  }
  replicas_ = std::move(replicas);
  drop_results_of_gone_replicas();
  events_.push_back(PlanReady{std::move(plan)});
  changed_.notify_all();
}

void FakePipeline::lose(std::string reason) {
  std::lock_guard lock(mutex_);
  // The engine may submit until it has polled this: such batches are lost.
  replicas_.clear();
  drop_results_of_gone_replicas();
  events_.push_back(PlanLost{std::move(reason)});
  changed_.notify_all();
}

void FakePipeline::drop_results_of_gone_replicas() {
  std::erase_if(in_flight_, [this](const auto& entry) { return !replicas_.contains(entry.second); });
  std::erase_if(held_, [this](const Completion& held) { return !in_flight_.contains(held.ticket); });
  std::erase_if(events_, [this](const PipelineEvent& event) {
    const auto* completion = std::get_if<Completion>(&event);
    return completion != nullptr && !in_flight_.contains(completion->ticket);
  });
}

void FakePipeline::close_gate() {
  std::lock_guard lock(mutex_);
  gate_open_ = false;
}

void FakePipeline::open_gate() {
  std::lock_guard lock(mutex_);
  gate_open_ = true;
  for (Completion& completion : held_) events_.push_back(std::move(completion));
  held_.clear();
  changed_.notify_all();
}

void FakePipeline::release(uint32_t n) {
  std::unique_lock lock(mutex_);
  for (uint32_t i = 0; i < n; ++i) {
    changed_.wait(lock, [this] { return !held_.empty(); });
    events_.push_back(std::move(held_.front()));
    held_.pop_front();
    changed_.notify_all();
  }
}

void FakePipeline::wait_for_batches(size_t n) {
  wait_until([n](const std::vector<stage::Batch>& batches) { return batches.size() >= n; });
}

void FakePipeline::wait_until(const std::function<bool(const std::vector<stage::Batch>&)>& predicate) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return predicate(batches_); });
}

void FakePipeline::force(std::function<std::optional<int32_t>(uint32_t position)> forced) {
  std::lock_guard lock(mutex_);
  forced_ = std::move(forced);
}

void FakePipeline::fail_when(std::function<bool(const stage::Batch&)> predicate, std::string reason) {
  std::lock_guard lock(mutex_);
  fails_ = std::move(predicate);
  fail_reason_ = std::move(reason);
}

std::vector<stage::Batch> FakePipeline::batches() const {
  std::lock_guard lock(mutex_);
  return batches_;
}

std::vector<std::string> FakePipeline::errors() const {
  std::lock_guard lock(mutex_);
  return errors_;
}

std::map<uint64_t, size_t> FakePipeline::n_batches() const {
  std::lock_guard lock(mutex_);
  return n_batches_;
}

uint32_t FakePipeline::max_in_flight() const {
  std::lock_guard lock(mutex_);
  return max_in_flight_;
}

size_t FakePipeline::n_blocks_in_tables() const {
  std::lock_guard lock(mutex_);
  size_t n = 0;
  for (const auto& [replica_id, replica] : replicas_)
    for (const auto& group : replica.blocks)
      for (const auto& [id, block] : group) n += block.n_tables > 0;
  return n;
}

void FakePipeline::empty(uint32_t group, Table& table) {
  for (const uint32_t block : table.blocks) --at_->blocks[group].at(block).n_tables;
  table = {};
}

void FakePipeline::apply(const stage::KvOp& op) {
  if (op.slot >= plan_->max_slots) return note(fmt::format("op on slot {} of {}", op.slot, plan_->max_slots));
  switch (op.kind) {
    case stage::KvOp::Kind::append:
      if (op.block >= plan_->groups[op.group].n_blocks) note(fmt::format("block {} does not exist", op.block));
      {
        Block& block = at_->blocks[op.group][op.block];
        block.cells.resize(plan_->block_tokens);
        ++block.n_tables;
      }
      at_->tables[op.group][op.slot].blocks.push_back(op.block);
      return;
    case stage::KvOp::Kind::drop_front: {
      Table& table = at_->tables[op.group][op.slot];
      while (table.n_dropped < op.n_tokens / plan_->block_tokens) {
        if (!table.blocks.empty()) {
          --at_->blocks[op.group].at(table.blocks.front()).n_tables;
          table.blocks.pop_front();
        }
        ++table.n_dropped;
      }
      return;
    }
    case stage::KvOp::Kind::free:
      for (uint32_t group = 0; group < at_->tables.size(); ++group) empty(group, at_->tables[group][op.slot]);
      return;
    case stage::KvOp::Kind::copy_block: {
      if (op.block >= plan_->groups[op.group].n_blocks) note(fmt::format("block {} does not exist", op.block));
      const auto source = at_->blocks[op.group].find(op.source);
      if (source == at_->blocks[op.group].end()) return note("a copy of a block that never was in a table");
      const std::vector<Cell> cells = source->second.cells;
      Block& copy = at_->blocks[op.group][op.block];
      if (copy.n_tables > 0) note(fmt::format("block {} is overwritten while it is in a table", op.block));
      copy.cells = cells;
      return;
    }
    default:
      note("an operation that the engine does not use");
  }
}

FakePipeline::Block* FakePipeline::block_of(uint32_t group, stage::Slot slot, uint32_t position) {
  const Table& table = at_->tables[group][slot];
  const uint32_t logical = position / plan_->block_tokens;
  if (logical < table.n_dropped || logical - table.n_dropped >= table.blocks.size()) {
    note(fmt::format("group {} slot {}: no block for position {}", group, slot, position));
    return nullptr;
  }
  return &at_->blocks[group].at(table.blocks[logical - table.n_dropped]);
}

FakePipeline::Cell* FakePipeline::cell(uint32_t group, stage::Slot slot, uint32_t position) {
  Block* block = block_of(group, slot, position);
  return block ? &block->cells[position % plan_->block_tokens] : nullptr;
}

uint64_t FakePipeline::compute_encoder_row(const stage::Batch& batch, uint32_t row) {
  const stage::VisibleRange range = batch.visible[row];
  std::vector<uint64_t> seen;
  for (int32_t r = range.from; r < range.to; ++r) {
    const auto other = static_cast<size_t>(r);
    if (batch.slots[other] != batch.slots[row]) note("an encoder row sees another sequence");
    if (batch.positions[other][0] != r - range.from) note("an encoder row sees a part of its sequence");
    seen.push_back(static_cast<uint64_t>(batch.tokens[other]) + 5);
  }
  return ToyModel::state(batch.tokens[row], static_cast<uint32_t>(batch.positions[row][0]), {seen});
}

std::vector<uint64_t> FakePipeline::compute(const stage::Batch& batch) {
  std::vector<uint64_t> states;
  const auto n_groups = static_cast<uint32_t>(plan_->groups.size());
  for (uint32_t row = 0; row < batch.n_rows(); ++row) {
    const auto position = static_cast<uint32_t>(batch.positions[row][0]);
    if (plan_->groups[0].kind == GroupLimits::Kind::none) {
      states.push_back(compute_encoder_row(batch, row));
      continue;
    }
    std::vector<std::vector<uint64_t>> seen(n_groups);
    for (uint32_t group = 0; group < n_groups; ++group) {
      const stage::VisibleRange range = batch.visible[row * n_groups + group];
      const stage::VisibleRange expected{static_cast<int32_t>(first_visible(plan_->groups[group], position)),
                                         static_cast<int32_t>(position) + 1};
      if (range != expected) note(fmt::format("row {}: sees [{}, {})", row, range.from, range.to));
      for (auto p = static_cast<uint32_t>(range.from); p < position; ++p) {
        const Cell* earlier = cell(group, batch.slots[row], p);
        if (earlier && earlier->position != p) note(fmt::format("position {} was never written", p));
        seen[group].push_back(earlier ? earlier->state : 0);
      }
    }
    states.push_back(ToyModel::state(batch.tokens[row], position, seen));
    for (uint32_t group = 0; group < n_groups; ++group) {
      const Block* block = block_of(group, batch.slots[row], position);
      if (block && block->n_tables > 1) note(fmt::format("position {} is written into a shared block", position));
      if (Cell* own = cell(group, batch.slots[row], position)) *own = {position, states.back()};
    }
  }
  return states;
}

stage::RowOutput FakePipeline::output(const stage::OutputRequest& wanted, uint64_t state, uint32_t position) const {
  const ToyModel model(plan_->groups, plan_->n_vocab, plan_->n_embd);
  stage::RowOutput output{wanted.row, wanted.kind, {}, {}, 0};
  if (wanted.kind == stage::OutputKind::hidden) {
    output.values = model.hidden(state);
    return output;
  }
  std::vector<float> logits = model.logits(state);
  if (const auto forced = forced_ ? forced_(position) : std::nullopt) logits[static_cast<size_t>(*forced)] = 100;
  if (wanted.kind == stage::OutputKind::logits) {
    output.values = std::move(logits);
    return output;
  }
  std::vector<int32_t> ids(logits.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  output.log_sum_exp = static_cast<float>(std::log(sum));
  ids.resize(wanted.top_k);
  output.ids = ids;
  for (const int32_t id : ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  for (const int32_t id : wanted.named_ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  return output;
}

uint64_t FakePipeline::submit(stage::Batch batch, uint64_t replica) {
  std::lock_guard lock(mutex_);
  const uint64_t ticket = next_ticket_++;
  const auto at = replicas_.find(replica);
  if (at == replicas_.end()) return ticket;  // made for a plan that is gone
  at_ = &at->second;
  ++n_batches_[replica];
  batches_.push_back(batch);
  if (batch.n_rows() > plan_->max_rows) note(fmt::format("{} rows in a batch of {}", batch.n_rows(), plan_->max_rows));
  in_flight_[ticket] = replica;
  max_in_flight_ = std::max(max_in_flight_, static_cast<uint32_t>(in_flight_.size()));
  if (fails_ && fails_(batch)) {
    events_.push_back(TicketFailed{ticket, fail_reason_});
    in_flight_.erase(ticket);
    changed_.notify_all();
    return ticket;
  }
  for (const stage::KvOp& op : batch.kv_ops) apply(op);
  const std::vector<uint64_t> states = compute(batch);
  Completion completion{ticket, {}, {}};
  int64_t last_row = -1;
  for (const stage::OutputRequest& wanted : batch.outputs) {
    if (wanted.row <= last_row) note("output rows do not ascend");
    last_row = wanted.row;
    completion.rows.push_back(
        output(wanted, states.at(wanted.row), static_cast<uint32_t>(batch.positions[wanted.row][0])));
  }
  if (gate_open_) {
    events_.push_back(std::move(completion));
  } else {
    held_.push_back(std::move(completion));
  }
  changed_.notify_all();
  return ticket;
}

std::optional<PipelineEvent> FakePipeline::poll(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return !events_.empty() || woken_; });
  woken_ = false;
  if (events_.empty()) return std::nullopt;
  PipelineEvent event = std::move(events_.front());
  events_.pop_front();
  if (const auto* completion = std::get_if<Completion>(&event)) in_flight_.erase(completion->ticket);
  return event;
}

void FakePipeline::wake() {
  std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

namespace {

std::unique_ptr<const vocab::Vocabulary> vocabulary_with(const std::vector<const char*>& fim_names) {
  constexpr int32_t kNormal = 1, kUnknown = 2, kControl = 3, kByte = 6;
  std::vector<std::string> texts = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {kUnknown, kControl, kControl};
  for (int byte = 0; byte < 256; ++byte) {
    texts.push_back(fmt::format("<0x{:02X}>", byte));
    types.push_back(kByte);
  }
  for (const char* text : {"\u2581a", "\u2581b", "ab", "the\u2581end"}) {
    texts.emplace_back(text);
    types.push_back(kNormal);
  }
  gguf::Metadata metadata("test vocabulary");
  if (!fim_names.empty()) metadata.set("tokenizer.ggml.add_space_prefix", gguf::Value::of(false));
  for (const std::string name : fim_names) {
    metadata.set("tokenizer.ggml." + name + "_token_id", gguf::Value::of(static_cast<uint32_t>(texts.size())));
    texts.push_back("<" + name + ">");
    types.push_back(kControl);
  }
  metadata.set("tokenizer.ggml.model", gguf::Value::of("llama"));
  metadata.set("tokenizer.ggml.scores", gguf::Value::of(std::vector<float>(texts.size(), 0.0f)));
  metadata.set("tokenizer.ggml.tokens", gguf::Value::of(std::move(texts)));
  metadata.set("tokenizer.ggml.token_type", gguf::Value::of(types));
  metadata.set("tokenizer.ggml.bos_token_id", gguf::Value::of(uint32_t{1}));
  metadata.set("tokenizer.ggml.eos_token_id", gguf::Value::of(uint32_t{2}));
  metadata.set("tokenizer.ggml.unknown_token_id", gguf::Value::of(uint32_t{0}));
  return vocab::Vocabulary::load(metadata);
}

}  // namespace

std::unique_ptr<const vocab::Vocabulary> make_vocabulary() { return vocabulary_with({}); }

std::unique_ptr<const vocab::Vocabulary> make_fim_vocabulary() {
  return vocabulary_with({"fim_pre", "fim_suf", "fim_mid", "fim_rep", "fim_sep"});
}

}  // namespace caravan::engine::test
