// The graph IR: what a device computes for one batch through a slice of a model. A graph is a list of values and a list
// of nodes in the order of execution; it is built once per slice (builder.h), checked (validate), and compiled once by
// a device, which then runs it for any number of rows. Numbers of rows are symbolic dimensions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "graph/op.h"
#include "tensor/dtype.h"

namespace caravan::graph {

// Index into Graph::values.
using ValueId = int32_t;
inline constexpr ValueId kNoValue = -1;

// How a device stores a weight.
//   matrix:    operand of mul_mat / mul_mat_id; repacked into the layout the kernels stream.
//   vector:    norms, biases, sinks, frequency factors, small tables: f32 values in GGUF order.
//   embedding: table read by get_rows; raw GGUF rows, dequantised when read.
// A tensor used in two roles (a tied output matrix) is two weights with one name.
enum class WeightRole { matrix, vector, embedding };
std::string_view to_string(WeightRole role);

// A tensor of the model file as a device has to hold it.
struct WeightSpec {
  std::string name;  // GGUF tensor name
  tensor::DType dtype = tensor::DType::f32;
  tensor::Shape ne{1, 1, 1, 1};
  WeightRole role = WeightRole::matrix;
  bool operator==(const WeightSpec&) const = default;
};

// What a run gives (device::RunInput); the type each has is in its comment.
enum class InputKind {
  tokens,         // i32 [rows]
  hidden,         // f32 [n_embd, rows]: output of the previous stage, or embeddings
  positions,      // i32 [rows]
  output_rows,    // i32 [output_rows]: rows of the batch for which output is wanted, ascending
  row_cells,      // i32 [rows]: cache cell of each row in a group (lowered attention)
  context_cells,  // i32 [context]: cache cells that any row of the batch sees in a group (lowered attention)
  context_mask,   // f32 [context, rows]: 0 where the row sees the gathered cell, else -inf (lowered attention)
  row_mask,       // f32 [rows, rows]: 0 where the second row sees the first, else -inf (lowered encoder attention)
};

// K or V rows of one layer of a cache group: a value [head_dim * n_head_kv, cells], read by get_rows and written by
// set_rows only.
struct CacheRef {
  int group = 0, layer = 0;
  enum class Part { k, v } part = Part::k;
  bool operator==(const CacheRef&) const = default;
};

struct Value {
  enum class Kind { input, weight, cache, node };
  Kind kind = Kind::node;
  Type type;
  std::string name;     // for messages and dumps; a weight's is its tensor name
  int32_t index = 0;    // kind weight: index into Graph::weights; node: index into Graph::nodes
  InputKind input{};    // kind input
  int input_group = 0;  // kind input: the cache group of row_cells, context_cells and the masks
  CacheRef cache;       // kind cache
};

struct Node {
  Op op{};
  std::vector<ValueId> inputs;  // as the builder function's; optional ones may be left out from the end
  ValueId output = kNoValue;
  Params params;
};

// A result that a run can ask for.
struct Output {
  std::string name;  // "hidden", "logits", "embedding"
  ValueId value = kNoValue;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Node> nodes;  // every input of a node is defined before it, and has a lower id than its result
  std::vector<WeightSpec> weights;
  std::vector<Output> outputs;

  const Value& value(ValueId id) const { return values[static_cast<size_t>(id)]; }
  const Type& type(ValueId id) const { return value(id).type; }
  // Index into outputs, or nullopt.
  std::optional<size_t> find_output(std::string_view name) const;
};

// Checks a graph from any source: ids in range, definitions before uses, arity, parameters, types as inference gives
// them, weights in the role their uses need, caches used only by get_rows, set_rows.
// Throws FormatError naming the node and what is wrong.
void validate(const Graph& graph);

// One line per node, for debugging and golden tests: "%12 f32[64, rows] = mul_mat(blk.0.attn_q.weight, %10)".
std::string dump(const Graph& graph);

// The lengths a run gives to symbolic dimensions.
struct RowCounts {
  int64_t rows = 0, output_rows = 0, context = 0, cells = 0;
};
// Fixed dimensions for given counts.
Dims resolve(const Dims& ne, const RowCounts& counts);

// The same graph with every fused op replaced by core ops (op.h: is_fused); an optional weight of rms_norm and
// layer_norm becomes a mul. Outputs keep their names. The result is for testing and for devices without fused ops.
Graph lower(const Graph& graph);

}  // namespace caravan::graph
