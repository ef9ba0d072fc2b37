// Plans the memory of a graph's results: one arena, sized for the largest run, in which results whose lifetimes do not
// overlap share bytes. Views share their operand's storage; element-wise results take over an operand that nobody reads
// later.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "graph/graph.h"

namespace caravan::graph {

// Bytes that are needed from step first to step last, both included.
struct BufferUse {
  uint64_t size_bytes = 0;
  int first = 0, last = 0;
};

struct BufferPlan {
  std::vector<uint64_t> offsets;  // per use, multiples of the alignment
  uint64_t size_bytes = 0;
};

// Offsets such that uses whose steps overlap have disjoint bytes. Greedy by size, largest first, each at the lowest
// offset that is free.
BufferPlan plan_buffers(std::span<const BufferUse> uses, uint64_t alignment = 64);

// The buffers that a graph's node results live in; steps are node indices.
struct ValueBuffers {
  std::vector<int> buffer;       // per value: index into uses, or -1 (inputs, weights, caches and views of them)
  std::vector<ValueId> storage;  // per value: the value whose storage it reads (itself unless a view)
  std::vector<BufferUse> uses;
};

// Sizes are those for max counts; outputs live until after the last node.
ValueBuffers assign_buffers(const Graph& graph, const RowCounts& max);

}  // namespace caravan::graph
