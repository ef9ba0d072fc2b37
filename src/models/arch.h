// What an architecture is to the rest of the program: a name, how its hyperparameters are read, which tensors and cache
// groups it has, and how the graph of some of its layers is built. Placement and loading work on these declarations
// alone and know no architecture. Adding one: a file that defines a const Arch, and a row in registry.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/reader.h"
#include "graph/builder.h"
#include "graph/graph.h"
#include "models/hyperparameters.h"
#include "weights/manifest.h"

namespace caravan::models {

// Layers [layer_begin, layer_end); the first stage also embeds tokens, the last also norms and projects.
struct Slice {
  uint32_t layer_begin = 0, layer_end = 0;
  bool embeds = false;   // takes token ids instead of hidden rows
  bool outputs = false;  // gives what OutputRequests ask for instead of hidden rows
  bool operator==(const Slice&) const = default;
};

// The whole model as one slice.
inline Slice whole_model(const Hyperparameters& hp) { return {0, hp.n_layer, true, true}; }

// One tensor that a model has or may have.
struct TensorDecl {
  // Which slices hold it: those that embed, that give outputs, that contain its layer, or every one.
  enum class Scope { embedding, output, layer, every };
  // Tensors that are unused may be in a file, and no slice holds them.
  enum class Presence { required, optional, unused };

  std::string name;
  tensor::Shape ne{1, 1, 1, 1};
  graph::WeightRole role = graph::WeightRole::matrix;
  Scope scope = Scope::layer;
  uint32_t layer = 0;  // Scope::layer only
  Presence presence = Presence::required;
  // Read in place of this tensor when the file lacks it (tied output matrix, fused attn_qkv); empty: none.
  std::string fallback;
  std::optional<int> expert_axis;  // dimension that counts experts
  std::optional<int> shard_axis;   // dimension along which tensor parallelism cuts
};

// K and V of one layer, per token.
struct CacheLayer {
  uint32_t layer = 0;
  uint32_t n_head_kv = 0, head_dim_k = 0, head_dim_v = 0;
};

// Layers whose caches keep the same tokens, and therefore share block tables.
struct CacheGroup {
  enum class Kind : uint8_t { full, window, none };  // none: an encoder, attends within the batch
  Kind kind = Kind::full;
  uint32_t window = 0;  // tokens, for Kind::window: a row at position p sees [p - window + 1, p]
  std::vector<CacheLayer> layers;
};

struct Arch {
  std::string_view name;
  // Throws FormatError naming the key, NotSupportedError for a variant that is not implemented.
  Hyperparameters (*read)(const gguf::Metadata&);
  // All tensors of the model, optional ones included, in the order in which they are used.
  std::vector<TensorDecl> (*tensors)(const Hyperparameters&);
  // In the order of CacheConfig::n_blocks and of Batch::visible; the same for every slice.
  std::vector<CacheGroup> (*cache_groups)(const Hyperparameters&);
  // Adds the nodes and outputs of a slice: "hidden" [n_embd, rows], or "embedding" [n_embd, output_rows] (after the
  // final norm) and, where the model has an output matrix, "logits" [n_vocab, output_rows].
  void (*build)(graph::Builder&, const Hyperparameters&, const Slice&);
};

// Types and shapes of all tensors of a model file, or of a manifest.
graph::TensorMap tensor_map(const gguf::Model& model);
graph::TensorMap tensor_map(const weights::Manifest& manifest);

// The declarations of the tensors that a slice holds. Throws FormatError for a slice that the model cannot have.
std::vector<TensorDecl> slice_tensors(const Arch& arch, const Hyperparameters& hp, const Slice& slice);

// The names of the tensors that a slice of this file holds, each once, in the order of use: what a manifest lists.
// Checks shapes; throws FormatError naming a required tensor that is missing, or expected and found shape.
std::vector<std::string> slice_tensor_names(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                                            const graph::TensorMap& file);

// Checks that a manifest lists exactly the tensors of the slice, in the shapes the architecture declares.
// Throws FormatError naming the tensor, what was expected and what was found.
void check_manifest(const Arch& arch, const Hyperparameters& hp, const Slice& slice, const weights::Manifest& manifest);

// Checks that a whole file holds nothing that the architecture does not know: such a model would be computed wrongly.
// Throws NotSupportedError naming the tensor.
void check_model(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& file);

// The graph of a slice; tensors holds at least those of the slice.
graph::Graph build_graph(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                         const graph::TensorMap& tensors);

// The layers of group that lie in the slice, in order: what the slice's cache holds for it.
std::vector<CacheLayer> slice_cache_layers(const CacheGroup& group, const Slice& slice);

}  // namespace caravan::models
