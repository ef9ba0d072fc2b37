#include "graph/builder.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "graph/infer.h"

namespace caravan::graph {
namespace {

// Operands of a node without the optional ones that are missing at the end.
std::vector<ValueId> operands(std::initializer_list<ValueId> ids) {
  std::vector<ValueId> inputs(ids);
  while (!inputs.empty() && inputs.back() == kNoValue) inputs.pop_back();
  return inputs;
}

}  // namespace

DimList::DimList(std::initializer_list<int64_t> dims) {
  CARAVAN_ASSERT(dims.size() <= 4, "tensors have at most four dimensions");
  std::copy(dims.begin(), dims.end(), ne.begin());
}

ValueId Builder::add_value(Value value) {
  graph_.values.push_back(std::move(value));
  return static_cast<ValueId>(graph_.values.size() - 1);
}

ValueId Builder::input(InputKind kind, Type type, std::string name, int group) {
  for (size_t i = 0; i < graph_.values.size(); ++i) {
    const Value& value = graph_.values[i];
    if (value.kind != Value::Kind::input || value.input != kind || value.input_group != group) continue;
    if (!(value.type == type)) throw FormatError(fmt::format("input '{}' has two shapes", name));
    return static_cast<ValueId>(i);
  }
  Value value;
  value.kind = Value::Kind::input;
  value.type = type;
  value.name = group == 0 ? std::move(name) : fmt::format("{}.{}", name, group);
  value.input = kind;
  value.input_group = group;
  return add_value(std::move(value));
}

ValueId Builder::tokens() { return input(InputKind::tokens, {Element::i32, {kRows, 1, 1, 1}}, "tokens"); }
ValueId Builder::hidden(int64_t n_embd) {
  return input(InputKind::hidden, {Element::f32, {n_embd, kRows, 1, 1}}, "hidden");
}
ValueId Builder::positions() { return input(InputKind::positions, {Element::i32, {kRows, 1, 1, 1}}, "positions"); }
ValueId Builder::output_rows() {
  return input(InputKind::output_rows, {Element::i32, {kOutputRows, 1, 1, 1}}, "output_rows");
}
ValueId Builder::row_cells(int group) {
  return input(InputKind::row_cells, {Element::i32, {kRows, 1, 1, 1}}, "row_cells", group);
}
ValueId Builder::context_cells(int group) {
  return input(InputKind::context_cells, {Element::i32, {kContext, 1, 1, 1}}, "context_cells", group);
}
ValueId Builder::context_mask(int group) {
  return input(InputKind::context_mask, {Element::f32, {kContext, kRows, 1, 1}}, "context_mask", group);
}
ValueId Builder::row_mask(int group) {
  return input(InputKind::row_mask, {Element::f32, {kRows, kRows, 1, 1}}, "row_mask", group);
}

ValueId Builder::weight(std::string_view name, const DimList& ne, WeightRole role) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw FormatError(fmt::format("tensor '{}' is missing; expected with shape {}", name, to_string(ne.ne)));
  if (found->second.ne != ne.ne)
    throw FormatError(
        fmt::format("tensor '{}': expected shape {}, found {}", name, to_string(ne.ne), to_string(found->second.ne)));
  if (!tensor::can_dequantize(found->second.dtype))
    throw NotSupportedError(
        fmt::format("tensor '{}' has type {}, which is not supported", name, tensor::dtype_name(found->second.dtype)));
  for (size_t i = 0; i < graph_.values.size(); ++i) {
    const Value& value = graph_.values[i];
    if (value.kind == Value::Kind::weight && value.name == name &&
        graph_.weights[static_cast<size_t>(value.index)].role == role)
      return static_cast<ValueId>(i);
  }
  Value value;
  value.kind = Value::Kind::weight;
  value.type = {Element::f32, ne.ne};
  value.name = name;
  value.index = static_cast<int32_t>(graph_.weights.size());
  graph_.weights.push_back({std::string(name), found->second.dtype, ne.ne, role});
  return add_value(std::move(value));
}

ValueId Builder::matrix(std::string_view name, const DimList& ne) { return weight(name, ne, WeightRole::matrix); }
ValueId Builder::vector(std::string_view name, const DimList& ne) { return weight(name, ne, WeightRole::vector); }
ValueId Builder::optional_vector(std::string_view name, const DimList& ne) {
  return has(name) ? vector(name, ne) : kNoValue;
}
ValueId Builder::embedding(std::string_view name, const DimList& ne) { return weight(name, ne, WeightRole::embedding); }

ValueId Builder::cache(const CacheRef& ref, int64_t row_width) {
  const Type type{Element::f32, {row_width, kCells, 1, 1}};
  for (size_t i = 0; i < graph_.values.size(); ++i)
    if (graph_.values[i].kind == Value::Kind::cache && graph_.values[i].cache == ref) {
      if (!(graph_.values[i].type == type))
        throw FormatError(fmt::format("cache '{}' has two row widths", graph_.values[i].name));
      return static_cast<ValueId>(i);
    }
  Value value;
  value.kind = Value::Kind::cache;
  value.type = type;
  value.name = fmt::format("cache.{}.{}.{}", ref.group, ref.layer, ref.part == CacheRef::Part::k ? "k" : "v");
  value.cache = ref;
  return add_value(std::move(value));
}

ValueId Builder::node(Op op, std::vector<ValueId> inputs, Params params) {
  Node node;
  node.op = op;
  node.inputs = std::move(inputs);
  node.params = std::move(params);
  Value value;
  value.type = infer_type(graph_, node);
  value.index = static_cast<int32_t>(graph_.nodes.size());
  const ValueId id = add_value(std::move(value));
  node.output = id;
  graph_.nodes.push_back(std::move(node));
  return id;
}

