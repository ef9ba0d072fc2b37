// Builds a graph: each function appends a node, infers the result's type and checks the operands.
//
//   Builder b(tensors);                                   // name -> type and shape, from the model file
//   ValueId x = b.get_rows(b.embedding("token_embd.weight", {n_embd, n_vocab}), b.tokens());       // [n_embd, rows]
//   ValueId h = b.rms_norm(x, b.vector("blk.0.attn_norm.weight", {n_embd}), eps);
//   ValueId q = b.mul_mat(b.matrix("blk.0.attn_q.weight", {n_embd, n_head * head_dim}), h);
//   q = b.rope(b.reshape(q, {head_dim, n_head, kRows}), b.positions(), rope);
//   ...
//   b.output("logits", b.mul_mat(output_matrix, b.select_output_rows(x)));
//   Graph graph = b.finish();
//
// A tensor that is missing or has another shape than asked for throws FormatError naming it, what was expected and what
// was found. Operands that do not fit throw FormatError naming the op and the values.
#pragma once

#include <array>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>

#include "graph/graph.h"

namespace caravan::graph {

// Type and shape of a tensor in the model file.
struct TensorDesc {
  tensor::DType dtype = tensor::DType::f32;
  tensor::Shape ne{1, 1, 1, 1};
};
using TensorMap = std::map<std::string, TensorDesc, std::less<>>;

// Up to four dimensions, padded with 1: what {n_embd, kRows} converts to.
struct DimList {
  Dims ne{1, 1, 1, 1};
  DimList(std::initializer_list<int64_t> dims);
  DimList(const Dims& dims) : ne(dims) {}
};

class Builder {
 public:
  // tensors must outlive the builder.
  explicit Builder(const TensorMap& tensors) : tensors_(tensors) {}

  // --- Inputs; each exists once, however often it is asked for.
  ValueId tokens();                // i32 [rows]
  ValueId hidden(int64_t n_embd);  // f32 [n_embd, rows]
  ValueId positions();             // i32 [rows]
  ValueId output_rows();           // i32 [output_rows]
  ValueId row_cells(int group);
  ValueId context_cells(int group);
  ValueId context_mask(int group);
  ValueId row_mask(int group);

  // --- Weights; the same (name, role) is one weight, however often it is asked for.
  // Whether the model file has the tensor (optional biases, tied output).
  bool has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  // Operand of mul_mat {n_in, n_out} or mul_mat_id {n_in, n_out, n_expert}.
  ValueId matrix(std::string_view name, const DimList& ne);
  // f32 values: norms, biases, factors, small tables.
  ValueId vector(std::string_view name, const DimList& ne);
  // vector() if the file has the tensor, else kNoValue.
  ValueId optional_vector(std::string_view name, const DimList& ne);
  // Table of rows for get_rows {n_embd, n_rows}.
  ValueId embedding(std::string_view name, const DimList& ne);
  // K or V rows of a cache layer: [row_width, cells].
  ValueId cache(const CacheRef& ref, int64_t row_width);

  // --- Views: no data moves. reshape needs a contiguous operand.
  ValueId reshape(ValueId x, const DimList& ne);
  ValueId slice(ValueId x, int dim, int64_t offset, int64_t length);
  // Dimension i of x becomes dimension axis_i of the result.
  ValueId permute(ValueId x, int axis0, int axis1, int axis2, int axis3);

  // --- Data movement.
  ValueId cont(ValueId x);
  ValueId concat(ValueId a, ValueId b, int dim);
  // Rows of table by index: table [n, m], indices i32 [k] -> [n, k]. table: an embedding, a cache, or a computed value;
  // batched as in ggml: table [n, m, b], indices [k, b] -> [n, k, b].
  ValueId get_rows(ValueId table, ValueId indices);
  // get_rows(x, output_rows()): x [n, rows] -> [n, output_rows].
  ValueId select_output_rows(ValueId x) { return get_rows(x, output_rows()); }
  // Writes values [n, k] to the rows of a cache given by indices i32 [k]; the result is the cache after the write.
  ValueId set_rows(ValueId cache, ValueId values, ValueId indices);

  // --- Element-wise; b is repeated along dimensions where it is shorter (ne_a % ne_b == 0 for fixed ones).
  ValueId add(ValueId a, ValueId b);
  ValueId mul(ValueId a, ValueId b);
  ValueId div(ValueId a, ValueId b);
  // x * factor + bias.
  ValueId scale(ValueId x, float factor, float bias = 0);
  ValueId clamp(ValueId x, float min, float max);
  ValueId silu(ValueId x);      // x / (1 + exp(-x))
  ValueId gelu(ValueId x);      // tanh form
  ValueId gelu_erf(ValueId x);  // x/2 (1 + erf(x / sqrt 2))
  ValueId relu(ValueId x);
  ValueId tanh(ValueId x);
  ValueId sigmoid(ValueId x);
  ValueId activate(ValueId x, Activation activation);  // the one of silu(), gelu(), gelu_erf(), relu()

