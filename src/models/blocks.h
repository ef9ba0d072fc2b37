// Building blocks that architectures share: declarations of tensors and the sub-graphs that use them. A block's tensors
// are named by a prefix, "blk.3."; optional ones (biases, scales) are used when the file has them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "graph/builder.h"
#include "models/arch.h"

namespace caravan::models {

using graph::ValueId;

// "blk.3."
std::string layer_prefix(uint32_t layer);

// --- Declarations. Each appends to a list and is followed by the sub-graph below that uses it.

// Collects declarations; scope and layer are the same for a run of them.
class Declarations {
 public:
  // What follows belongs to the embedding, to the outputs, or to every slice.
  void enter(TensorDecl::Scope scope) { scope_ = scope, prefix_.clear(); }
  // What follows belongs to a layer; names get its prefix.
  void enter_layer(uint32_t layer) { scope_ = TensorDecl::Scope::layer, layer_ = layer, prefix_ = layer_prefix(layer); }

  // Norm weights, biases and tables that are used as f32 values.
  TensorDecl& vector(std::string_view name, const graph::DimList& ne,
                     TensorDecl::Presence presence = TensorDecl::Presence::required);
  // A matrix [n_in, n_out] without anything; shard_axis 1 cuts outputs, 0 inputs.
  TensorDecl& matrix(std::string_view name, const graph::DimList& ne, std::optional<int> shard_axis = std::nullopt);
  TensorDecl& embedding(std::string_view name, const graph::DimList& ne);
  // What linear() uses: <name>.weight [n_in, n_out], optional <name>.bias [n_out] and <name>.scale [1].
  void linear(std::string_view name, int64_t n_in, int64_t n_out, int shard_axis,
              TensorDecl::Presence scale = TensorDecl::Presence::optional);
  // What expert products use: <name>.weight [n_in, n_out, n_expert], optional <name>.bias [n_out, n_expert] and
  // <name>.scale [n_expert]. Returns the weight; it is valid until the next declaration.
  TensorDecl& experts(std::string_view name, int64_t n_in, int64_t n_out, int64_t n_expert, int shard_axis,
                      TensorDecl::Presence scale = TensorDecl::Presence::optional);
  // <name>.weight [n] and, of a layer norm, optional <name>.bias [n].
  void norm(std::string_view name, int64_t n, NormKind kind);
  // attn_q, attn_k, attn_v, or attn_qkv in their place, and attn_output, as linear().
  void attention(const Hyperparameters& hp);
  // ffn_gate, ffn_up, ffn_down as linear().
  void gated_ffn(const Hyperparameters& hp);
  // ffn_up with the rows of gate and up, ffn_down.
  void fused_gated_ffn(const Hyperparameters& hp);
  // ffn_up, ffn_down.
  void plain_ffn(const Hyperparameters& hp);
  // ffn_gate_inp, optional exp_probs_b, and ffn_{gate,up,down}_exps, or ffn_gate_up_exps in place of gate and up.
  void moe(const Hyperparameters& hp);
  // ffn_{gate,up,down}_shexp as linear().
  void shared_experts(const Hyperparameters& hp);

  std::vector<TensorDecl> release() { return std::move(decls_); }

 private:
  TensorDecl& add(std::string_view name, const graph::DimList& ne, graph::WeightRole role);

  std::vector<TensorDecl> decls_;
  TensorDecl::Scope scope_ = TensorDecl::Scope::every;
  uint32_t layer_ = 0;
  std::string prefix_;
};

// --- Sub-graphs.

// Whether a product is multiplied by <name>.scale before or after its bias is added, or not at all; files follow
// llama.cpp, where attention does the first and feed-forward one of the others.
enum class ScaleOrder { before_bias, after_bias, ignored };
// W x, times <name>.scale, plus <name>.bias: x [n_in, rows] -> [n_out, rows].
ValueId linear(graph::Builder& b, const std::string& name, int64_t n_in, int64_t n_out, ValueId x,
               ScaleOrder order = ScaleOrder::before_bias);

// RMS norm with weight <name>.weight.
ValueId rms_norm(graph::Builder& b, const Hyperparameters& hp, const std::string& name, ValueId x);
// Layer norm with <name>.weight and, where the file has it, <name>.bias.
ValueId layer_norm(graph::Builder& b, const Hyperparameters& hp, const std::string& name, ValueId x);
// Either of them.
inline ValueId norm(graph::Builder& b, const Hyperparameters& hp, NormKind kind, const std::string& name, ValueId x) {
  return kind == NormKind::rms ? rms_norm(b, hp, name, x) : layer_norm(b, hp, name, x);
}

// Query, key and value of a layer, split into heads: [head_dim, heads, rows].
struct Qkv {
  ValueId q, k, v;
};
// x [n_embd, rows] through attn_q, attn_k, attn_v, or through attn_qkv, which holds the rows of all three.
Qkv project_qkv(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x);

// Where a layer of a slice keeps its K and V: index into cache_groups() and position among the slice's layers of it.
struct CachePlace {
  int group = 0, layer = 0;
};
CachePlace cache_place(const std::vector<CacheGroup>& groups, const Slice& slice, uint32_t layer);

// Attention over the paged cache; what a row sees comes with the batch: -> [head_dim_v * n_head, rows].
//   sinks: f32 [n_head] or kNoValue, a logit per head that takes part in its softmax without a value
ValueId cached_attention(graph::Builder& b, const Hyperparameters& hp, const Qkv& qkv, const CachePlace& place,
                         ValueId sinks = graph::kNoValue);
// The layer's attn_output applied to attention results [head_dim_v * n_head, rows].
ValueId attention_output(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x);

// down(activation(gate x) * up x).
ValueId gated_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                  graph::Activation activation);
// The same with the rows of gate, then those of up, in ffn_up.
ValueId fused_gated_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                        graph::Activation activation);
// down(activation(up x)).
ValueId plain_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                  graph::Activation activation);
// Mixture of gated experts, chosen and weighted as hp.routing says: x [n_embd, rows] -> [n_embd, rows].
ValueId moe_ffn(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x);
// What experts that every row goes through add to it, as one gated feed-forward of width hp.n_ff_shared.
ValueId shared_experts(graph::Builder& b, const Hyperparameters& hp, uint32_t layer, ValueId x,
                       graph::Activation activation);

// The hidden rows that a slice starts from: token embeddings or the previous stage's output.
ValueId slice_input(graph::Builder& b, const Hyperparameters& hp, const Slice& slice);
// The rows of x for which output is wanted: [n, rows] -> [n, output_rows]. What has them selected already stays as it
// is.
ValueId wanted_rows(graph::Builder& b, ValueId x);
// Whether a layer may go on after its attention with the wanted rows only: the model's last layer.
inline bool selects_rows(const Slice& slice, uint32_t layer) { return slice.outputs && layer + 1 == slice.layer_end; }
// Declares the output of a slice that is not the last.
void hidden_output(graph::Builder& b, ValueId x);
// Declares "embedding" and "logits" from rows after the final norm [n_embd, output_rows]; the output matrix is
// output.weight or, where the file has none, token_embd.weight; output.bias is added where the file has it.
void final_outputs(graph::Builder& b, const Hyperparameters& hp, ValueId x);

// One cache group with all layers.
std::vector<CacheGroup> full_cache_group(const Hyperparameters& hp);

}  // namespace caravan::models
