#include "device/cpu/executable.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/error.h"

namespace caravan::device::cpu {

using graph::Graph;
using graph::InputKind;
using graph::Op;
using graph::Value;

namespace {

bool has_input(const Graph& graph, InputKind kind) {
  return std::any_of(graph.values.begin(), graph.values.end(),
                     [&](const Value& value) { return value.kind == Value::Kind::input && value.input == kind; });
}

int n_groups_used(const Graph& graph) {
  int n = 0;
  for (const Value& value : graph.values) {
    if (value.kind == Value::Kind::input) n = std::max(n, value.input_group + 1);
    if (value.kind == Value::Kind::cache) n = std::max(n, value.cache.group + 1);
  }
  for (const Node& node : graph.nodes)
    if (const auto* p = std::get_if<graph::AttentionParams>(&node.params)) n = std::max(n, p->group + 1);
  return n;
}

// Bytes of the derived inputs of one group; each kind is counted where the graph has it.
uint64_t derived_bytes(const Graph& graph, const RunLimits& limits) {
  const auto rows = static_cast<uint64_t>(limits.max_rows), context = static_cast<uint64_t>(limits.max_context);
  uint64_t bytes = 0;
  for (const Value& value : graph.values) {
    if (value.kind != Value::Kind::input) continue;
    if (value.input == InputKind::row_cells) bytes += rows * 4;
    if (value.input == InputKind::context_cells) bytes += context * 12;
    if (value.input == InputKind::context_mask) bytes += context * rows * 4;
    if (value.input == InputKind::row_mask) bytes += rows * rows * 4;
  }
  return bytes;
}

}  // namespace

// ---- Plan ----------------------------------------------------------------------------------------------------------

CpuPlan::CpuPlan(const Graph& graph, const RunLimits& limits, const CacheSpec* cache, int n_workers)
    : planner_(graph, limits, cache, n_workers) {
  check_cache(graph, cache);
  planner_.plan();
  mark_wanted();
  find_output_buffers();
  std::vector<graph::BufferUse> uses = planner_.value_buffers.uses;
  uses.insert(uses.end(), planner_.work_buffer_uses.begin(), planner_.work_buffer_uses.end());
  buffers_ = graph::plan_buffers(uses);
  value_plan_bytes_ = buffers_.size_bytes;
  place_barriers();
}

uint64_t CpuPlan::scratch_bytes() const {
  return arena_bytes() + worker_scratch_bytes() * static_cast<uint64_t>(planner_.n_workers) +
         derived_bytes(planner_.graph, planner_.limits);
}

void CpuPlan::check_cache(const Graph& graph, const CacheSpec* cache) const {
  const auto layer_of = [&](int group, int layer) -> const CacheLayer& {
    if (cache == nullptr || static_cast<size_t>(group) >= cache->groups.size() ||
        static_cast<size_t>(layer) >= cache->groups[static_cast<size_t>(group)].layers.size())
      throw FormatError(fmt::format("the graph needs layer {} of cache group {}, which the cache lacks", layer, group));
    return cache->groups[static_cast<size_t>(group)].layers[static_cast<size_t>(layer)];
  };
  for (const Node& node : graph.nodes) {
    if (node.op != Op::paged_attention) continue;
    const auto& p = std::get<graph::AttentionParams>(node.params);
    const CacheLayer& layer = layer_of(p.group, p.layer);
    const graph::Dims &k = graph.type(node.inputs[1]).ne, &v = graph.type(node.inputs[2]).ne;
    if (k[0] != layer.head_dim_k || v[0] != layer.head_dim_v || k[1] != layer.n_head_kv)
      throw FormatError(fmt::format("layer {} of cache group {}: expected {} heads of {} and {}, found {} of {} and {}",
                                    p.layer, p.group, k[1], k[0], v[0], layer.n_head_kv, layer.head_dim_k,
                                    layer.head_dim_v));
  }
  for (const Value& value : graph.values) {
    if (value.kind != Value::Kind::cache) continue;
    const CacheLayer& layer = layer_of(value.cache.group, value.cache.layer);
    const int head_dim = value.cache.part == graph::CacheRef::Part::k ? layer.head_dim_k : layer.head_dim_v;
    if (value.type.ne[0] != int64_t{layer.n_head_kv} * head_dim)
      throw FormatError(fmt::format("cache '{}': expected rows of {}, found {}", value.name, value.type.ne[0],
                                    int64_t{layer.n_head_kv} * head_dim));
  }
}

// Which graph outputs need each step. Steps that write the cache are needed always.
void CpuPlan::mark_wanted() {
  constexpr uint64_t kAlways = ~uint64_t{0};
  const Graph& graph = planner_.graph;
  wanted_.assign(graph.values.size(), 0);
  for (size_t i = 0; i < graph.outputs.size(); ++i)
    wanted_[static_cast<size_t>(graph.outputs[i].value)] |= uint64_t{1} << std::min<size_t>(i, 63);
  for (size_t i = graph.nodes.size(); i-- > 0;) {
    const Node& node = graph.nodes[i];
    uint64_t& mask = wanted_[static_cast<size_t>(node.output)];
    if (node.op == Op::paged_attention || node.op == Op::set_rows) mask = kAlways;
    for (const ValueId input : node.inputs) wanted_[static_cast<size_t>(input)] |= mask;
  }
  std::vector<uint64_t> buffer_mask(planner_.work_buffer_uses.size());
  for (Planner::PlannedStep& step : planner_.steps) {
    const auto output = static_cast<size_t>(graph.nodes[static_cast<size_t>(step.node)].output);
    step.wanted_by = wanted_[output];
    for (const int id : step.touches.buffers_read) buffer_mask[static_cast<size_t>(id)] |= step.wanted_by;
  }
  for (Planner::PlannedStep& step : planner_.steps)
    if (step.touches.result == graph::kNoValue)
      for (const int id : step.touches.buffers_written) step.wanted_by |= buffer_mask[static_cast<size_t>(id)];
}

// A result that only one output needs is computed in that output's span: logits of many rows need no room here.
void CpuPlan::find_output_buffers() {
  const Graph& graph = planner_.graph;
  graph::ValueBuffers& buffers = planner_.value_buffers;
  output_of_buffer_.assign(buffers.uses.size(), -1);
  for (size_t i = 0; i < graph.outputs.size() && i < 63; ++i) {
    const auto value = static_cast<size_t>(graph.outputs[i].value);
    const int buffer = buffers.buffer[value];
    if (buffer < 0 || buffers.storage[value] != graph.outputs[i].value) continue;
    bool only_this = true;
    for (size_t id = 0; id < graph.values.size(); ++id)
      only_this &= buffers.buffer[id] != buffer || wanted_[id] == uint64_t{1} << i;
    for (const Node& node : graph.nodes)
      for (const ValueId input : node.inputs) only_this &= input != graph.outputs[i].value;
    if (!only_this) continue;
    output_of_buffer_[static_cast<size_t>(buffer)] = static_cast<int>(i);
    buffers.uses[static_cast<size_t>(buffer)].size_bytes = 0;
  }
}

// A step needs a barrier before it when it touches bytes that a step since the last barrier wrote, or writes bytes that
// one has read.
void CpuPlan::place_barriers() {
  struct Range {
    uint64_t begin, end;
    bool written;
  };
  const std::vector<graph::BufferUse>& value_uses = planner_.value_buffers.uses;
  constexpr uint64_t kOutputSpans = uint64_t{1} << 62;  // where the arena surely does not reach
  const auto range = [&](size_t use, bool written) {
    if (use < value_uses.size() && output_of_buffer_[use] >= 0) {
      const auto output = static_cast<uint64_t>(output_of_buffer_[use]);
      return Range{kOutputSpans + output, kOutputSpans + output + 1, written};
    }
    const uint64_t size = use < value_uses.size() ? value_uses[use].size_bytes
                                                  : planner_.work_buffer_uses[use - value_uses.size()].size_bytes;
    return Range{buffers_.offsets[use], buffers_.offsets[use] + size, written};
  };
  std::vector<Range> open;
  bool cache_open = false;
  for (Planner::PlannedStep& step : planner_.steps) {
    std::vector<Range> touched;
    const auto add_value = [&](ValueId id, bool written) {
      const int use = id == graph::kNoValue ? -1 : planner_.value_buffers.buffer[static_cast<size_t>(id)];
      if (use >= 0) touched.push_back(range(static_cast<size_t>(use), written));
    };
    add_value(step.touches.result, true);
    for (const ValueId id : step.touches.operands) add_value(id, false);
    for (const int id : step.touches.buffers_written)
      touched.push_back(range(value_uses.size() + static_cast<size_t>(id), true));
    for (const int id : step.touches.buffers_read)
      touched.push_back(range(value_uses.size() + static_cast<size_t>(id), false));
    bool conflict = step.touches.cache && cache_open;
    for (const Range& mine : touched)
      for (const Range& other : open)
        conflict |= (mine.written || other.written) && mine.begin < other.end && other.begin < mine.end;
    if (conflict) {
      step.barrier_before = true;
      open.clear();
      cache_open = false;
    }
    open.insert(open.end(), touched.begin(), touched.end());
    cache_open |= step.touches.cache;
  }
}

// ---- Executable ----------------------------------------------------------------------------------------------------

CpuExecutable::CpuExecutable(const Graph& graph, std::shared_ptr<const CpuWeightSet> weights,
                             std::shared_ptr<CpuCache> cache, const RunLimits& limits, CpuEngine& engine,
                             std::shared_ptr<MemoryAccount> account)
    : graph_(graph),
      limits_(limits),
      weights_(std::move(weights)),
      cache_(std::move(cache)),
      engine_(engine),
      plan_(graph_, limits_, cache_ == nullptr ? nullptr : &cache_->spec(), engine.pool.n_threads()),
      memory_(std::move(account), plan_.scratch_bytes(), "scratch"),
      derived_(static_cast<size_t>(n_groups_used(graph_))) {
  Planner& planner = plan_.planner();
  context_.kernels = &engine_.kernels;
  context_.pool = &engine_.pool;
  context_.n_workers = engine_.pool.n_threads();
  context_.cache = cache_.get();
  context_.weights = weights_.get();
  context_.views.resize(graph_.values.size());
  const size_t n_value_uses = planner.value_buffers.uses.size();
  for (size_t i = 0; i < planner.work_buffer_uses.size(); ++i)
    context_.work_buffers.push_back(memory_.data() + plan_.buffers().offsets[n_value_uses + i]);
  context_.worker_scratch = memory_.data() + plan_.arena_bytes();
  context_.worker_scratch_bytes = plan_.worker_scratch_bytes();
  row_runs_.reserve(static_cast<size_t>(limits_.max_rows));
  bind_weights();
  find_uses();
  for (size_t id = 0; id < graph_.values.size(); ++id)
    if (const int use = planner.value_buffers.buffer[id];
        use >= 0 && planner.value_buffers.storage[id] == ValueId(id)) {
      context_.views[id].data = memory_.data() + plan_.buffers().offsets[static_cast<size_t>(use)];
      if (const int output = plan_.output_of_buffer()[static_cast<size_t>(use)]; output >= 0)
        in_output_.emplace_back(id, output);
    }
  resolve_views(graph_, planner.max_counts, context_.views);
  for (Planner::PlannedStep& step : planner.steps) step.step->bind(context_);
}

void CpuExecutable::bind_weights() {
  for (const graph::WeightSpec& spec : graph_.weights) {
    const int index = weights_ == nullptr ? -1 : weights_->find(spec.name, spec.role);
    if (index < 0) throw FormatError(fmt::format("tensor '{}' ({}) was not loaded", spec.name, to_string(spec.role)));
    if (!(weights_->specs()[static_cast<size_t>(index)] == spec))
      throw FormatError(fmt::format("tensor '{}': loaded with another type or shape than the graph's {} {}", spec.name,
                                    tensor::dtype_name(spec.dtype), graph::to_string(spec.ne)));
    context_.weight_index.push_back(index);
  }
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const Value& value = graph_.values[id];
    if (value.kind == Value::Kind::weight)
      context_.views[id].data = const_cast<std::byte*>(
          weights_->data(static_cast<size_t>(context_.weight_index[static_cast<size_t>(value.index)])));
  }
}