  // --- Per row, over dimension 0.
  // weight [ne0] may be kNoValue.
  ValueId rms_norm(ValueId x, ValueId weight, float eps);
  // (x - mean) / sqrt(variance + eps) * weight + bias; weight and bias [ne0] may be kNoValue (a bias needs a
  // weight).
  ValueId layer_norm(ValueId x, ValueId weight, ValueId bias, float eps);
  // soft_max(x * scale + mask); mask [ne0, ne1] or kNoValue, the same for every ne2 and ne3. A row that is masked
  // everywhere gives zeros. sinks [ne2] or kNoValue (needs a mask): a logit more per ne2 that only joins the
  // denominator.
  ValueId soft_max(ValueId x, ValueId mask = kNoValue, float scale = 1, ValueId sinks = kNoValue);
  ValueId sum_rows(ValueId x);                  // [n, ...] -> [1, ...]
  ValueId argsort(ValueId x, SortOrder order);  // i32; ties: the lower index first
  ValueId top_k(ValueId x, int64_t k);          // i32 [k, ...]: indices of the largest, descending; ties as argsort
  // x [head_dim, n_head, rows]; positions i32 [rows]; freq_factors f32 [n_rot / 2] or kNoValue.
  ValueId rope(ValueId x, ValueId positions, const RopeParams& params, ValueId freq_factors = kNoValue);

  // --- Products.
  // w [n_in, n_out] (a matrix weight) and x [n_in, rows, ...] -> [n_out, rows, ...]; or, as in ggml, w a computed value
  // [n_in, n_out, b2, b3] that is repeated along dimensions 2 and 3 of x.
  ValueId mul_mat(ValueId w, ValueId x);
  // w [n_in, n_out, n_expert], x [n_in, n_used or 1, rows], experts i32 [n_used, rows] -> [n_out, n_used, rows].
  ValueId mul_mat_id(ValueId w, ValueId x, ValueId experts);

  // --- Fused.
  // activation(gate) * up; both of one shape.
  ValueId gated(ValueId gate, ValueId up, Activation activation);
  ValueId swiglu(ValueId gate, ValueId up) { return gated(gate, up, Activation::silu); }
  ValueId geglu(ValueId gate, ValueId up) { return gated(gate, up, Activation::gelu); }
  // Writes k and v to the cache of (params.group, params.layer), then lets each row attend over its visible range of
  // its sequence, which includes the rows of this batch. K and V are read back rounded to the cache's dtype.
  // q [head_dim_k, n_head, rows], k [head_dim_k, n_head_kv, rows], v [head_dim_v, n_head_kv, rows], rotated already;
  // sinks f32 [n_head] or kNoValue: a logit per head that takes part in the softmax and has no value.
  // -> [head_dim_v * n_head, rows].
  ValueId paged_attention(ValueId q, ValueId k, ValueId v, const AttentionParams& params, ValueId sinks = kNoValue);
  // Every row attends to the rows [visible_from, visible_to) of the batch that the run gives for params.group (those of
  // its own text); nothing is cached. Shapes as paged_attention.
  ValueId encoder_attention(ValueId q, ValueId k, ValueId v, const AttentionParams& params);
  // x [n_embd, rows], logits [n_expert, rows] (mul_mat of the router matrix), gate and up [n_embd, n_ff, n_expert], or
  // gate [n_embd, 2 * n_ff, n_expert] with the rows of both and up kNoValue, down [n_ff, n_embd, n_expert] ->
  // [n_embd, rows]. The n_expert_used experts with the largest probabilities (ties: lower id) each compute
  // down(activation(gate x) * up x); results are summed in rank order, weighted by their probabilities.
  //   vectors: by MoeVector, kNoValue for those that are not there.
  // params.gate_up and params.vectors follow from the operands.
  using MoeVectors = std::array<ValueId, kMoeVectorCount>;
  ValueId moe(ValueId x, ValueId logits, ValueId gate, ValueId up, ValueId down, MoeParams params,
              const MoeVectors& vectors = no_moe_vectors());
  static constexpr MoeVectors no_moe_vectors() {
    MoeVectors vectors{};
    vectors.fill(kNoValue);
    return vectors;
  }

  // Any op by number, for lowering and adaptors.
  ValueId node(Op op, std::vector<ValueId> inputs, Params params = NoParams{});

  // Gives a value a name for messages and dumps; returns it.
  ValueId name(ValueId value, std::string text);
  const Type& type(ValueId value) const { return graph_.type(value); }

  // Declares a result; names are unique.
  void output(std::string name, ValueId value);
  // Validates and hands over the graph; the builder is empty afterwards.
  Graph finish();

 private:
  ValueId add_value(Value value);
  ValueId input(InputKind kind, Type type, std::string name, int group = 0);
  ValueId weight(std::string_view name, const DimList& ne, WeightRole role);

  const TensorMap& tensors_;
  Graph graph_;
};

}  // namespace caravan::graph
