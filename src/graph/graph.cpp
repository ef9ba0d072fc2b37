// Checks and prints graphs.
#include "graph/graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "graph/infer.h"

namespace caravan::graph {
namespace {

std::string value_text(const Graph& graph, ValueId id) {
  const Value& value = graph.value(id);
  if (value.kind == Value::Kind::node && value.name.empty()) return fmt::format("%{}", id);
  return value.name;
}

std::string type_text(const Type& type) { return (type.element == Element::f32 ? "f32" : "i32") + to_string(type.ne); }

std::string params_text(const Params& params) {
  struct Printer {
    std::string operator()(const NoParams&) const { return ""; }
    std::string operator()(const ReshapeParams&) const { return ""; }
    std::string operator()(const SliceParams& p) const {
      return fmt::format("dim={}, offset={}, length={}", p.dim, p.offset, p.length);
    }
    std::string operator()(const PermuteParams& p) const {
      return fmt::format("axes={}{}{}{}", p.axes[0], p.axes[1], p.axes[2], p.axes[3]);
    }
    std::string operator()(const ConcatParams& p) const { return fmt::format("dim={}", p.dim); }
    std::string operator()(const ScaleParams& p) const { return fmt::format("factor={}, bias={}", p.factor, p.bias); }
    std::string operator()(const ClampParams& p) const { return fmt::format("min={}, max={}", p.min, p.max); }
    std::string operator()(const NormParams& p) const { return fmt::format("eps={}", p.eps); }
    std::string operator()(const SoftMaxParams& p) const { return fmt::format("scale={}", p.scale); }
    std::string operator()(const SortParams& p) const {
      return p.order == SortOrder::ascending ? "ascending" : "descending";
    }
    std::string operator()(const TopKParams& p) const { return fmt::format("k={}", p.k); }
    std::string operator()(const RopeParams& p) const {
      return fmt::format("n_rot={}, {}, base={}, scale={}{}", p.n_rot,
                         p.pairing == RopePairing::adjacent ? "adjacent" : "halves", p.freq_base, p.freq_scale,
                         p.ext_factor != 0 ? ", yarn" : "");
    }
    std::string operator()(const AttentionParams& p) const {
      return fmt::format("group={}, layer={}, scale={}, softcap={}", p.group, p.layer, p.scale, p.softcap);
    }
    std::string operator()(const MoeParams& p) const { return fmt::format("used={}", p.n_expert_used); }
    std::string operator()(const GatedParams& p) const {
      constexpr std::string_view kNames[] = {"silu", "gelu", "gelu_erf", "relu", "swiglu_oai"};
      return std::string(kNames[static_cast<size_t>(p.activation)]);
    }
  };
  return std::visit(Printer{}, params);
}

// Weights and caches may only appear where a device can read their storage.
void check_storage(const Graph& graph, const Node& node) {
  const auto is_cache = [&](ValueId id) {
    const Value& value = graph.value(id);
    return value.kind == Value::Kind::cache ||
           (value.kind == Value::Kind::node && graph.nodes[static_cast<size_t>(value.index)].op == Op::set_rows);
  };
  const auto* moe = std::get_if<MoeParams>(&node.params);
  const size_t matrices_end = moe != nullptr ? moe->down_index() + 1 : 1;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const Value& value = graph.value(node.inputs[i]);
    if (is_cache(node.inputs[i]) && !(i == 0 && (node.op == Op::get_rows || node.op == Op::set_rows)))
      throw FormatError(fmt::format("{}: cache '{}' can only be read by get_rows", op_name(node.op), value.name));
    if (i == 0 && node.op == Op::set_rows && !is_cache(node.inputs[0]))
      throw FormatError(fmt::format("set_rows: '{}' is no cache", value_text(graph, node.inputs[0])));
    if (value.kind != Value::Kind::weight) continue;
    const WeightRole role = graph.weights[static_cast<size_t>(value.index)].role;
    const bool product = (i == 0 && (node.op == Op::mul_mat || node.op == Op::mul_mat_id)) ||
                         (node.op == Op::moe && i >= 2 && i < matrices_end);
    const bool fits = role == WeightRole::matrix ? product
                      : role == WeightRole::embedding
                          ? node.op == Op::get_rows && i == 0
                          : node.op != Op::mul_mat_id && (node.op != Op::moe || i >= matrices_end);
    if (!fits)
      throw FormatError(fmt::format("tensor '{}': a weight of role {} cannot be operand {} of {}", value.name,
                                    to_string(role), i, op_name(node.op)));
  }
  const bool needs_matrices = node.op == Op::mul_mat_id || node.op == Op::moe;
  for (size_t i = node.op == Op::moe ? 2 : 0; needs_matrices && i < matrices_end && i < node.inputs.size(); ++i)
    if (graph.value(node.inputs[i]).kind != Value::Kind::weight)
      throw FormatError(fmt::format("{}: operand {} must be a matrix weight", op_name(node.op), i));
}

void check_value(const Graph& graph, size_t id) {
  const Value& value = graph.values[id];
  const auto index = static_cast<size_t>(value.index);
  for (const int64_t dim : value.type.ne)
    if (dim == 0 || dim < kCells) throw FormatError(fmt::format("value %{}: dimension {}", id, dim));
  if (value.kind == Value::Kind::weight) {
    if (value.index < 0 || index >= graph.weights.size())
      throw FormatError(fmt::format("value %{}: no weight {}", id, value.index));
    if (graph.weights[index].ne != value.type.ne)
      throw FormatError(fmt::format("tensor '{}': value has shape {}, weight {}", graph.weights[index].name,
                                    to_string(value.type.ne), to_string(graph.weights[index].ne)));
  }
  if (value.kind == Value::Kind::node &&
      (value.index < 0 || index >= graph.nodes.size() || graph.nodes[index].output != static_cast<ValueId>(id)))
    throw FormatError(fmt::format("value %{}: node {} does not define it", id, value.index));
}

}  // namespace