ValueId Builder::reshape(ValueId x, const DimList& ne) { return node(Op::reshape, {x}, ReshapeParams{ne.ne}); }
ValueId Builder::slice(ValueId x, int dim, int64_t offset, int64_t length) {
  return node(Op::slice, {x}, SliceParams{dim, offset, length});
}
ValueId Builder::permute(ValueId x, int axis0, int axis1, int axis2, int axis3) {
  return node(Op::permute, {x}, PermuteParams{{axis0, axis1, axis2, axis3}});
}
ValueId Builder::cont(ValueId x) { return node(Op::cont, {x}); }
ValueId Builder::concat(ValueId a, ValueId b, int dim) { return node(Op::concat, {a, b}, ConcatParams{dim}); }
ValueId Builder::get_rows(ValueId table, ValueId indices) { return node(Op::get_rows, {table, indices}); }
ValueId Builder::set_rows(ValueId cache, ValueId values, ValueId indices) {
  return node(Op::set_rows, {cache, values, indices});
}
ValueId Builder::add(ValueId a, ValueId b) { return node(Op::add, {a, b}); }
ValueId Builder::mul(ValueId a, ValueId b) { return node(Op::mul, {a, b}); }
ValueId Builder::div(ValueId a, ValueId b) { return node(Op::div, {a, b}); }
ValueId Builder::scale(ValueId x, float factor, float bias) { return node(Op::scale, {x}, ScaleParams{factor, bias}); }
ValueId Builder::clamp(ValueId x, float min, float max) { return node(Op::clamp, {x}, ClampParams{min, max}); }
ValueId Builder::silu(ValueId x) { return node(Op::silu, {x}); }
ValueId Builder::gelu(ValueId x) { return node(Op::gelu, {x}); }
ValueId Builder::gelu_erf(ValueId x) { return node(Op::gelu_erf, {x}); }
ValueId Builder::relu(ValueId x) { return node(Op::relu, {x}); }
ValueId Builder::tanh(ValueId x) { return node(Op::tanh, {x}); }
ValueId Builder::sigmoid(ValueId x) { return node(Op::sigmoid, {x}); }
ValueId Builder::activate(ValueId x, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_erf:
      return gelu_erf(x);
    case Activation::relu:
      return relu(x);
    case Activation::swiglu_oai:
      return mul(x, sigmoid(scale(x, kSwigluOaiAlpha)));
  }
  return kNoValue;
}
ValueId Builder::rms_norm(ValueId x, ValueId weight, float eps) {
  return node(Op::rms_norm, operands({x, weight}), NormParams{eps});
}
ValueId Builder::layer_norm(ValueId x, ValueId weight, ValueId bias, float eps) {
  return node(Op::layer_norm, operands({x, weight, bias}), NormParams{eps});
}
ValueId Builder::soft_max(ValueId x, ValueId mask, float scale, ValueId sinks) {
  return node(Op::soft_max, operands({x, mask, sinks}), SoftMaxParams{scale});
}
ValueId Builder::sum_rows(ValueId x) { return node(Op::sum_rows, {x}); }
ValueId Builder::argsort(ValueId x, SortOrder order) { return node(Op::argsort, {x}, SortParams{order}); }
ValueId Builder::top_k(ValueId x, int64_t k) { return node(Op::top_k, {x}, TopKParams{k}); }
ValueId Builder::rope(ValueId x, ValueId positions, const RopeParams& params, ValueId freq_factors) {
  return node(Op::rope, operands({x, positions, freq_factors}), params);
}
ValueId Builder::mul_mat(ValueId w, ValueId x) { return node(Op::mul_mat, {w, x}); }
ValueId Builder::mul_mat_id(ValueId w, ValueId x, ValueId experts) { return node(Op::mul_mat_id, {w, x, experts}); }
ValueId Builder::gated(ValueId gate, ValueId up, Activation activation) {
  return node(Op::gated, {gate, up}, GatedParams{activation});
}
ValueId Builder::paged_attention(ValueId q, ValueId k, ValueId v, const AttentionParams& params, ValueId sinks) {
  return node(Op::paged_attention, operands({q, k, v, sinks}), params);
}
ValueId Builder::encoder_attention(ValueId q, ValueId k, ValueId v, const AttentionParams& params) {
  return node(Op::encoder_attention, {q, k, v}, params);
}
ValueId Builder::moe(ValueId x, ValueId logits, ValueId gate, ValueId up, ValueId down, MoeParams params,
                     const MoeVectors& vectors) {
  std::vector<ValueId> inputs{x, logits, gate};
  if (up != kNoValue) inputs.push_back(up);
  inputs.push_back(down);
  params.gate_up = up == kNoValue ? GateUp::fused : GateUp::separate;
  params.vectors = 0;
  for (size_t i = 0; i < vectors.size(); ++i) {
    if (vectors[i] == kNoValue) continue;
    params.vectors |= 1U << i;
    inputs.push_back(vectors[i]);
  }
  return node(Op::moe, std::move(inputs), params);
}

ValueId Builder::name(ValueId value, std::string text) {
  graph_.values[static_cast<size_t>(value)].name = std::move(text);
  return value;
}

void Builder::output(std::string name, ValueId value) { graph_.outputs.push_back({std::move(name), value}); }

Graph Builder::finish() {
  validate(graph_);
  return std::exchange(graph_, {});
}

}  // namespace caravan::graph
