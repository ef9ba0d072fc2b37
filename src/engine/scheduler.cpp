#include "engine/scheduler.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace caravan::engine {
namespace {

uint32_t blocks_for(uint64_t n_tokens, uint32_t block_tokens) {
  return static_cast<uint32_t>((n_tokens + block_tokens - 1) / block_tokens);
}

// Blocks that one sequence of n_tokens needs at a time; a window slides through at most one more than it spans.
uint32_t blocks_needed(const GroupLimits& group, uint32_t n_tokens, uint32_t block_tokens) {
  if (group.kind == GroupLimits::Kind::none) return 0;
  const uint32_t all = blocks_for(n_tokens, block_tokens);
  if (group.kind == GroupLimits::Kind::full) return all;
  return std::min(all, blocks_for(group.window, block_tokens) + 1);
}

}  // namespace

bool is_encoder(const PlanSummary& plan) {
  return std::any_of(plan.groups.begin(), plan.groups.end(),
                     [](const GroupLimits& group) { return group.kind == GroupLimits::Kind::none; });
}

uint32_t effective_context(const PlanSummary& plan) {
  uint64_t n_ctx = plan.n_ctx;
  for (const GroupLimits& group : plan.groups) {
    if (group.kind == GroupLimits::Kind::none) continue;
    const bool slides =
        group.kind == GroupLimits::Kind::window && group.n_blocks >= blocks_for(group.window, plan.block_tokens) + 1;
    if (!slides) n_ctx = std::min(n_ctx, uint64_t{group.n_blocks} * plan.block_tokens);
  }
  return static_cast<uint32_t>(n_ctx);
}

Scheduler::Scheduler(const PlanSummary& plan, size_t replica, uint32_t max_in_flight)
    : plan_(plan),
      replica_(plan.replicas.at(replica)),
      n_stages_(static_cast<uint32_t>(
          std::count_if(plan.stages.begin(), plan.stages.end(),
                        [replica](const StageSummary& stage) { return stage.replica == replica; }))),
      max_in_flight_(max_in_flight),
      encoder_(is_encoder(plan)) {
  for (const GroupLimits& group : plan.groups) allocators_.emplace_back(group.n_blocks);
  cache_.reset(plan, &allocators_);
}

void Scheduler::admit(Sequence& sequence) {
  sequence.replica = replica_.id;
  sequence.tables.assign(plan_.groups.size(), {});
  sequences_.emplace(sequence.id, &sequence);
}

uint32_t Scheduler::n_cached(const Sequence& waiting) const {
  if (!waiting.uses_cache) return 0;
  const PrefixMatch match = cache_.find(waiting.tokens, waiting.n_tokens() - 1);
  return match.n_tokens + match.n_partial;
}

uint32_t Scheduler::max_in_flight() const { return n_groups() + (n_groups() > 1 ? 1 : 0); }

// Decoding sequences are divided into so many groups, one for each stage to work on.
uint32_t Scheduler::n_groups() const { return std::max<uint32_t>(1, max_in_flight_ > 0 ? max_in_flight_ : n_stages_); }

double Scheduler::kv_usage() const {
  double usage = 0;
  for (const BlockAllocator& allocator : allocators_) {
    if (allocator.n_blocks() == 0) continue;
    usage = std::max(usage, 1.0 - static_cast<double>(allocator.n_available()) / allocator.n_blocks());
  }
  return usage;
}

// Gives blocks and slot back. The stages learn of it with the next batch; since they apply operations in order, the
// blocks may be given to others in that same batch.
void Scheduler::release(Sequence& sequence, Blocks blocks) {
  if (sequence.uses_cache && blocks == Blocks::cached)
    cache_.insert_ended(std::span(sequence.tokens).first(sequence.n_scheduled), sequence.tables);
  bool held = false;
  for (size_t group = 0; group < sequence.tables.size(); ++group) {
    held = held || sequence.tables[group].end() > 0;
    for (const uint32_t block : sequence.tables[group].blocks) allocators_[group].release(block);
  }
  if (held) ops_.push_back({.kind = stage::KvOp::Kind::free, .slot = *sequence.slot});
  sequence.lose_cache();
  sequences_.erase(sequence.id);
}