void CpuExecutable::find_uses() {
  const auto use_group = [&](int group, bool cached) {
    for (GroupUse& use : group_uses_)
      if (use.group == group && use.cached == cached) return;
    group_uses_.push_back({group, cached});
  };
  for (const Node& node : graph_.nodes) {
    if (const auto* p = std::get_if<graph::AttentionParams>(&node.params))
      use_group(p->group, node.op == Op::paged_attention);
    if (node.op != Op::get_rows) continue;
    const Value& indices = graph_.value(node.inputs[1]);
    const Value::Kind table = graph_.value(node.inputs[0]).kind;
    const bool derived = indices.input == InputKind::context_cells || indices.input == InputKind::row_cells;
    if (indices.kind == Value::Kind::input && !derived && table != Value::Kind::cache)
      index_limits_.push_back({indices.input, node.inputs[0]});
  }
  for (const Value& value : graph_.values) {
    if (value.kind != Value::Kind::input) continue;
    DerivedInputs* derived = &derived_[static_cast<size_t>(value.input_group)];
    const auto rows = static_cast<size_t>(limits_.max_rows), context = static_cast<size_t>(limits_.max_context);
    if (value.input == InputKind::row_cells) derived->row_cells.resize(rows);
    if (value.input == InputKind::context_cells) {
      derived->context_cells.resize(context);
      derived->context_slots.resize(context);
      derived->context_tokens.resize(context);
    }
    if (value.input == InputKind::context_mask) derived->mask.resize(context * rows);
    if (value.input == InputKind::row_mask) derived->mask.resize(rows * rows);
    if (value.input == InputKind::row_cells || value.input == InputKind::context_cells)
      use_group(value.input_group, true);
    if (value.input == InputKind::row_mask) use_group(value.input_group, false);
  }
}

