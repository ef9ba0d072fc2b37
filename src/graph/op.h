// The operations of the graph IR: their numbers, parameters, and one table row each (name, arity, shape inference).
// Core ops follow ggml's semantics (ne[0] is the contiguous dimension, mul_mat is W x per row, broadcasting repeats the
// second operand); fused ops have a lowering to core ops in lower.cpp. Adding an op: a value of Op, a row in op.cpp,
// a builder function, an implementation per device, a case in the op tests.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "tensor/dtype.h"

namespace caravan::graph {

enum class Op {
  // Views: they share the storage of their first input.
  reshape,
  slice,
  permute,
  // Data movement.
  cont,
  concat,
  get_rows,
  set_rows,
  // Element-wise.
  add,
  mul,
  div,
  scale,
  clamp,
  silu,
  gelu,
  gelu_erf,
  relu,
  tanh,
  sigmoid,
  // Per row.
  rms_norm,
  layer_norm,
  soft_max,
  sum_rows,
  argsort,
  top_k,
  rope,
  // Products.
  mul_mat,
  mul_mat_id,
  // Fused.
  gated,
  paged_attention,
  encoder_attention,
  moe,
};
inline constexpr int kOpCount = static_cast<int>(Op::moe) + 1;

// A dimension is a fixed length (>= 1) or one of these, whose length each run gives.
inline constexpr int64_t kRows = -1;        // rows of the batch
inline constexpr int64_t kOutputRows = -2;  // rows for which output is wanted
inline constexpr int64_t kContext = -3;     // cached tokens that a lowered attention gathers
inline constexpr int64_t kCells = -4;       // token cells of a KV cache: n_blocks x block_tokens of its group
// Dimensions in GGUF order; unused ones are 1.
using Dims = tensor::Shape;

inline bool is_symbolic(int64_t dim) { return dim < 0; }
// "[64, 8, rows]"; trailing ones are left out.
std::string to_string(const Dims& ne);

enum class Element { f32, i32 };

// Element type and dimensions of a value.
struct Type {
  Element element = Element::f32;
  Dims ne{1, 1, 1, 1};
  bool operator==(const Type&) const = default;
};

// What a gate goes through before it multiplies `up`. swiglu_oai (gpt-oss): with g = min(gate, 7) and u = up held
// within -7 and 7, the result is g * sigmoid(1.702 g) * (u + 1).
enum class Activation { silu, gelu, gelu_erf, relu, swiglu_oai };
inline constexpr float kSwigluOaiLimit = 7, kSwigluOaiAlpha = 1.702F;

struct NoParams {
  bool operator==(const NoParams&) const = default;
};
// New dimensions of a reshape, with as many elements as before.
struct ReshapeParams {
  Dims ne;
  bool operator==(const ReshapeParams&) const = default;
};
// Elements [offset, offset + length) along one dimension.
struct SliceParams {
  int dim;
  int64_t offset, length;
  bool operator==(const SliceParams&) const = default;
};
// Dimension i of the input becomes dimension axes[i] of the result (ggml_permute).
struct PermuteParams {
  std::array<int, 4> axes;
  bool operator==(const PermuteParams&) const = default;
};
struct ConcatParams {
  int dim;
  bool operator==(const ConcatParams&) const = default;
};
// x * factor + bias.
struct ScaleParams {
  float factor, bias;
  bool operator==(const ScaleParams&) const = default;
};
struct ClampParams {
  float min, max;
  bool operator==(const ClampParams&) const = default;
};
struct NormParams {
  float eps;
  bool operator==(const NormParams&) const = default;
};
// soft_max(x * scale + mask).
struct SoftMaxParams {
  float scale = 1;
  bool operator==(const SoftMaxParams&) const = default;
};
enum class SortOrder { ascending, descending };
struct SortParams {
  SortOrder order;
  bool operator==(const SortParams&) const = default;
};
struct TopKParams {
  int64_t k;
  bool operator==(const TopKParams&) const = default;
};

// Which elements of a head are rotated together: (2i, 2i+1), ggml's NORMAL; or (i, i + n_rot/2), ggml's NEOX.
enum class RopePairing { adjacent, halves };

// Rotary position embedding with ggml's conventions: theta_i = position * freq_base^(-2i/n_rot) / freq_factor_i,
// multiplied by freq_scale; with ext_factor != 0 interpolated per YaRN (arXiv:2309.00071), and cos/sin multiplied by
// attn_factor (YaRN: times 1 + 0.1 ln(1 / freq_scale)). With temperature_scale != 0 the result is also multiplied by
// 1 + temperature_scale * ln(1 + floor(position / temperature_length)): what Llama 4 does to queries. Elements past
// n_rot stay as they are.
struct RopeParams {
  int n_rot = 0;  // even, at most the head size
  RopePairing pairing = RopePairing::adjacent;
  float freq_base = 10000;
  float freq_scale = 1;
  float ext_factor = 0;
  float attn_factor = 1;
  float beta_fast = 32;
  float beta_slow = 1;
  int n_ctx_orig = 0;  // context length of the original training; only read when ext_factor != 0
  float temperature_scale = 0;
  int temperature_length = 0;  // positive when temperature_scale != 0, and n_rot is the head size then
  bool operator==(const RopeParams&) const = default;
};

// Attention of query head h reads key/value head h / (n_head / n_head_kv).
// score = q.k * scale; with softcap != 0: softcap * tanh(score / softcap).
struct AttentionParams {
  float scale = 1;
  float softcap = 0;
  int group = 0;  // cache group: its visible ranges, and for paged attention its cache
  int layer = 0;  // layer within the group (paged attention only)
  bool operator==(const AttentionParams&) const = default;
};

// How expert probabilities come from the router's logits (GGUF <arch>.expert_gating_func).
enum class Gating { softmax, sigmoid, softmax_over_selected };
enum class WeightNorm { none, sum_to_one };
// Sums of selected weights below this are taken as this (the smallest normal f16, as in llama.cpp).
inline constexpr float kMinWeightSum = 0x1p-14F;
// Whether the rows of gate and up are two matrices or one, gate first (GGUF ffn_gate_up_exps).
enum class GateUp { separate, fused };
// The operands of moe that a file may lack, in the order in which they follow the matrices; bits of MoeParams::vectors.
// Expert e multiplies a product by scale[e], then adds bias[e].
enum class MoeVector {
  selection_bias,  // [n_expert], added to the probabilities for the choice only
  gate_scale,      // [n_expert]; with a fused matrix for both of its halves
  gate_bias,       // [n_ff, n_expert]; with a fused matrix [2 * n_ff, n_expert]
  up_scale,        // not with a fused matrix
  up_bias,
  down_scale,
  down_bias,  // [n_embd, n_expert]
};
inline constexpr int kMoeVectorCount = static_cast<int>(MoeVector::down_bias) + 1;
struct MoeParams {
  int64_t n_expert_used = 1;
  Gating gating = Gating::softmax;
  WeightNorm weight_norm = WeightNorm::sum_to_one;  // whether the selected weights are divided by their sum
  float weight_scale = 1;                           // then multiplied by this
  Activation activation = Activation::silu;
  // With more than one group of neighbouring experts, only those of the n_group_used groups with the largest sums of
  // their two best (biased) probabilities are chosen from (DeepSeek-V3, arXiv:2412.19437).
  int64_t n_group = 1, n_group_used = 1;
  GateUp gate_up = GateUp::separate;
  uint32_t vectors = 0;  // bit per MoeVector that is among the operands
  bool operator==(const MoeParams&) const = default;

