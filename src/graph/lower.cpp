// Lowering of fused ops to core ops: the definition of what each fused op computes, up to rounding.
#include <limits>

#include "graph/builder.h"
#include "graph/graph.h"

namespace caravan::graph {
namespace {

// activation(gate) * up.
ValueId lower_gated(Builder& b, Activation activation, ValueId gate, ValueId up) {
  if (activation == Activation::swiglu_oai) {
    gate = b.clamp(gate, std::numeric_limits<float>::lowest(), kSwigluOaiLimit);
    up = b.scale(b.clamp(up, -kSwigluOaiLimit, kSwigluOaiLimit), 1, 1);
  }
  return b.mul(b.activate(gate, activation), up);
}

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

// Ids of the chosen experts: i32 [n_used, rows]. ranked [n_expert, rows].
ValueId lower_choice(Builder& b, ValueId ranked, const MoeParams& p) {
  if (p.n_group == 1) return b.top_k(ranked, p.n_expert_used);
  const int64_t rows = b.type(ranked).ne[1], n_expert = b.type(ranked).ne[0], size = n_expert / p.n_group;
  ValueId scores = kNoValue;  // [n_group, rows]: sums of the two best of each group
  for (int64_t group = 0; group < p.n_group; ++group) {
    const ValueId members = b.cont(b.slice(ranked, 0, group * size, size));
    const ValueId best = b.get_rows(b.reshape(members, {1, size, rows}), b.top_k(members, 2));
    const ValueId score = b.sum_rows(b.reshape(best, {2, rows}));
    scores = group == 0 ? score : b.concat(scores, score, 0);
  }
  const ValueId groups = b.top_k(scores, p.n_group_used);  // i32 [n_group_used, rows]
  // The members of these groups, and beside them their ids: the order of equal numbers.
  const ValueId ids = b.argsort(b.scale(b.clamp(ranked, -1, 1), 0), SortOrder::ascending);
  const int64_t n_eligible = size * p.n_group_used;
  const auto eligible = [&](ValueId x) {
    return b.reshape(b.get_rows(b.reshape(x, {size, p.n_group, rows}), groups), {n_eligible, rows});
  };
  const ValueId best = b.top_k(eligible(ranked), p.n_expert_used);
  return b.reshape(b.get_rows(b.reshape(eligible(ids), {1, n_eligible, rows}), best), {p.n_expert_used, rows});
}

// Weights of the chosen experts: [n_used, rows].
ValueId lower_shares(Builder& b, ValueId probabilities, ValueId chosen, const MoeParams& p) {
  const int64_t rows = b.type(chosen).ne[1], n_expert = b.type(probabilities).ne[0];
  ValueId weights = b.get_rows(b.reshape(probabilities, {1, n_expert, rows}), chosen);  // [1, n_used, rows]
  weights = b.reshape(weights, {p.n_expert_used, rows});
  if (p.gating == Gating::softmax_over_selected) weights = b.soft_max(weights);
  if (p.weight_norm == WeightNorm::sum_to_one)
    weights = b.div(weights, b.clamp(b.sum_rows(weights), kMinWeightSum, std::numeric_limits<float>::max()));
  return p.weight_scale != 1 ? b.scale(weights, p.weight_scale) : weights;
}

// The probabilities, the choice by rank, and per rank the products of the chosen expert.
ValueId lower_moe(Builder& b, std::span<const ValueId> in, const MoeParams& p) {
  const ValueId x = in[0], logits = in[1];
  const int64_t n_embd = b.type(x).ne[0], n_expert = b.type(logits).ne[0], rows = b.type(x).ne[1];
  ValueId probabilities = logits;
  if (p.gating == Gating::softmax) probabilities = b.soft_max(logits);
  if (p.gating == Gating::sigmoid) probabilities = b.sigmoid(logits);
  const size_t bias = p.index_of(MoeVector::selection_bias);
  const ValueId chosen = lower_choice(b, bias > 0 ? b.add(probabilities, in[bias]) : probabilities, p);
  const ValueId shares = lower_shares(b, probabilities, chosen, p);

  ValueId sum = kNoValue;
  for (int64_t rank = 0; rank < p.n_expert_used; ++rank) {
    const ValueId expert = b.cont(b.slice(chosen, 0, rank, 1));  // i32 [1, rows]
    const ValueId index = b.reshape(expert, {rows});
    // y [n_in, rows] through the matrix of each row's expert: [n_out, rows].
    const auto product = [&](size_t matrix, ValueId y, MoeVector scale, MoeVector add) {
      y = b.mul_mat_id(in[matrix], b.reshape(y, {b.type(y).ne[0], 1, rows}), expert);
      y = b.reshape(y, {b.type(y).ne[0], rows});
      if (p.has(scale)) y = b.mul(y, b.get_rows(b.reshape(in[p.index_of(scale)], {1, n_expert}), index));
      if (p.has(add)) y = b.add(y, b.get_rows(in[p.index_of(add)], index));
      return y;
    };
    const ValueId input = b.cont(x);
    ValueId gate = product(2, input, MoeVector::gate_scale, MoeVector::gate_bias), up = kNoValue;
    if (p.gate_up == GateUp::fused) {
      const int64_t n_ff = b.type(gate).ne[0] / 2;
      up = b.cont(b.slice(gate, 0, n_ff, n_ff));
      gate = b.cont(b.slice(gate, 0, 0, n_ff));
    } else {
      up = product(3, input, MoeVector::up_scale, MoeVector::up_bias);
    }
    ValueId y =
        product(p.down_index(), lower_gated(b, p.activation, gate, up), MoeVector::down_scale, MoeVector::down_bias);
    y = b.mul(y, b.cont(b.slice(shares, 0, rank, 1)));  // [n_embd, rows] times [1, rows]
    sum = rank == 0 ? y : b.add(sum, y);
  }
  return b.reshape(sum, {n_embd, rows});
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
      return lower_gated(b, std::get<GatedParams>(node.params).activation, in[0], in[1]);
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