// ---- Checks of a run's input ---------------------------------------------------------------------------------------

namespace {

void require_length(std::string_view what, size_t found, int64_t expected) {
  if (found != static_cast<size_t>(expected))
    throw RequestError(fmt::format("batch: {} has {} entries, expected {}", what, found, expected));
}

}  // namespace

void CpuExecutable::check_input(const RunInput& input) const {
  if (input.n_rows < 1 || input.n_rows > limits_.max_rows)
    throw RequestError(fmt::format("batch of {} rows, expected 1 to {}", input.n_rows, limits_.max_rows));
  if (has_input(graph_, InputKind::tokens)) require_length("tokens", input.tokens.size(), input.n_rows);
  if (has_input(graph_, InputKind::positions)) require_length("positions", input.positions.size(), input.n_rows);
  for (const Value& value : graph_.values)
    if (value.kind == Value::Kind::input && value.input == InputKind::hidden)
      require_length("hidden", input.hidden.size(), input.n_rows * value.type.ne[0]);
  if (static_cast<int64_t>(input.output_rows.size()) > limits_.max_output_rows)
    throw RequestError(
        fmt::format("batch: {} output rows, expected at most {}", input.output_rows.size(), limits_.max_output_rows));
  check_indices(input);
  for (const GroupUse& use : group_uses_) check_group(input, use);
  check_outputs(input);
}