  // Operands: x, logits, gate, (up,) down, then the vectors.
  size_t down_index() const { return gate_up == GateUp::fused ? 3 : 4; }
  bool has(MoeVector vector) const { return (vectors >> static_cast<int>(vector) & 1U) != 0; }
  // Index of a vector among the operands, or 0 when it is not there.
  size_t index_of(MoeVector vector) const {
    if (!has(vector)) return 0;
    size_t index = down_index() + 1;
    for (int i = 0; i < static_cast<int>(vector); ++i) index += vectors >> i & 1U;
    return index;
  }
};

struct GatedParams {
  Activation activation;
  bool operator==(const GatedParams&) const = default;
};

using Params = std::variant<NoParams, ReshapeParams, SliceParams, PermuteParams, ConcatParams, ScaleParams, ClampParams,
                            NormParams, SoftMaxParams, SortParams, TopKParams, RopeParams, AttentionParams, MoeParams,
                            GatedParams>;

// One row of the op table.
struct OpInfo {
  Op op;
  std::string_view name;
  int min_inputs, max_inputs;
  bool is_view;   // the result shares the first input's storage
  bool is_fused;  // lower() replaces it by core ops
  // Index of the alternative of Params that the op takes.
  size_t params_index;
  // The result's type. Throws FormatError saying which operand does not fit and what was expected.
  // The operands are those of the builder function of the same name, optional ones left out at the end.
  Type (*infer)(std::span<const Type> inputs, const Params& params);
};

const OpInfo& op_info(Op op);
inline std::string_view op_name(Op op) { return op_info(op).name; }
std::span<const OpInfo> all_ops();

}  // namespace caravan::graph
