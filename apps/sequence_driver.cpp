#include "sequence_driver.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace caravan::app {
namespace {

using Kind = engine::GroupLimits::Kind;

constexpr auto kPollInterval = std::chrono::milliseconds(1000);
constexpr int kPlanPolls = 60;

}  // namespace

SequenceDriver::SequenceDriver(engine::Pipeline& pipeline) : pipeline_(pipeline) {
  for (int i = 0;; ++i) {
    const auto event = pipeline_.poll(kPollInterval);
    if (event && std::holds_alternative<engine::PlanReady>(*event)) {
      plan_ = std::get<engine::PlanReady>(*event).plan;
      break;
    }
    if (event && std::holds_alternative<engine::PlanLost>(*event))
      throw Error(std::get<engine::PlanLost>(*event).reason);
    if (i == kPlanPolls) throw Error("no plan came within a minute");
  }
  sequences_.resize(plan_.max_slots);
  for (Sequence& sequence : sequences_) {
    sequence.blocks.resize(plan_.groups.size());
    sequence.n_dropped.resize(plan_.groups.size());
  }
  for (const auto& group : plan_.groups) {
    auto& free = free_blocks_.emplace_back();
    for (uint32_t block = group.n_blocks; block > 0; --block) free.push_back(block - 1);
  }
}

// Makes room for the token at position, and gives back what no later row of the sequence sees.
void SequenceDriver::append_blocks(stage::Batch& batch, stage::Slot slot, uint32_t position) {
  Sequence& sequence = sequences_[slot];
  for (uint32_t g = 0; g < plan_.groups.size(); ++g) {
    const engine::GroupLimits& group = plan_.groups[g];
    if (group.kind == Kind::none || position / plan_.block_tokens < sequence.blocks[g].size()) continue;
    // Ops are applied before any row of the batch: only what the batch's first row no longer sees may go.
    const uint32_t first = sequence.length;
    if (group.kind == Kind::window && first >= group.window) {
      const uint32_t n_dropped = (first - group.window + 1) / plan_.block_tokens;
      if (n_dropped > sequence.n_dropped[g]) {
        for (uint32_t i = sequence.n_dropped[g]; i < n_dropped; ++i) free_blocks_[g].push_back(sequence.blocks[g][i]);
        sequence.n_dropped[g] = n_dropped;
        batch.kv_ops.push_back({stage::KvOp::Kind::drop_front, g, slot, 0, 0, n_dropped * plan_.block_tokens});
      }
    }
    if (free_blocks_[g].empty())
      throw ResourceError(fmt::format("the context is full: {} tokens; give more with -c", plan_.n_ctx));
    const uint32_t block = free_blocks_[g].back();
    free_blocks_[g].pop_back();
    sequence.blocks[g].push_back(block);
    batch.kv_ops.push_back({stage::KvOp::Kind::append, g, slot, block, 0, 0});
  }
}

void SequenceDriver::add_row(stage::Batch& batch, stage::Slot slot, int32_t token) {
  const auto rows_of_slot = static_cast<uint32_t>(std::count(batch.slots.begin(), batch.slots.end(), slot));
  const uint32_t position = sequences_[slot].length + rows_of_slot;
  append_blocks(batch, slot, position);
  const auto p = static_cast<int32_t>(position);
  batch.tokens.push_back(token);
  batch.positions.push_back({p, p, p, p});
  batch.slots.push_back(slot);
  for (const engine::GroupLimits& group : plan_.groups) {
    if (group.kind == Kind::none) throw Error("an encoder has no next token: use `caravan embedding`");
    const int32_t from = group.kind == Kind::window ? std::max(0, p - static_cast<int32_t>(group.window) + 1) : 0;
    batch.visible.push_back({from, p + 1});
  }
}

std::vector<stage::RowOutput> SequenceDriver::run(stage::Batch batch) {
  batch.kv_ops.insert(batch.kv_ops.begin(), pending_ops_.begin(), pending_ops_.end());
  pending_ops_.clear();
  const std::vector<stage::Slot> slots = batch.slots;
  const uint64_t ticket = pipeline_.submit(std::move(batch), plan_.replicas.front().id);
  for (;;) {
    auto event = pipeline_.poll(kPollInterval);
    if (!event) continue;
    if (auto* done = std::get_if<engine::Completion>(&*event); done != nullptr && done->ticket == ticket) {
      for (const stage::Slot slot : slots) sequences_[slot].length++;
      return std::move(done->rows);
    }
    if (const auto* failed = std::get_if<engine::TicketFailed>(&*event)) throw Error(failed->reason);
    if (const auto* lost = std::get_if<engine::PlanLost>(&*event)) throw Error(lost->reason);
  }
}

std::vector<stage::RowOutput> SequenceDriver::forward(stage::Slot slot, std::span<const int32_t> tokens,
                                                      std::span<const uint32_t> wanted,
                                                      const stage::OutputRequest& output, uint32_t max_chunk) {
  uint32_t chunk = max_chunk > 0 ? std::min(max_chunk, plan_.max_rows) : plan_.max_rows;
  if (wanted.size() > 1 && plan_.max_outputs > 0) chunk = std::min(chunk, plan_.max_outputs);
  std::vector<stage::RowOutput> outputs;
  size_t next_wanted = 0;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const size_t end = std::min(tokens.size(), begin + chunk);
    stage::Batch batch;
    for (size_t i = begin; i < end; ++i) add_row(batch, slot, tokens[i]);
    for (; next_wanted < wanted.size() && wanted[next_wanted] < end; ++next_wanted) {
      stage::OutputRequest request = output;
      request.row = static_cast<uint32_t>(wanted[next_wanted] - begin);
      batch.outputs.push_back(std::move(request));
    }
    auto rows = run(std::move(batch));
    std::move(rows.begin(), rows.end(), std::back_inserter(outputs));
  }
  return outputs;
}

std::vector<stage::RowOutput> SequenceDriver::step(std::span<const stage::Slot> slots, std::span<const int32_t> tokens,
                                                   const stage::OutputRequest& output) {
  stage::Batch batch;
  for (size_t i = 0; i < slots.size(); ++i) {
    add_row(batch, slots[i], tokens[i]);
    stage::OutputRequest request = output;
    request.row = static_cast<uint32_t>(i);
    batch.outputs.push_back(std::move(request));
  }
  return run(std::move(batch));
}

void SequenceDriver::clear(stage::Slot slot) {
  Sequence& sequence = sequences_[slot];
  for (size_t g = 0; g < sequence.blocks.size(); ++g) {
    for (size_t i = sequence.n_dropped[g]; i < sequence.blocks[g].size(); ++i)
      free_blocks_[g].push_back(sequence.blocks[g][i]);
    sequence.blocks[g].clear();
    sequence.n_dropped[g] = 0;
  }
  sequence.length = 0;
  pending_ops_.push_back({stage::KvOp::Kind::free, 0, slot, 0, 0, 0});
}

}  // namespace caravan::app