void CpuExecutable::check_indices(const RunInput& input) const {
  const graph::RowCounts counts{input.n_rows, static_cast<int64_t>(input.output_rows.size()), 0, 0};
  for (const int32_t row : input.output_rows)
    if (row < 0 || row >= input.n_rows)
      throw RequestError(fmt::format("batch: output row {} is not within 0..{}", row, input.n_rows - 1));
  for (const IndexLimit& limit : index_limits_) {
    const int64_t n = graph::resolve(graph_.type(limit.table).ne, counts)[1];
    const std::span<const int32_t> indices = limit.kind == InputKind::tokens      ? input.tokens
                                             : limit.kind == InputKind::positions ? input.positions
                                                                                  : input.output_rows;
    for (const int32_t index : indices)
      if (index < 0 || index >= n)
        throw RequestError(fmt::format("batch: {} {} is not within 0..{}",
                                       limit.kind == InputKind::tokens      ? "token"
                                       : limit.kind == InputKind::positions ? "position"
                                                                            : "output row",
                                       index, n - 1));
  }
}

void CpuExecutable::check_group(const RunInput& input, const GroupUse& use) const {
  const auto fail = [&](size_t row, const std::string& what) {
    throw RequestError(fmt::format("batch: row {}, cache group {}: {}", row, use.group, what));
  };
  if (static_cast<size_t>(use.group) >= input.groups.size())
    throw RequestError(fmt::format("batch: {} cache groups, expected more than {}", input.groups.size(), use.group));
  const GroupInput& group = input.groups[static_cast<size_t>(use.group)];
  require_length("visible_from", group.visible_from.size(), input.n_rows);
  require_length("visible_to", group.visible_to.size(), input.n_rows);
  const auto n_rows = static_cast<size_t>(input.n_rows);
  if (!use.cached) {
    for (size_t row = 0; row < n_rows; ++row)
      if (group.visible_from[row] < 0 || group.visible_from[row] > group.visible_to[row] ||
          group.visible_to[row] > input.n_rows)
        fail(row, fmt::format("rows [{}, {}) of {}", group.visible_from[row], group.visible_to[row], input.n_rows));
    return;
  }
  require_length("slots", input.slots.size(), input.n_rows);
  require_length("token_index", input.token_index.size(), input.n_rows);
  const int32_t tokens = cache_->spec().block_tokens;
  const int64_t n_blocks = cache_->spec().groups[static_cast<size_t>(use.group)].n_blocks;
  int32_t checked_slot = -1, checked_from = 0, checked_to = 0;  // blocks of this range are known to be good
  for (size_t row = 0; row < n_rows; ++row) {
    const int32_t slot = input.slots[row], token = input.token_index[row];
    if (slot < 0 || static_cast<size_t>(slot) >= group.tables.size()) fail(row, fmt::format("no slot {}", slot));
    const BlockTable table = group.tables[static_cast<size_t>(slot)];
    const auto check_block = [&](int64_t block) {
      if (static_cast<size_t>(block) >= table.size() || table[static_cast<size_t>(block)] < 0 ||
          table[static_cast<size_t>(block)] >= n_blocks)
        fail(row, fmt::format("slot {} has no block for tokens from {}", slot, block * tokens));
    };
    if (token < 0) fail(row, fmt::format("token index {}", token));
    check_block(token / tokens);
    const int32_t from = group.visible_from[row], to = group.visible_to[row];
    if (from < 0 || from > to) fail(row, fmt::format("visible tokens [{}, {})", from, to));
    if (slot != checked_slot || from < checked_from) {
      checked_slot = slot;
      checked_from = checked_to = from;
    }
    for (int64_t block = std::max(from, checked_to) / tokens; block * tokens < to; ++block) check_block(block);
    checked_to = std::max(checked_to, to);
  }
}

