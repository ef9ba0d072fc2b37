// The planner shared by all ops, and the table from op to planning function.
#include "device/cpu/ops/step.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace caravan::device::cpu {

using graph::Op;

void resolve_views(const graph::Graph& graph, const graph::RowCounts& counts, std::vector<View>& views) {
  for (size_t id = 0; id < graph.values.size(); ++id) {
    const graph::Value& value = graph.values[id];
    View& view = views[id];
    view.ne = graph::resolve(value.type.ne, counts);
    const Node* node =
        value.kind == graph::Value::Kind::node ? &graph.nodes[static_cast<size_t>(value.index)] : nullptr;
    if (node != nullptr && node->op == Op::slice) {
      const auto& p = std::get<graph::SliceParams>(node->params);
      const View& source = views[static_cast<size_t>(node->inputs[0])];
      view.nb = source.nb;
      // While steps are planned there are no bytes yet.
      if (source.data) view.data = source.data + p.offset * source.nb[static_cast<size_t>(p.dim)];
      continue;
    }
    if (node != nullptr && node->op == Op::permute) {
      const auto& axes = std::get<graph::PermuteParams>(node->params).axes;
      const View& source = views[static_cast<size_t>(node->inputs[0])];
      for (size_t i = 0; i < 4; ++i) view.nb[static_cast<size_t>(axes[i])] = source.nb[i];
      view.data = source.data;
      continue;
    }
    if (node != nullptr && op_info(node->op).is_view) view.data = views[static_cast<size_t>(node->inputs[0])].data;
    view.nb[0] = 4;
    for (size_t i = 1; i < 4; ++i) view.nb[i] = view.nb[i - 1] * view.ne[i - 1];
  }
}

bool is_contiguous(const View& view) {
  int64_t expected = 4;
  for (size_t i = 0; i < 4; ++i) {
    if (view.ne[i] != 1 && view.nb[i] != expected) return false;
    expected *= view.ne[i];
  }
  return true;
}

namespace {

// No count is zero: sizes and strides are planned for the largest run.
graph::RowCounts largest_counts(const RunLimits& limits) {
  return {std::max<int64_t>(limits.max_rows, 1), std::max<int64_t>(limits.max_output_rows, 1),
          std::max<int64_t>(limits.max_context, 1), 1};
}

}  // namespace

Planner::Planner(const graph::Graph& graph_to_plan, const RunLimits& run_limits, const CacheSpec* cache_spec,
                 int worker_count)
    : graph(graph_to_plan),
      limits(run_limits),
      cache(cache_spec),
      n_workers(worker_count),
      max_counts(largest_counts(run_limits)),
      value_buffers(graph::assign_buffers(graph, max_counts)),
      max_views_(graph.values.size()) {
  resolve_views(graph, max_counts, max_views_);
}

int Planner::add_buffer(uint64_t size_bytes) {
  work_buffer_uses.push_back({size_bytes, current_, current_});
  return static_cast<int>(work_buffer_uses.size() - 1);
}

void Planner::extend_buffer(int id) { work_buffer_uses[static_cast<size_t>(id)].last = current_; }

void Planner::need_scratch(size_t bytes) {
  worker_scratch_bytes = std::max(worker_scratch_bytes, (bytes + 63) / 64 * 64);
}

void Planner::add_step(std::unique_ptr<Step> step, Touches touches) {
  steps.push_back({std::move(step), std::move(touches), current_, false, 0});
}

int Planner::quantized(ValueId x) {
  // A view that another value's buffer took over in the meantime cannot be among them: x is still read, hence alive.
  for (const SharedBuffer& shared : quantized_)
    if (shared.value == x) {
      extend_buffer(shared.buffer);
      return shared.buffer;
    }
  const View& view = max_view(x);
  const int buffer =
      add_buffer(activation_row_bytes(ActivationKind::q8, view.ne[0]) * static_cast<uint64_t>(view.n_rows()));
  quantized_.push_back({x, nullptr, buffer});
  add_step(make_quantize_step(x, buffer), {graph::kNoValue, {x}, {buffer}, {}, false});
  return buffer;
}

int Planner::rope_table(const Node& rope) {
  const std::vector<ValueId> inputs(rope.inputs.begin() + 1, rope.inputs.end());
  for (const SharedBuffer& shared : rope_tables_)
    if (shared.node->params == rope.params &&
        std::equal(inputs.begin(), inputs.end(), shared.node->inputs.begin() + 1, shared.node->inputs.end())) {
      extend_buffer(shared.buffer);
      return shared.buffer;
    }
  const auto& params = std::get<graph::RopeParams>(rope.params);
  const View& positions = max_view(rope.inputs[1]);
  const int buffer =
      add_buffer(static_cast<uint64_t>(params.n_rot) * sizeof(float) * static_cast<uint64_t>(positions.ne[0]));
  rope_tables_.push_back({rope.inputs[1], &rope, buffer});
  add_step(make_rope_table_step(rope, buffer), {graph::kNoValue, inputs, {buffer}, {}, false});
  return buffer;
}

void Planner::require(bool condition, std::string_view what) const {
  if (!condition)
    throw NotSupportedError(fmt::format("CPU: node {} ({}): {}", current_,
                                        graph::op_name(graph.nodes[static_cast<size_t>(current_)].op), what));
}

void Planner::plan() {
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    current_ = static_cast<int>(i);
    const Node& node = graph.nodes[i];
    if (node.op == Op::reshape) require(is_contiguous(max_view(node.inputs[0])), "the operand is not contiguous");
    if (const PlanFunction function = plan_function(node.op)) function(*this, node);
  }
}

PlanFunction plan_function(Op op) {
  switch (op) {
    case Op::reshape:
    case Op::slice:
    case Op::permute:
      return nullptr;
    case Op::cont:
    case Op::concat:
      return plan_copy;
    case Op::get_rows:
      return plan_get_rows;
    case Op::set_rows:
      return plan_set_rows;
    case Op::add:
    case Op::mul:
    case Op::div:
    case Op::scale:
    case Op::clamp:
    case Op::silu:
    case Op::gelu:
    case Op::gelu_erf:
    case Op::relu:
    case Op::tanh:
    case Op::sigmoid:
    case Op::gated:
      return plan_elementwise;
    case Op::rms_norm:
    case Op::layer_norm:
    case Op::soft_max:
    case Op::sum_rows:
      return plan_row_op;
    case Op::argsort:
    case Op::top_k:
      return plan_sort;
    case Op::rope:
      return plan_rope;
    case Op::mul_mat:
      return plan_mul_mat;
    case Op::mul_mat_id:
      return plan_mul_mat_id;
    case Op::paged_attention:
      return plan_paged_attention;
    case Op::encoder_attention:
      return plan_encoder_attention;
    case Op::moe:
      return plan_moe;
  }
  return nullptr;
}

}  // namespace caravan::device::cpu