void Scheduler::preempt(Sequence& sequence) {
  ++n_preemptions_;
  release(sequence);
}

bool Scheduler::fits_now(const Sequence& waiting) const {
  std::optional<PrefixMatch> match;
  for (uint32_t group = 0; group < allocators_.size(); ++group) {
    const BlockAllocator& allocator = allocators_[group];
    const auto needed = [&](const Sequence& sequence) {
      return blocks_needed(plan_.groups[group], sequence.n_tokens(), plan_.block_tokens);
    };
    uint64_t claimed = needed(waiting);
    for (const auto& [id, sequence] : sequences_) {
      const auto held = static_cast<uint32_t>(sequence->tables[group].blocks.size());
      claimed += needed(*sequence) - std::min(needed(*sequence), held);
    }
    if (claimed <= allocator.n_available()) continue;
    if (!waiting.uses_cache) return false;
    if (!match) match = cache_.find(waiting.tokens, waiting.n_tokens() - 1);
    for (const uint32_t block : match->tables[group].blocks) claimed -= allocator.holders(block) > 0;
    if (claimed > allocator.n_available()) return false;
  }
  return true;
}

// A block that no table holds; n_wanted: so many will be asked for, of which some are evicted from the cache if need
// be.
uint32_t Scheduler::allocate(uint32_t group, uint32_t n_wanted) {
  cache_.evict(group, n_wanted);
  const std::optional<uint32_t> block = allocators_[group].allocate();
  CARAVAN_ASSERT(block.has_value(), "who allocates has counted the available blocks");
  return *block;
}

// Gives a sequence that holds nothing yet the blocks of its longest cached prefix; its last token is always computed.
void Scheduler::take_cached_prefix(Sequence& sequence) {
  const PrefixMatch match = cache_.find(sequence.tokens, sequence.n_tokens() - 1);
  cache_.hold(match);
  sequence.tables = match.tables;
  sequence.n_scheduled = match.n_tokens;
  for (uint32_t group = 0; group < allocators_.size(); ++group) {
    const BlockTable& table = match.tables[group];
    if (table.n_dropped > 0) {
      ops_.push_back({.kind = stage::KvOp::Kind::drop_front,
                      .group = group,
                      .slot = *sequence.slot,
                      .n_tokens = table.n_dropped * plan_.block_tokens});
    }
    for (const uint32_t block : table.blocks)
      ops_.push_back({.kind = stage::KvOp::Kind::append, .group = group, .slot = *sequence.slot, .block = block});
  }
  if (match.n_partial > 0) copy_partial(sequence, match);
  if (!sequence.n_cached) sequence.n_cached = sequence.n_scheduled;
}

// A prefix that ends inside a block: the block is copied, as its rest will differ. Ends the hold on it.
void Scheduler::copy_partial(Sequence& sequence, const PrefixMatch& match) {
  const bool room = std::all_of(allocators_.begin(), allocators_.end(),
                                [](const BlockAllocator& allocator) { return allocator.n_available() > 0; });
  for (uint32_t group = 0; room && group < allocators_.size(); ++group) {
    const uint32_t copy = allocate(group, 1);
    sequence.tables[group].blocks.push_back(copy);
    ops_.push_back({.kind = stage::KvOp::Kind::copy_block,
                    .group = group,
                    .slot = *sequence.slot,
                    .block = copy,
                    .source = match.partial[group]});
    ops_.push_back({.kind = stage::KvOp::Kind::append, .group = group, .slot = *sequence.slot, .block = copy});
  }
  if (room) sequence.n_scheduled += match.n_partial;
  cache_.release_partial(match);
}