void CpuExecutable::check_outputs(const RunInput& input) const {
  require_length("outputs", input.outputs.size(), static_cast<int64_t>(graph_.outputs.size()));
  const graph::RowCounts counts{input.n_rows, static_cast<int64_t>(input.output_rows.size()), 0, 0};
  for (size_t i = 0; i < graph_.outputs.size(); ++i)
    if (!input.outputs[i].empty())
      require_length(graph_.outputs[i].name, input.outputs[i].size(),
                     tensor::n_elements(graph::resolve(graph_.type(graph_.outputs[i].value).ne, counts)));
}

namespace {

std::byte* as_bytes(float* values) { return reinterpret_cast<std::byte*>(values); }

}  // namespace

// ---- Run -----------------------------------------------------------------------------------------------------------

void CpuExecutable::find_row_runs(const RunInput& input) {
  row_runs_.clear();
  for (int64_t row = 0; row < static_cast<int64_t>(input.slots.size()); ++row) {
    const int32_t slot = input.slots[static_cast<size_t>(row)];
    if (row_runs_.empty() || row_runs_.back().slot != slot) row_runs_.push_back({row, row, slot});
    row_runs_.back().end = row + 1;
  }
  context_.row_runs = row_runs_;
}

void CpuExecutable::derive_cells(const RunInput& input, int group, int32_t* row_cells) {
  const int32_t tokens = cache_->spec().block_tokens;
  const GroupInput& ranges = input.groups[static_cast<size_t>(group)];
  for (size_t row = 0; row < static_cast<size_t>(input.n_rows); ++row) {
    const BlockTable table = ranges.tables[static_cast<size_t>(input.slots[row])];
    const int32_t token = input.token_index[row];
    row_cells[row] = table[static_cast<size_t>(token / tokens)] * tokens + token % tokens;
  }
}

