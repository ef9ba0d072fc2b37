#include "stage/batch.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace caravan::stage {
namespace {

// Longest block table of a slot: logical blocks, those forgotten at its front included. Far above any context.
constexpr uint32_t kMaxTokens = 1u << 30;

template <typename Expected, typename Found>
[[noreturn]] void refuse(const std::string& field, const Expected& expected, const Found& found) {
  throw ProtocolError(fmt::format("batch: {}: expected {}, found {}", field, expected, found));
}

void check_size(const char* field, size_t expected, size_t found) {
  if (found != expected) refuse(fmt::format("number of {}", field), expected, found);
}

void check_below(const std::string& field, uint64_t value, uint64_t limit) {
  if (value >= limit) refuse(field, fmt::format("less than {}", limit), value);
}

void check_token(const std::string& field, int32_t token, uint32_t n_vocab) {
  if (token < 0 || static_cast<uint32_t>(token) >= n_vocab) {
    refuse(field, fmt::format("a token id less than {}", n_vocab), token);
  }
}

void check_sizes(const Batch& batch, const BatchLimits& limits) {
  const size_t n_rows = batch.tokens.size();
  if (n_rows > limits.max_rows) refuse("rows", fmt::format("at most {}", limits.max_rows), n_rows);
  check_size("positions", n_rows, batch.positions.size());
  check_size("slots", n_rows, batch.slots.size());
  check_size("visible ranges", n_rows * limits.n_blocks.size(), batch.visible.size());
  if (!batch.ancestors.empty()) throw NotSupportedError("batch: ancestor bits (tree speculation) are not supported");
  if (!batch.adapters.empty()) throw NotSupportedError("batch: LoRA adapters are not supported");
}

void check_rows(const Batch& batch, const BatchLimits& limits) {
  std::vector<int32_t> last_position(limits.max_slots, -1);
  for (size_t row = 0; row < batch.tokens.size(); ++row) {
    check_token(fmt::format("token of row {}", row), batch.tokens[row], limits.n_vocab);
    check_below(fmt::format("slot of row {}", row), batch.slots[row], limits.max_slots);
    for (const int32_t position : batch.positions[row]) {
      if (position < 0 || static_cast<uint32_t>(position) >= kMaxTokens) {
        refuse(fmt::format("position of row {}", row), fmt::format("0 to {}", kMaxTokens - 1), position);
      }
    }
    // Rows of one slot write different cells.
    int32_t& last = last_position[batch.slots[row]];
    const int32_t position = batch.positions[row][0];
    if (position <= last) {
      refuse(fmt::format("position of row {}", row), fmt::format("more than {}, the slot's row before", last),
             position);
    }
    last = position;
  }
}

// A row of a cached group sees its own position, and nothing before 0.
void check_cached_group(const Batch& batch, size_t group, size_t n_groups) {
  for (size_t row = 0; row < batch.tokens.size(); ++row) {
    const VisibleRange& range = batch.visible[row * n_groups + group];
    const int32_t position = batch.positions[row][0];
    if (range.from < 0 || range.from > position || range.to <= position) {
      refuse(fmt::format("visible range of row {} in group {}", row, group),
             fmt::format("one that holds its position {}", position), fmt::format("[{}, {})", range.from, range.to));
    }
  }
}

// Rows of a group without cache see exactly the rows of their own slot, which are contiguous.
void check_encoder_group(const Batch& batch, size_t group, size_t n_groups, uint32_t max_slots) {
  std::vector<bool> seen(max_slots, false);
  const size_t n_rows = batch.tokens.size();
  for (size_t begin = 0, end; begin < n_rows; begin = end) {
    const Slot slot = batch.slots[begin];
    if (seen[slot]) refuse(fmt::format("slot of row {}", begin), "contiguous rows per slot", slot);
    seen[slot] = true;
    for (end = begin; end < n_rows && batch.slots[end] == slot;) ++end;
    const VisibleRange expected{static_cast<int32_t>(begin), static_cast<int32_t>(end)};
    for (size_t row = begin; row < end; ++row) {
      const VisibleRange& range = batch.visible[row * n_groups + group];
      if (range != expected) {
        refuse(fmt::format("visible range of row {} in group {}", row, group),
               fmt::format("rows [{}, {})", expected.from, expected.to), fmt::format("[{}, {})", range.from, range.to));
      }
    }
  }
}

void check_outputs(const Batch& batch, const BatchLimits& limits) {
  if (batch.outputs.size() > limits.max_outputs) {
    refuse("outputs", fmt::format("at most {}", limits.max_outputs), batch.outputs.size());
  }
  for (size_t i = 0; i < batch.outputs.size(); ++i) {
    const OutputRequest& output = batch.outputs[i];
    check_below(fmt::format("row of output {}", i), output.row, batch.n_rows());
    if (i > 0 && output.row <= batch.outputs[i - 1].row) {
      refuse(fmt::format("row of output {}", i), fmt::format("more than {}", batch.outputs[i - 1].row), output.row);
    }
    if (output.kind > OutputKind::candidates) {
      refuse(fmt::format("kind of output {}", i), "0 to 3", static_cast<int>(output.kind));
    }
    if (output.top_k > limits.n_vocab) {
      refuse(fmt::format("top_k of output {}", i), fmt::format("at most {}", limits.n_vocab), output.top_k);
    }
    if (output.named_ids.size() > limits.n_vocab) {
      refuse(fmt::format("named ids of output {}", i), fmt::format("at most {}", limits.n_vocab),
             output.named_ids.size());
    }
    for (const int32_t id : output.named_ids) {
      check_token(fmt::format("named id of output {}", i), id, limits.n_vocab);
    }
  }
}

void check_kv_op(const KvOp& op, size_t i, const BatchLimits& limits) {
  const auto field = [&](const char* name) { return fmt::format("{} of KV operation {}", name, i); };
  const auto check_block = [&](const char* name, uint32_t block) {
    check_below(field("group"), op.group, limits.n_blocks.size());
    check_below(field(name), block, limits.n_blocks[op.group]);
  };
  check_below(field("slot"), op.slot, limits.max_slots);
  if (op.n_tokens > kMaxTokens) refuse(field("n_tokens"), fmt::format("at most {}", kMaxTokens), op.n_tokens);
  switch (op.kind) {
    case KvOp::Kind::append:
      return check_block("block", op.block);
    case KvOp::Kind::copy_block:
      check_block("block", op.block);
      return check_block("source", op.source);
    case KvOp::Kind::fork:
      return check_below(field("source"), op.source, limits.max_slots);
    case KvOp::Kind::drop_front:
      return check_below(field("group"), op.group, limits.n_blocks.size());
    case KvOp::Kind::truncate:
    case KvOp::Kind::free:
      return;
  }
  refuse(field("kind"), "a known one", static_cast<int>(op.kind));
}

}  // namespace

void validate(const Batch& batch, const BatchLimits& limits) {
  check_sizes(batch, limits);
  check_rows(batch, limits);
  const size_t n_groups = limits.n_blocks.size();
  for (size_t group = 0; group < n_groups; ++group) {
    if (limits.n_blocks[group] > 0) {
      check_cached_group(batch, group, n_groups);
    } else {
      check_encoder_group(batch, group, n_groups, limits.max_slots);
    }
  }
  check_outputs(batch, limits);
  for (size_t i = 0; i < batch.kv_ops.size(); ++i) check_kv_op(batch.kv_ops[i], i, limits);
}

}  // namespace caravan::stage