// How many rows of prompts the next batch takes: on one stage all that fit, on several so many that what waits flows
// through them soonest. Chosen when more comes to wait, so that the chunks of a prompt are of one size.
uint32_t Scheduler::prompt_rows() {
  if (n_stages_ <= 1 || encoder_) return plan_.max_rows;
  uint64_t waiting = 0;
  for (const auto& [id, sequence] : sequences_)
    if (!sequence->decodes()) waiting += sequence->n_remaining();
  if (waiting > prompt_waiting_) {
    prompt_rows_ =
        cost_.chunk(static_cast<uint32_t>(std::min<uint64_t>(waiting, UINT32_MAX)), n_stages_, plan_.max_rows);
    spdlog::debug("{} tokens of prompts wait: {} rows a batch", waiting, prompt_rows_);
  }
  prompt_waiting_ = waiting;
  return std::max(1u, prompt_rows_);
}

void Scheduler::note_times(const ScheduledBatch& batch, std::span<const double> stage_seconds) {
  uint32_t n_rows = 0;
  for (const BatchPart& part : batch.parts) n_rows += part.n_rows;
  if (!stage_seconds.empty()) cost_.add(n_rows, *std::max_element(stage_seconds.begin(), stage_seconds.end()));
}

// Decode rows first, then prefill chunks. With several batches in flight each takes its share of the decoding
// sequences, so that all stages have work: never more than its share, or groups would merge over time.
std::vector<Scheduler::Chunk> Scheduler::choose(InFlight in_flight) {
  std::vector<Chunk> chunks;
  uint32_t n_decoding = 0;
  for (const auto& [id, sequence] : sequences_) n_decoding += sequence->decodes();
  uint32_t rows_left = plan_.max_rows;
  uint32_t outputs_left = plan_.max_outputs > 0 ? plan_.max_outputs : plan_.max_rows;
  uint32_t decodes_left = in_flight.n_decoding < n_groups() ? (n_decoding + n_groups() - 1) / n_groups() : 0;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->awaits_output || !sequence->decodes()) continue;
    if (rows_left == 0 || outputs_left == 0 || decodes_left == 0) break;
    chunks.push_back({sequence, 1});
    --rows_left;
    --outputs_left;
    --decodes_left;
  }
  rows_left = std::min(rows_left, prompt_rows());
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->awaits_output || sequence->decodes() || sequence->n_remaining() == 0) continue;
    if (rows_left == 0) break;
    // As late as possible: what older sequences compute meanwhile is shared too.
    if (sequence->uses_cache && sequence->n_scheduled == 0 && !sequence->holds_blocks()) take_cached_prefix(*sequence);
    const bool every_row_wanted = sequence->embedding && sequence->embedding->n_wanted(sequence->n_tokens()) > 1;
    const uint32_t most = every_row_wanted ? std::min(rows_left, outputs_left) : rows_left;
    if (outputs_left == 0 || (encoder_ && sequence->n_remaining() > most)) break;
    chunks.push_back({sequence, std::min(most, sequence->n_remaining())});
    rows_left -= chunks.back().n_rows;
    outputs_left -= every_row_wanted ? chunks.back().n_rows : 1;
  }
  return chunks;
}

// What the oldest running sequence computes next; nothing is in flight.
Scheduler::Chunk Scheduler::oldest_chunk() {
  CARAVAN_ASSERT(!sequences_.empty(), "some sequence was chosen, so one runs");
  Sequence& sequence = *sequences_.begin()->second;
  if (sequence.uses_cache && sequence.n_scheduled == 0) take_cached_prefix(sequence);
  return {&sequence, std::min(plan_.max_rows, sequence.n_remaining())};
}

uint32_t Scheduler::rows_that_fit(const Sequence& sequence) const {
  uint64_t n_tokens = std::numeric_limits<uint32_t>::max();
  for (size_t group = 0; group < allocators_.size(); ++group) {
    if (plan_.groups[group].kind == GroupLimits::Kind::none) continue;
    const uint64_t n_blocks = uint64_t{sequence.tables[group].end()} + allocators_[group].n_available();
    n_tokens = std::min(n_tokens, n_blocks * plan_.block_tokens);
  }
  return static_cast<uint32_t>(n_tokens - std::min<uint64_t>(n_tokens, sequence.n_scheduled));
}