int64_t CpuExecutable::derive_context(const RunInput& input, int group) {
  const int32_t tokens = cache_->spec().block_tokens;
  const GroupInput& ranges = input.groups[static_cast<size_t>(group)];
  DerivedInputs& derived = derived_[static_cast<size_t>(group)];
  int64_t n = 0;
  const auto n_rows = static_cast<size_t>(input.n_rows);
  for (size_t first = 0; first < n_rows; ++first) {
    const int32_t slot = input.slots[first];
    if (std::find(input.slots.begin(), input.slots.begin() + static_cast<ptrdiff_t>(first), slot) !=
        input.slots.begin() + static_cast<ptrdiff_t>(first))
      continue;
    int32_t from = std::numeric_limits<int32_t>::max(), to = 0;
    for (size_t row = first; row < n_rows; ++row)
      if (input.slots[row] == slot && ranges.visible_from[row] < ranges.visible_to[row]) {
        from = std::min(from, ranges.visible_from[row]);
        to = std::max(to, ranges.visible_to[row]);
      }
    const BlockTable table = ranges.tables[static_cast<size_t>(slot)];
    for (int32_t token = from; token < to; ++token) {
      const int32_t block = table[static_cast<size_t>(token / tokens)];
      if (block < 0) continue;  // between the ranges of two rows
      if (n == limits_.max_context)
        throw RequestError(fmt::format("batch sees more than {} cached tokens", limits_.max_context));
      derived.context_cells[static_cast<size_t>(n)] = block * tokens + token % tokens;
      derived.context_slots[static_cast<size_t>(n)] = slot;
      derived.context_tokens[static_cast<size_t>(n++)] = token;
    }
  }
  return n;
}

void CpuExecutable::fill_context_mask(const RunInput& input, int group, int64_t context, float* mask) const {
  const GroupInput& ranges = input.groups[static_cast<size_t>(group)];
  const DerivedInputs& derived = derived_[static_cast<size_t>(group)];
  for (size_t row = 0; row < static_cast<size_t>(input.n_rows); ++row)
    for (size_t i = 0; i < static_cast<size_t>(context); ++i) {
      const bool sees = derived.context_slots[i] == input.slots[row] &&
                        derived.context_tokens[i] >= ranges.visible_from[row] &&
                        derived.context_tokens[i] < ranges.visible_to[row];
      *mask++ = sees ? 0 : -std::numeric_limits<float>::infinity();
    }
}

