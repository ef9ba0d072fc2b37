// Lowering of fused ops to core ops: the definition of what each fused op computes, up to rounding.
#include <limits>

#include "graph/builder.h"
#include "graph/graph.h"

namespace caravan::graph {
namespace {

// Scores, masked softmax and the weighted sum of values.
//   q [dk, n_head, rows], k [dk, n_head_kv, n], v [dv, n_head_kv, n], mask [n, rows] -> [dv * n_head, rows]
ValueId lower_scores(Builder& b, ValueId q, ValueId k, ValueId v, ValueId mask, ValueId sinks,
                     const AttentionParams& p) {
  const int64_t n_head = b.type(q).ne[1], head_dim_v = b.type(v).ne[0];
  const ValueId keys = b.permute(k, 0, 2, 1, 3);     // [dk, n, n_head_kv]
  const ValueId queries = b.permute(q, 0, 2, 1, 3);  // [dk, rows, n_head]
  ValueId scores = b.mul_mat(keys, queries);         // [n, rows, n_head]
  if (p.softcap != 0) {
    scores = b.scale(b.tanh(b.scale(scores, p.scale / p.softcap)), p.softcap);
    scores = b.soft_max(scores, mask, 1, sinks);
  } else {
    scores = b.soft_max(scores, mask, p.scale, sinks);
  }
  const ValueId values = b.cont(b.permute(v, 1, 2, 0, 3));  // [n, dv, n_head_kv]
  const ValueId heads = b.mul_mat(values, scores);          // [dv, rows, n_head]
  return b.reshape(b.cont(b.permute(heads, 0, 2, 1, 3)), {head_dim_v * n_head, kRows});
}

// Writes x [head_dim, n_head_kv, rows] to the cache, then gathers what any row sees: [head_dim, n_head_kv, context].
ValueId lower_cached(Builder& b, ValueId x, const CacheRef& ref) {
  const int64_t head_dim = b.type(x).ne[0], n_head_kv = b.type(x).ne[1], width = head_dim * n_head_kv;
  const ValueId rows = b.reshape(b.cont(x), {width, kRows});
  const ValueId written = b.set_rows(b.cache(ref, width), rows, b.row_cells(ref.group));
  return b.reshape(b.get_rows(written, b.context_cells(ref.group)), {head_dim, n_head_kv, kContext});
}

ValueId lower_paged_attention(Builder& b, std::span<const ValueId> in, const AttentionParams& p) {
  const ValueId k = lower_cached(b, in[1], {p.group, p.layer, CacheRef::Part::k});
  const ValueId v = lower_cached(b, in[2], {p.group, p.layer, CacheRef::Part::v});
  return lower_scores(b, in[0], k, v, b.context_mask(p.group), in.size() > 3 ? in[3] : kNoValue, p);
}

// The probabilities, the choice by rank, and one product per chosen expert.
ValueId lower_moe(Builder& b, std::span<const ValueId> in, const MoeParams& p) {
  const ValueId x = in[0], logits = in[1];
  const int64_t n_embd = b.type(x).ne[0], n_expert = b.type(logits).ne[0], n_used = p.n_expert_used;
  ValueId probabilities = logits;
  if (p.gating == Gating::softmax) probabilities = b.soft_max(logits);
  if (p.gating == Gating::sigmoid) probabilities = b.sigmoid(logits);
  const ValueId ranked = in.size() > 5 ? b.add(probabilities, in[5]) : probabilities;
  const ValueId chosen = b.top_k(ranked, n_used);                                        // i32 [n_used, rows]
  ValueId weights = b.get_rows(b.reshape(probabilities, {1, n_expert, kRows}), chosen);  // [1, n_used, rows]
  weights = b.reshape(weights, {n_used, kRows});
  if (p.gating == Gating::softmax_over_selected) weights = b.soft_max(weights);
  if (p.weight_norm == WeightNorm::sum_to_one)
    weights = b.div(weights, b.clamp(b.sum_rows(weights), kMinWeightSum, std::numeric_limits<float>::max()));
  if (p.weight_scale != 1) weights = b.scale(weights, p.weight_scale);
  const ValueId rows = b.reshape(b.cont(x), {n_embd, 1, kRows});
  const ValueId gate = b.mul_mat_id(in[2], rows, chosen);  // [n_ff, n_used, rows]
  const ValueId up = b.mul_mat_id(in[3], rows, chosen);
  ValueId results = b.mul_mat_id(in[4], b.mul(b.activate(gate, p.activation), up), chosen);
  results = b.mul(results, b.reshape(weights, {1, n_used, kRows}));  // [n_embd, n_used, rows]
  ValueId sum = kNoValue;
  for (int64_t rank = 0; rank < n_used; ++rank) {
    const ValueId one = b.reshape(b.cont(b.slice(results, 1, rank, 1)), {n_embd, kRows});
    sum = rank == 0 ? one : b.add(sum, one);
  }
  return sum;
}

ValueId lower_node(Builder& b, const Node& node, const std::vector<ValueId>& in) {
  switch (node.op) {
    case Op::rms_norm:
      if (in.size() == 2) return b.mul(b.node(node.op, {in[0]}, node.params), in[1]);
      break;
    case Op::layer_norm:
      if (in.size() >= 2) {
        const ValueId scaled = b.mul(b.node(node.op, {in[0]}, node.params), in[1]);
        return in.size() == 3 ? b.add(scaled, in[2]) : scaled;
      }
      break;
    case Op::gated:
      return b.mul(b.activate(in[0], std::get<GatedParams>(node.params).activation), in[1]);
    case Op::paged_attention:
      return lower_paged_attention(b, in, std::get<AttentionParams>(node.params));
    case Op::encoder_attention: {
      const auto& p = std::get<AttentionParams>(node.params);
      return lower_scores(b, in[0], in[1], in[2], b.row_mask(p.group), kNoValue, p);
    }
    case Op::moe:
      return lower_moe(b, in, std::get<MoeParams>(node.params));
    default:
      break;
  }
  return b.node(node.op, in, node.params);
}

ValueId copy_input(Builder& b, const Value& value) {
  switch (value.input) {
    case InputKind::tokens:
      return b.tokens();
    case InputKind::hidden:
      return b.hidden(value.type.ne[0]);
    case InputKind::positions:
      return b.positions();
    case InputKind::output_rows:
      return b.output_rows();
    case InputKind::row_cells:
      return b.row_cells(value.input_group);
    case InputKind::context_cells:
      return b.context_cells(value.input_group);
    case InputKind::context_mask:
      return b.context_mask(value.input_group);
    case InputKind::row_mask:
      return b.row_mask(value.input_group);
  }
  return kNoValue;
}

ValueId copy_weight(Builder& b, const WeightSpec& spec) {
  switch (spec.role) {
    case WeightRole::matrix:
      return b.matrix(spec.name, spec.ne);
    case WeightRole::vector:
      return b.vector(spec.name, spec.ne);
    case WeightRole::embedding:
      return b.embedding(spec.name, spec.ne);
  }
  return kNoValue;
}

}  // namespace

Graph lower(const Graph& graph) {
  TensorMap tensors;
  for (const WeightSpec& spec : graph.weights) tensors[spec.name] = {spec.dtype, spec.ne};
  Builder b(tensors);
  std::vector<ValueId> map(graph.values.size(), kNoValue);
  for (size_t id = 0; id < graph.values.size(); ++id) {
    const Value& value = graph.values[id];
    if (value.kind == Value::Kind::input) map[id] = copy_input(b, value);
    if (value.kind == Value::Kind::weight) map[id] = copy_weight(b, graph.weights[static_cast<size_t>(value.index)]);
    if (value.kind == Value::Kind::cache) map[id] = b.cache(value.cache, value.type.ne[0]);
  }
  for (const Node& node : graph.nodes) {
    std::vector<ValueId> in;
    for (const ValueId input : node.inputs) in.push_back(map[static_cast<size_t>(input)]);
    const ValueId result = lower_node(b, node, in);
    if (const std::string& name = graph.value(node.output).name; !name.empty()) b.name(result, name);
    map[static_cast<size_t>(node.output)] = result;
  }
  for (const Output& output : graph.outputs) b.output(output.name, map[static_cast<size_t>(output.value)]);
  return b.finish();
}

}  // namespace caravan::graph