std::string_view to_string(WeightRole role) {
  switch (role) {
    case WeightRole::matrix:
      return "matrix";
    case WeightRole::vector:
      return "vector";
    case WeightRole::embedding:
      return "embedding";
  }
  return "unknown";
}

std::optional<size_t> Graph::find_output(std::string_view name) const {
  for (size_t i = 0; i < outputs.size(); ++i)
    if (outputs[i].name == name) return i;
  return std::nullopt;
}

Dims resolve(const Dims& ne, const RowCounts& counts) {
  Dims fixed = ne;
  for (int64_t& dim : fixed) {
    if (dim == kRows) dim = counts.rows;
    if (dim == kOutputRows) dim = counts.output_rows;
    if (dim == kContext) dim = counts.context;
    if (dim == kCells) dim = counts.cells;
  }
  return fixed;
}

Type infer_type(const Graph& graph, const Node& node) {
  const OpInfo& info = op_info(node.op);
  std::string operands;
  std::vector<Type> types;
  for (const ValueId input : node.inputs) {
    if (input < 0 || static_cast<size_t>(input) >= graph.values.size())
      throw FormatError(fmt::format("{}: operand {} does not exist", info.name, input));
    types.push_back(graph.type(input));
    if (!operands.empty()) operands += ", ";
    operands += fmt::format("{} {}", value_text(graph, input), to_string(types.back().ne));
  }
  const auto fail = [&](const std::string& why) {
    throw FormatError(fmt::format("{}({}): {}", info.name, operands, why));
  };
  const int n = static_cast<int>(types.size());
  if (n < info.min_inputs || n > info.max_inputs)
    fail(fmt::format("takes {} to {} operands, found {}", info.min_inputs, info.max_inputs, n));
  if (node.params.index() != info.params_index) fail("has the parameters of another op");
  check_storage(graph, node);
  try {
    return info.infer(types, node.params);
  } catch (const FormatError& error) {
    fail(error.what());
    throw;
  }
}

void validate(const Graph& graph) {
  for (size_t id = 0; id < graph.values.size(); ++id) check_value(graph, id);
  std::vector<bool> defined(graph.values.size());
  for (size_t id = 0; id < graph.values.size(); ++id) defined[id] = graph.values[id].kind != Value::Kind::node;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    if (static_cast<size_t>(node.op) >= static_cast<size_t>(kOpCount))
      throw FormatError(fmt::format("node {}: no op has number {}", i, static_cast<int>(node.op)));
    const Type type = infer_type(graph, node);
    for (const ValueId input : node.inputs)
      if (!defined[static_cast<size_t>(input)])
        throw FormatError(
            fmt::format("node {} ({}): operand %{} is used before it is defined", i, op_name(node.op), input));
    if (std::any_of(node.inputs.begin(), node.inputs.end(), [&](ValueId input) { return input >= node.output; }))
      throw FormatError(fmt::format("node {} ({}): its result must come after its operands", i, op_name(node.op)));
    if (node.output < 0 || static_cast<size_t>(node.output) >= graph.values.size() ||
        graph.value(node.output).kind != Value::Kind::node || graph.value(node.output).index != static_cast<int32_t>(i))
      throw FormatError(fmt::format("node {} ({}): its result %{} is not its own", i, op_name(node.op), node.output));
    if (!(graph.type(node.output) == type))
      throw FormatError(fmt::format("node {} ({}): result %{} is declared {}, expected {}", i, op_name(node.op),
                                    node.output, type_text(graph.type(node.output)), type_text(type)));
    defined[static_cast<size_t>(node.output)] = true;
  }
  std::set<std::string_view> names;
  for (const Output& output : graph.outputs) {
    if (output.value < 0 || static_cast<size_t>(output.value) >= graph.values.size() ||
        graph.value(output.value).kind != Value::Kind::node || graph.type(output.value).element != Element::f32)
      throw FormatError(fmt::format("output '{}' is not the f32 result of a node", output.name));
    if (!names.insert(output.name).second) throw FormatError(fmt::format("output '{}' is declared twice", output.name));
  }
}

std::string dump(const Graph& graph) {
  std::string text;
  for (const Node& node : graph.nodes) {
    text += fmt::format("%{} {} = {}(", node.output, type_text(graph.type(node.output)), op_name(node.op));
    for (size_t i = 0; i < node.inputs.size(); ++i)
      text += fmt::format("{}{}", i == 0 ? "" : ", ", value_text(graph, node.inputs[i]));
    text += ")";
    if (const std::string params = params_text(node.params); !params.empty()) text += " {" + params + "}";
    if (const std::string& name = graph.value(node.output).name; !name.empty()) text += "  # " + name;
    text += "\n";
  }
  for (const Output& output : graph.outputs)
    text += fmt::format("output {} = {}\n", output.name, value_text(graph, output.value));
  return text;
}

}  // namespace caravan::graph