void CpuExecutable::set_inputs(const RunInput& input) {
  context_.counts = {input.n_rows, static_cast<int64_t>(input.output_rows.size()), 0, 0};
  // Every group's gathered cells have one length: that of the longest; the others end in cells that nobody sees.
  for (const Value& value : graph_.values)
    if (value.kind == Value::Kind::input && value.input == InputKind::context_cells) {
      DerivedInputs& derived = derived_[static_cast<size_t>(value.input_group)];
      const auto n = static_cast<ptrdiff_t>(derive_context(input, value.input_group));
      std::fill(derived.context_cells.begin() + n, derived.context_cells.end(), 0);
      std::fill(derived.context_slots.begin() + n, derived.context_slots.end(), -1);
      context_.counts.context = std::max<int64_t>(context_.counts.context, n);
    }
  const auto set = [&](size_t id, const void* data) {
    context_.views[id].data = const_cast<std::byte*>(static_cast<const std::byte*>(data));
  };
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const Value& value = graph_.values[id];
    if (value.kind != Value::Kind::input) continue;
    DerivedInputs& derived = derived_[static_cast<size_t>(value.input_group)];
    switch (value.input) {
      case InputKind::tokens:
        set(id, input.tokens.data());
        break;
      case InputKind::hidden:
        set(id, input.hidden.data());
        break;
      case InputKind::positions:
        set(id, input.positions.data());
        break;
      case InputKind::output_rows:
        set(id, input.output_rows.data());
        break;
      case InputKind::row_cells:
        derive_cells(input, value.input_group, derived.row_cells.data());
        set(id, derived.row_cells.data());
        break;
      case InputKind::context_cells:
        set(id, derived.context_cells.data());
        break;
      case InputKind::context_mask:
        fill_context_mask(input, value.input_group, context_.counts.context, derived.mask.data());
        set(id, derived.mask.data());
        break;
      case InputKind::row_mask: {
        const GroupInput& ranges = input.groups[static_cast<size_t>(value.input_group)];
        float* mask = derived.mask.data();
        for (size_t row = 0; row < static_cast<size_t>(input.n_rows); ++row)
          for (int32_t other = 0; other < input.n_rows; ++other)
            *mask++ = other >= ranges.visible_from[row] && other < ranges.visible_to[row]
                          ? 0
                          : -std::numeric_limits<float>::infinity();
        set(id, derived.mask.data());
        break;
      }
    }
  }
}

void CpuExecutable::copy_outputs(const RunInput& input, int worker) const {
  for (size_t i = 0; i < graph_.outputs.size(); ++i) {
    if (input.outputs[i].empty() || context_.view(graph_.outputs[i].value).data == as_bytes(input.outputs[i].data()))
      continue;
    const View& view = context_.view(graph_.outputs[i].value);
    float* out = input.outputs[i].data();
    for_row_parts(view.n_rows(), view.ne[0], worker, context_.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column)
        std::memcpy(out + row * view.ne[0] + column, view.row_bytes(row) + column * view.nb[0], sizeof(float));
    });
  }
}

void CpuExecutable::run(const RunInput& input) {
  const std::lock_guard lock(engine_.run_mutex);
  check_input(input);
  find_row_runs(input);
  set_inputs(input);
  context_.input = &input;
  for (const auto& [id, output] : in_output_)
    context_.views[id].data = as_bytes(input.outputs[static_cast<size_t>(output)].data());
  resolve_views(graph_, context_.counts, context_.views);
  uint64_t wanted = 0;
  for (size_t i = 0; i < graph_.outputs.size(); ++i)
    if (!input.outputs[i].empty()) wanted |= uint64_t{1} << std::min<size_t>(i, 63);
  // Steps that write the cache have every bit set, bit 63 among them.
  wanted |= uint64_t{1} << 63;
  std::vector<Planner::PlannedStep>& steps = plan_.planner().steps;
  for (Planner::PlannedStep& step : steps) step.step->prepare(context_);
  engine_.pool.run([&](int worker) {
    for (Planner::PlannedStep& step : steps) {
      if (step.barrier_before) engine_.pool.barrier();
      if ((step.wanted_by & wanted) != 0) step.step->run(context_, worker);
    }
    engine_.pool.barrier();
    copy_outputs(input, worker);
  });
  context_.input = nullptr;
}

}  // namespace caravan::device::cpu