// Gives back the blocks that no row from n_scheduled on sees, nor the last one where that may be computed again.
void Scheduler::drop_left_window(Sequence& sequence) {
  const uint32_t next = sequence.n_scheduled - (sequence.awaits_output && sequence.may_repeat_row() ? 1 : 0);
  for (uint32_t group = 0; group < allocators_.size(); ++group) {
    BlockTable& table = sequence.tables[group];
    const uint32_t n_left = plan_.groups[group].first_visible(next) / plan_.block_tokens;
    if (n_left <= table.n_dropped) continue;
    while (table.n_dropped < n_left) {
      allocators_[group].release(table.blocks.front());
      table.blocks.pop_front();
      ++table.n_dropped;
    }
    ops_.push_back({.kind = stage::KvOp::Kind::drop_front,
                    .group = group,
                    .slot = *sequence.slot,
                    .n_tokens = n_left * plan_.block_tokens});
  }
}

void Scheduler::append_blocks(Sequence& sequence, uint32_t n_rows) {
  const uint32_t n_blocks = blocks_for(uint64_t{sequence.n_scheduled} + n_rows, plan_.block_tokens);
  for (uint32_t group = 0; group < allocators_.size(); ++group) {
    if (plan_.groups[group].kind == GroupLimits::Kind::none) continue;
    BlockTable& table = sequence.tables[group];
    while (table.end() < n_blocks) {
      const uint32_t block = allocate(group, n_blocks - table.end());
      table.blocks.push_back(block);
      ops_.push_back({.kind = stage::KvOp::Kind::append, .group = group, .slot = *sequence.slot, .block = block});
    }
  }
}

Sequence* Scheduler::newest_after(uint64_t id) const {
  const auto newest = sequences_.rbegin();
  return newest != sequences_.rend() && newest->first > id ? newest->second : nullptr;
}

// Gets the blocks for the chosen chunks, oldest sequence first whatever its kind, so that only sequences without a
// place in this batch yet are preempted. Chunks shrink to what fits; those of preempted sequences vanish.
void Scheduler::reserve(std::vector<Chunk>& chunks) {
  std::vector<Chunk*> by_age;
  for (Chunk& chunk : chunks) by_age.push_back(&chunk);
  std::sort(by_age.begin(), by_age.end(),
            [](const Chunk* a, const Chunk* b) { return a->sequence->id < b->sequence->id; });
  for (Chunk* chunk : by_age) {
    Sequence& sequence = *chunk->sequence;
    if (!sequence.slot) {  // preempted for an older one
      chunk->n_rows = 0;
      continue;
    }
    while (rows_that_fit(sequence) == 0) {
      Sequence* victim = newest_after(sequence.id);
      if (!victim) break;
      preempt(*victim);
    }
    chunk->n_rows = std::min(chunk->n_rows, rows_that_fit(sequence));
    if (chunk->n_rows > 0) append_blocks(sequence, chunk->n_rows);
  }
  std::erase_if(chunks, [](const Chunk& chunk) { return chunk.n_rows == 0; });
}

void Scheduler::add_outputs(ScheduledBatch& scheduled, BatchPart& part, Sequence& sequence, uint32_t first_row) {
  std::vector<stage::OutputRequest>& outputs = scheduled.batch.outputs;
  part.first_output = static_cast<uint32_t>(outputs.size());
  if (sequence.embedding) {
    for (uint32_t i = 0; i < part.n_rows; ++i) {
      if (!sequence.embedding->index_of(part.first_position + i, sequence.n_tokens())) continue;
      outputs.push_back({first_row + i, stage::OutputKind::hidden, 0, {}});
    }
  } else if (part.reaches_end && sequence.generation->n_predict != 0) {
    outputs.push_back(sequence.generation->sampler.need(sequence.history()));
    outputs.back().row = first_row + part.n_rows - 1;
  }
  part.n_outputs = static_cast<uint32_t>(outputs.size()) - part.first_output;
}

