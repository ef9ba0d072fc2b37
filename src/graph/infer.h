// Type inference of one node; shared by the builder and the validator.
#pragma once

#include "graph/graph.h"

namespace caravan::graph {

// The type of node's result. Throws FormatError naming the op and its operands when arity, parameters, types or the
// storage of weights and caches do not fit.
Type infer_type(const Graph& graph, const Node& node);

}  // namespace caravan::graph
