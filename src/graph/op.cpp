// Shape inference of every op, and the op table.
#include "graph/op.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "base/error.h"

namespace caravan::graph {
namespace {

using Inputs = std::span<const Type>;

[[noreturn]] void fail(const std::string& message) { throw FormatError(message); }

void require(bool condition, std::string_view message) {
  if (!condition) fail(std::string(message));
}

void require_f32(const Type& type, std::string_view what) {
  if (type.element != Element::f32) fail(fmt::format("{} must be f32, found i32", what));
}

void require_i32(const Type& type, std::string_view what) {
  if (type.element != Element::i32) fail(fmt::format("{} must be i32, found f32", what));
}

void require_ne(const Type& type, const Dims& expected, std::string_view what) {
  if (type.ne != expected)
    fail(fmt::format("{}: expected {}, found {}", what, to_string(expected), to_string(type.ne)));
}

void require_fixed(int64_t dim, std::string_view what) {
  if (is_symbolic(dim)) fail(fmt::format("{} must be a fixed length", what));
}

// The symbolic dimensions, sorted, and the product of the fixed ones.
struct ElementCount {
  std::vector<int64_t> symbols;
  int64_t fixed = 1;
  bool operator==(const ElementCount&) const = default;
};

ElementCount count_elements(const Dims& ne) {
  ElementCount count;
  for (const int64_t dim : ne)
    if (is_symbolic(dim)) {
      count.symbols.push_back(dim);
    } else {
      count.fixed *= dim;
    }
  std::sort(count.symbols.begin(), count.symbols.end());
  return count;
}

Type infer_reshape(Inputs in, const Params& params) {
  const Dims& ne = std::get<ReshapeParams>(params).ne;
  for (const int64_t dim : ne)
    if (dim == 0 || dim < kCells) fail(fmt::format("no dimension can be {}", dim));
  if (count_elements(ne) != count_elements(in[0].ne))
    fail(fmt::format("{} has not as many elements as {}", to_string(ne), to_string(in[0].ne)));
  return {in[0].element, ne};
}

Type infer_slice(Inputs in, const Params& params) {
  const auto& p = std::get<SliceParams>(params);
  require(p.dim >= 0 && p.dim < 4, "the dimension must be 0..3");
  const int64_t length = in[0].ne[static_cast<size_t>(p.dim)];
  require_fixed(length, "the sliced dimension");
  if (p.offset < 0 || p.length < 1 || p.offset > length || p.length > length - p.offset)
    fail(fmt::format("[{}, {} + {}) is not within 0..{}", p.offset, p.offset, p.length, length));
  Type type = in[0];
  type.ne[static_cast<size_t>(p.dim)] = p.length;
  return type;
}

Type infer_permute(Inputs in, const Params& params) {
  const auto& axes = std::get<PermuteParams>(params).axes;
  Type type = in[0];
  unsigned seen = 0;
  for (size_t i = 0; i < 4; ++i) {
    require(axes[i] >= 0 && axes[i] < 4, "axes must be 0..3");
    seen |= 1U << axes[i];
    type.ne[static_cast<size_t>(axes[i])] = in[0].ne[i];
  }
  require(seen == 15, "axes must name every dimension once");
  return type;
}

Type infer_same(Inputs in, const Params&) { return in[0]; }

Type infer_unary(Inputs in, const Params&) {
  require_f32(in[0], "the operand");
  return in[0];
}

Type infer_concat(Inputs in, const Params& params) {
  const int dim = std::get<ConcatParams>(params).dim;
  require(dim >= 0 && dim < 4, "the dimension must be 0..3");
  require(in[0].element == in[1].element, "operands must have one element type");
  const auto axis = static_cast<size_t>(dim);
  require_fixed(in[0].ne[axis], "the joined dimension");
  require_fixed(in[1].ne[axis], "the joined dimension");
  Type type = in[0];
  type.ne[axis] = in[1].ne[axis];
  require_ne(in[1], type.ne, "second operand");
  type.ne[axis] = in[0].ne[axis] + in[1].ne[axis];
  return type;
}

Type infer_get_rows(Inputs in, const Params&) {
  require_i32(in[1], "indices");
  require(in[0].ne[3] == 1 && in[1].ne[2] == 1 && in[1].ne[3] == 1, "at most one batch dimension");
  if (in[0].ne[2] != in[1].ne[1])
    fail(
        fmt::format("table {} and indices {} differ in the batch dimension", to_string(in[0].ne), to_string(in[1].ne)));
  return {in[0].element, {in[0].ne[0], in[1].ne[0], in[1].ne[1], 1}};
}

Type infer_set_rows(Inputs in, const Params&) {
  require_f32(in[1], "values");
  require_i32(in[2], "indices");
  require_ne(in[2], {in[1].ne[1], 1, 1, 1}, "indices");
  require_ne(in[1], {in[0].ne[0], in[1].ne[1], 1, 1}, "values");
  return in[0];
}

// b repeats along every dimension of a.
bool repeats(const Dims& a, const Dims& b) {
  for (size_t i = 0; i < 4; ++i)
    if (a[i] != b[i] && b[i] != 1 && (is_symbolic(a[i]) || is_symbolic(b[i]) || a[i] % b[i] != 0)) return false;
  return true;
}

Type infer_binary(Inputs in, const Params&) {
  require_f32(in[0], "first operand");
  require_f32(in[1], "second operand");
  if (!repeats(in[0].ne, in[1].ne))
    fail(fmt::format("{} does not repeat to {}", to_string(in[1].ne), to_string(in[0].ne)));
  return in[0];
}

Type infer_norm(Inputs in, const Params& params) {
  require_f32(in[0], "the operand");
  require(std::get<NormParams>(params).eps >= 0, "eps must not be negative");
  require_fixed(in[0].ne[0], "dimension 0");
  for (size_t i = 1; i < in.size(); ++i) {
    require_f32(in[i], i == 1 ? "weight" : "bias");
    require_ne(in[i], {in[0].ne[0], 1, 1, 1}, i == 1 ? "weight" : "bias");
  }
  return in[0];
}

Type infer_soft_max(Inputs in, const Params&) {
  require_f32(in[0], "the operand");
  if (in.size() > 1) {
    require_f32(in[1], "mask");
    require_ne(in[1], {in[0].ne[0], in[0].ne[1], 1, 1}, "mask");
  }
  if (in.size() > 2) {
    require_f32(in[2], "sinks");
    require_ne(in[2], {in[0].ne[2], 1, 1, 1}, "sinks");
  }
  return in[0];
}

Type infer_sum_rows(Inputs in, const Params&) {
  require_f32(in[0], "the operand");
  return {Element::f32, {1, in[0].ne[1], in[0].ne[2], in[0].ne[3]}};
}

Type infer_argsort(Inputs in, const Params&) {
  require_f32(in[0], "the operand");
  require_fixed(in[0].ne[0], "dimension 0");
  return {Element::i32, in[0].ne};
}

Type infer_top_k(Inputs in, const Params& params) {
  Type type = infer_argsort(in, params);
  const int64_t k = std::get<TopKParams>(params).k;
  if (k < 1 || k > type.ne[0]) fail(fmt::format("k = {} is not within 1..{}", k, type.ne[0]));
  type.ne[0] = k;
  return type;
}

Type infer_rope(Inputs in, const Params& params) {
  const auto& p = std::get<RopeParams>(params);
  require_f32(in[0], "the operand");
  require_i32(in[1], "positions");
  require_fixed(in[0].ne[0], "the head size");
  require_fixed(in[0].ne[1], "the number of heads");
  require(in[0].ne[3] == 1, "dimension 3 must be 1");
  require_ne(in[1], {in[0].ne[2], 1, 1, 1}, "positions");
  if (p.n_rot < 2 || p.n_rot % 2 != 0 || p.n_rot > in[0].ne[0])
    fail(fmt::format("n_rot must be even and within 2..{} (the head size), found {}", in[0].ne[0], p.n_rot));
  require(p.freq_base > 0 && p.freq_scale > 0, "freq_base and freq_scale must be positive");
  require(p.ext_factor == 0 || p.n_ctx_orig > 0, "YaRN needs the original context length");
  require(p.temperature_scale == 0 || (p.temperature_length > 0 && p.n_rot == in[0].ne[0]),
          "attention temperature needs a length, and heads that are rotated as a whole");
  if (in.size() > 2) {
    require_f32(in[2], "frequency factors");
    require_ne(in[2], {p.n_rot / 2, 1, 1, 1}, "frequency factors");
  }
  return in[0];
}

Type infer_mul_mat(Inputs in, const Params&) {
  const Dims &w = in[0].ne, &x = in[1].ne;
  require_f32(in[0], "first operand");
  require_f32(in[1], "second operand");
  if (w[0] != x[0]) fail(fmt::format("row lengths differ: {} and {}", to_string(w), to_string(x)));
  for (size_t i = 2; i < 4; ++i)
    if (w[i] != x[i] && w[i] != 1 && (is_symbolic(w[i]) || is_symbolic(x[i]) || x[i] % w[i] != 0))
      fail(fmt::format("{} does not repeat along dimension {} of {}", to_string(w), i, to_string(x)));
  return {Element::f32, {w[1], x[1], x[2], x[3]}};
}

Type infer_mul_mat_id(Inputs in, const Params&) {
  const Dims &w = in[0].ne, &x = in[1].ne, &experts = in[2].ne;
  require_f32(in[0], "first operand");
  require_f32(in[1], "second operand");
  require_i32(in[2], "experts");
  if (w[0] != x[0]) fail(fmt::format("row lengths differ: {} and {}", to_string(w), to_string(x)));
  require(w[3] == 1 && x[3] == 1, "dimension 3 must be 1");
  require_ne(in[2], {experts[0], x[2], 1, 1}, "experts");
  if (x[1] != 1 && x[1] != experts[0]) fail(fmt::format("dimension 1 of {} must be 1 or {}", to_string(x), experts[0]));
  return {Element::f32, {w[1], experts[0], experts[1], 1}};
}

Type infer_gated(Inputs in, const Params&) {
  require_f32(in[0], "gate");
  require_f32(in[1], "up");
  require_ne(in[1], in[0].ne, "up");
  return in[0];
}

// Shapes of q, k and v; the result is [head_dim_v * n_head, rows].
Type infer_attention(Inputs in, const Params& params) {
  const auto& p = std::get<AttentionParams>(params);
  const Dims &q = in[0].ne, &k = in[1].ne, &v = in[2].ne;
  for (size_t i = 0; i < 3; ++i) {
    constexpr std::string_view kNames[] = {"q", "k", "v"};
    require_f32(in[i], kNames[i]);
    require_fixed(in[i].ne[0], "the head size");
    require_fixed(in[i].ne[1], "the number of heads");
    if (in[i].ne[2] != kRows || in[i].ne[3] != 1)
      fail(fmt::format("{} must be [head size, heads, rows], found {}", kNames[i], to_string(in[i].ne)));
  }
  require_ne(in[1], {q[0], k[1], kRows, 1}, "k");
  require_ne(in[2], {v[0], k[1], kRows, 1}, "v");
  if (q[1] % k[1] != 0) fail(fmt::format("{} query heads are no multiple of {} key heads", q[1], k[1]));
  if (in.size() > 3) {
    require_f32(in[3], "sinks");
    require_ne(in[3], {q[1], 1, 1, 1}, "sinks");
  }
  require(p.group >= 0 && p.layer >= 0, "cache group and layer must not be negative");
  require(p.softcap >= 0, "softcap must not be negative");
  return {Element::f32, {v[0] * q[1], kRows, 1, 1}};
}

// What the optional operands of moe must be.
void check_moe_vectors(Inputs in, const MoeParams& p, int64_t n_embd, int64_t n_ff, int64_t n_expert) {
  constexpr std::string_view kNames[] = {"selection bias", "gate scale", "gate bias", "up scale",
                                         "up bias",        "down scale", "down bias"};
  const bool fused = p.gate_up == GateUp::fused;
  require(p.vectors >> kMoeVectorCount == 0, "an optional operand that does not exist");
  require(!fused || (!p.has(MoeVector::up_scale) && !p.has(MoeVector::up_bias)),
          "a matrix of gate and up has one scale and one bias");
  const int64_t gate_width = fused ? 2 * n_ff : n_ff;
  const Dims expected[] = {{n_expert, 1, 1, 1},     {n_expert, 1, 1, 1},    {gate_width, n_expert, 1, 1},
                           {n_expert, 1, 1, 1},     {n_ff, n_expert, 1, 1}, {n_expert, 1, 1, 1},
                           {n_embd, n_expert, 1, 1}};
  for (int i = 0; i < kMoeVectorCount; ++i) {
    const auto vector = static_cast<MoeVector>(i);
    if (p.has(vector)) require_ne(in[p.index_of(vector)], expected[i], kNames[i]);
  }
}

Type infer_moe(Inputs in, const Params& params) {
  const auto& p = std::get<MoeParams>(params);
  const bool fused = p.gate_up == GateUp::fused;
  if (in.size() != p.down_index() + 1 + static_cast<size_t>(std::popcount(p.vectors)))
    fail(fmt::format("the parameters do not describe {} operands", in.size()));
  const Dims &x = in[0].ne, &gate = in[2].ne, &down = in[p.down_index()].ne;
  for (const Type& type : in) require_f32(type, "operand");
  const int64_t n_expert = in[1].ne[0], n_ff = down[0];
  require_fixed(x[0], "the width");
  require_fixed(n_expert, "the number of experts");
  require_fixed(n_ff, "the inner width");
  require(is_symbolic(x[1]), "dimension 1 must be rows");
  require_ne(in[0], {x[0], x[1], 1, 1}, "x");
  require_ne(in[1], {n_expert, x[1], 1, 1}, "router logits");
  require_ne(in[2], {x[0], fused ? 2 * n_ff : n_ff, n_expert, 1}, fused ? "gate and up experts" : "gate experts");
  if (!fused) require_ne(in[3], gate, "up experts");
  require_ne(in[p.down_index()], {n_ff, x[0], n_expert, 1}, "down experts");
  check_moe_vectors(in, p, x[0], n_ff, n_expert);
  if (p.n_group < 1 || p.n_group_used < 1 || p.n_group_used > p.n_group || n_expert % p.n_group != 0 ||
      (p.n_group > 1 && n_expert / p.n_group < 2))
    fail(fmt::format("{} experts cannot be chosen from {} of {} groups", n_expert, p.n_group_used, p.n_group));
  const int64_t n_eligible = n_expert / p.n_group * p.n_group_used;
  if (p.n_expert_used < 1 || p.n_expert_used > n_eligible)
    fail(fmt::format("{} experts cannot be chosen of {}", p.n_expert_used, n_eligible));
  return in[0];
}

template <typename T, size_t I = 0>
constexpr size_t params_index() {
  if constexpr (std::is_same_v<T, std::variant_alternative_t<I, Params>>) {
    return I;
  } else {
    return params_index<T, I + 1>();
  }
}

constexpr size_t kNone = params_index<NoParams>();

constexpr OpInfo kOps[] = {
    // op, name, inputs (min, max), view, fused, parameters, shape inference
    {Op::reshape, "reshape", 1, 1, true, false, params_index<ReshapeParams>(), infer_reshape},
    {Op::slice, "slice", 1, 1, true, false, params_index<SliceParams>(), infer_slice},
    {Op::permute, "permute", 1, 1, true, false, params_index<PermuteParams>(), infer_permute},
    {Op::cont, "cont", 1, 1, false, false, kNone, infer_same},
    {Op::concat, "concat", 2, 2, false, false, params_index<ConcatParams>(), infer_concat},
    {Op::get_rows, "get_rows", 2, 2, false, false, kNone, infer_get_rows},
    {Op::set_rows, "set_rows", 3, 3, true, false, kNone, infer_set_rows},
    {Op::add, "add", 2, 2, false, false, kNone, infer_binary},
    {Op::mul, "mul", 2, 2, false, false, kNone, infer_binary},
    {Op::div, "div", 2, 2, false, false, kNone, infer_binary},
    {Op::scale, "scale", 1, 1, false, false, params_index<ScaleParams>(), infer_unary},
    {Op::clamp, "clamp", 1, 1, false, false, params_index<ClampParams>(), infer_unary},
    {Op::silu, "silu", 1, 1, false, false, kNone, infer_unary},
    {Op::gelu, "gelu", 1, 1, false, false, kNone, infer_unary},
    {Op::gelu_erf, "gelu_erf", 1, 1, false, false, kNone, infer_unary},
    {Op::relu, "relu", 1, 1, false, false, kNone, infer_unary},
    {Op::tanh, "tanh", 1, 1, false, false, kNone, infer_unary},
    {Op::sigmoid, "sigmoid", 1, 1, false, false, kNone, infer_unary},
    {Op::rms_norm, "rms_norm", 1, 2, false, false, params_index<NormParams>(), infer_norm},
    {Op::layer_norm, "layer_norm", 1, 3, false, false, params_index<NormParams>(), infer_norm},
    {Op::soft_max, "soft_max", 1, 3, false, false, params_index<SoftMaxParams>(), infer_soft_max},
    {Op::sum_rows, "sum_rows", 1, 1, false, false, kNone, infer_sum_rows},
    {Op::argsort, "argsort", 1, 1, false, false, params_index<SortParams>(), infer_argsort},
    {Op::top_k, "top_k", 1, 1, false, false, params_index<TopKParams>(), infer_top_k},
    {Op::rope, "rope", 2, 3, false, false, params_index<RopeParams>(), infer_rope},
    {Op::mul_mat, "mul_mat", 2, 2, false, false, kNone, infer_mul_mat},
    {Op::mul_mat_id, "mul_mat_id", 3, 3, false, false, kNone, infer_mul_mat_id},
    {Op::gated, "gated", 2, 2, false, true, params_index<GatedParams>(), infer_gated},
    {Op::paged_attention, "paged_attention", 3, 4, false, true, params_index<AttentionParams>(), infer_attention},
    {Op::encoder_attention, "encoder_attention", 3, 3, false, true, params_index<AttentionParams>(), infer_attention},
    {Op::moe, "moe", 4, 5 + kMoeVectorCount, false, true, params_index<MoeParams>(), infer_moe},
};
static_assert(std::size(kOps) == kOpCount);
constexpr bool rows_are_in_order() {
  for (int i = 0; i < kOpCount; ++i)
    if (static_cast<int>(kOps[i].op) != i) return false;
  return true;
}
static_assert(rows_are_in_order());

}  // namespace

std::string to_string(const Dims& ne) {
  size_t n = 4;
  while (n > 1 && ne[n - 1] == 1) --n;
  std::string text = "[";
  for (size_t i = 0; i < n; ++i) {
    if (i != 0) text += ", ";
    switch (ne[i]) {
      case kRows:
        text += "rows";
        break;
      case kOutputRows:
        text += "output_rows";
        break;
      case kContext:
        text += "context";
        break;
      case kCells:
        text += "cells";
        break;
      default:
        text += std::to_string(ne[i]);
    }
  }
  return text + "]";
}

const OpInfo& op_info(Op op) { return kOps[static_cast<size_t>(op)]; }
std::span<const OpInfo> all_ops() { return kOps; }

}  // namespace caravan::graph