void Scheduler::add_rows(ScheduledBatch& scheduled, const Chunk& chunk) {
  Sequence& sequence = *chunk.sequence;
  stage::Batch& batch = scheduled.batch;
  const uint32_t first_row = batch.n_rows();
  for (uint32_t i = 0; i < chunk.n_rows; ++i) {
    const uint32_t position = sequence.n_scheduled + i;
    const auto p = static_cast<int32_t>(position);
    batch.tokens.push_back(sequence.tokens[position]);
    batch.positions.push_back({p, p, p, p});
    batch.slots.push_back(*sequence.slot);
    for (const GroupLimits& group : plan_.groups) {
      if (group.kind == GroupLimits::Kind::none) {
        batch.visible.push_back({static_cast<int32_t>(first_row), static_cast<int32_t>(first_row + chunk.n_rows)});
      } else {
        batch.visible.push_back({static_cast<int32_t>(group.first_visible(position)), p + 1});
      }
    }
  }
  BatchPart part{.sequence = sequence.id,
                 .incarnation = sequence.incarnation,
                 .first_position = sequence.n_scheduled,
                 .n_rows = chunk.n_rows};
  part.reaches_end = chunk.n_rows == sequence.n_remaining();
  add_outputs(scheduled, part, sequence, first_row);
  scheduled.n_recomputed +=
      std::min(chunk.n_rows, sequence.n_evaluated - std::min(sequence.n_evaluated, sequence.n_scheduled));
  // A row that may be computed again must not be in a block that others share.
  const uint32_t n_open = sequence.may_repeat_row() ? 1 : 0;
  const uint32_t n_whole_blocks = (std::max(sequence.n_scheduled, n_open) - n_open) / plan_.block_tokens;
  sequence.n_scheduled += chunk.n_rows;
  if (sequence.uses_cache && (sequence.n_scheduled - n_open) / plan_.block_tokens > n_whole_blocks)
    cache_.insert(std::span(sequence.tokens).first(sequence.n_scheduled - n_open), sequence.tables);
  sequence.n_evaluated = std::max(sequence.n_evaluated, sequence.n_scheduled);
  sequence.awaits_output = part.reaches_end;
  scheduled.parts.push_back(part);
}

// Also of sequences without rows in the next batch: what left their windows is for the others.
void Scheduler::drop_left_windows() {
  for (auto& [id, sequence] : sequences_) drop_left_window(*sequence);
}

std::optional<ScheduledBatch> Scheduler::next_batch(InFlight in_flight) {
  const bool nothing_in_flight = in_flight.n == 0;
  drop_left_windows();
  std::vector<Chunk> chunks = choose(in_flight);
  const bool wanted = !chunks.empty();
  reserve(chunks);
  if (chunks.empty() && wanted && nothing_in_flight) {
    // The chosen need blocks that older ones hold which were not chosen: they decode while an older one is prefilled
    // (that waited for its slot, or lost a part of its context).
    chunks.push_back(oldest_chunk());
    reserve(chunks);
  }
  // The oldest takes what it needs from all others, and fits the plan alone.
  CARAVAN_ASSERT(!chunks.empty() || !wanted || !nothing_in_flight, "the oldest sequence can always go on");
  if (chunks.empty() && (ops_.empty() || !nothing_in_flight)) return std::nullopt;
  ScheduledBatch scheduled;
  scheduled.replica = replica_.id;
  for (const Chunk& chunk : chunks) {
    scheduled.decodes = scheduled.decodes || chunk.sequence->decodes();
    add_rows(scheduled, chunk);
  }
  scheduled.batch.kv_ops = std::exchange(ops_, {});
  return scheduled;
}

void Scheduler::recompute_all() {
  while (!sequences_.empty()) release(*sequences_.begin()->second, Blocks::dropped);
  cache_.clear();
  ops_.clear();
  for (stage::Slot slot = 0; slot < plan_.max_slots; ++slot) {
    ops_.push_back({.kind = stage::KvOp::Kind::free, .slot = slot});
  }
}

}  // namespace caravan::engine
