#include "graph/buffers.h"

#include <algorithm>
#include <numeric>

namespace caravan::graph {
namespace {

// Ops that read element i (or row i) of operand 0 before they write it, and nothing of it afterwards.
bool may_overwrite_operand(Op op) {
  switch (op) {
    case Op::add:
    case Op::mul:
    case Op::div:
    case Op::scale:
    case Op::clamp:
    case Op::silu:
    case Op::gelu:
    case Op::gelu_erf:
    case Op::relu:
    case Op::tanh:
    case Op::sigmoid:
    case Op::rms_norm:
    case Op::layer_norm:
    case Op::soft_max:
    case Op::rope:
    case Op::gated:
      return true;
    default:
      return false;
  }
}

uint64_t size_bytes(const Type& type, const RowCounts& max) {
  return static_cast<uint64_t>(tensor::n_elements(resolve(type.ne, max))) * 4;
}

}  // namespace

BufferPlan plan_buffers(std::span<const BufferUse> uses, uint64_t alignment) {
  std::vector<size_t> order(uses.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return uses[a].size_bytes != uses[b].size_bytes ? uses[a].size_bytes > uses[b].size_bytes : a < b;
  });
  BufferPlan plan;
  plan.offsets.resize(uses.size());
  struct Placed {
    uint64_t begin, end;
    int first, last;
  };
  std::vector<Placed> placed;  // by begin
  for (const size_t i : order) {
    const BufferUse& use = uses[i];
    uint64_t offset = 0;
    for (const Placed& other : placed) {
      if (other.last < use.first || other.first > use.last) continue;
      if (other.begin >= offset + use.size_bytes) break;
      offset = std::max(offset, (other.end + alignment - 1) / alignment * alignment);
    }
    plan.offsets[i] = offset;
    plan.size_bytes = std::max(plan.size_bytes, offset + use.size_bytes);
    const Placed entry{offset, offset + use.size_bytes, use.first, use.last};
    placed.insert(std::upper_bound(placed.begin(), placed.end(), entry,
                                   [](const Placed& a, const Placed& b) { return a.begin < b.begin; }),
                  entry);
  }
  plan.size_bytes = (plan.size_bytes + alignment - 1) / alignment * alignment;
  return plan;
}

ValueBuffers assign_buffers(const Graph& graph, const RowCounts& max) {
  const size_t n_values = graph.values.size();
  ValueBuffers result;
  result.buffer.assign(n_values, -1);
  result.storage.resize(n_values);
  std::iota(result.storage.begin(), result.storage.end(), ValueId{0});
  std::vector<bool> whole(n_values, true);  // the value is all of its storage, in order
  for (const Node& node : graph.nodes) {
    if (!op_info(node.op).is_view) continue;
    const auto out = static_cast<size_t>(node.output), operand = static_cast<size_t>(node.inputs[0]);
    result.storage[out] = result.storage[operand];
    whole[out] = whole[operand] && node.op == Op::reshape;
  }

  const int n_nodes = static_cast<int>(graph.nodes.size());
  std::vector<int> last_read(n_values, -1);  // per storage value
  const auto read = [&](ValueId id, int step) {
    int& last = last_read[static_cast<size_t>(result.storage[static_cast<size_t>(id)])];
    last = std::max(last, step);
  };
  for (int i = 0; i < n_nodes; ++i)
    for (const ValueId input : graph.nodes[static_cast<size_t>(i)].inputs) read(input, i);
  for (const Output& output : graph.outputs) read(output.value, n_nodes);

  for (int i = 0; i < n_nodes; ++i) {
    const Node& node = graph.nodes[static_cast<size_t>(i)];
    const auto out = static_cast<size_t>(node.output);
    const auto source = static_cast<size_t>(result.storage[out]);
    if (source != out) {
      result.buffer[out] = result.buffer[source];
      continue;
    }
    const int last = std::max(last_read[out], i);
    const auto operand = static_cast<size_t>(node.inputs[0]);
    const auto operand_source = static_cast<size_t>(result.storage[operand]);
    // No other operand of this node may be a view of the same storage: it would be read in another order.
    const bool read_twice = std::count_if(node.inputs.begin(), node.inputs.end(), [&](ValueId id) {
                              return static_cast<size_t>(result.storage[static_cast<size_t>(id)]) == operand_source;
                            }) > 1;
    if (may_overwrite_operand(node.op) && whole[operand] && !read_twice && result.buffer[operand] >= 0 &&
        last_read[operand_source] == i && graph.type(node.output) == graph.type(node.inputs[0])) {
      result.buffer[out] = result.buffer[operand];
      BufferUse& use = result.uses[static_cast<size_t>(result.buffer[out])];
      use.last = std::max(use.last, last);
      continue;
    }
    result.buffer[out] = static_cast<int>(result.uses.size());
    result.uses.push_back({size_bytes(graph.type(node.output), max), i, last});
  }
  return result;
}

}  // namespace caravan::graph
