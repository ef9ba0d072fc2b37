// Data movement: cont, concat, get_rows and set_rows.
#include <cstring>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

using graph::Op;

// Copies x into the elements of out that begin at offset along dim; both may be strided.
void copy_into(const View& x, const View& out, int dim, int64_t offset, int worker, int n_workers) {
  const WorkRange rows = split_work(x.n_rows(), worker, n_workers);
  std::array<int64_t, 4> shift{0, 0, 0, 0};
  shift[static_cast<size_t>(dim)] = offset;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t i1 = row % x.ne[1], i2 = row / x.ne[1] % x.ne[2], i3 = row / (x.ne[1] * x.ne[2]);
    const std::byte* from = x.at(i1, i2, i3);
    std::byte* to = out.at(i1 + shift[1], i2 + shift[2], i3 + shift[3]) + shift[0] * 4;
    if (x.nb[0] == 4) {
      std::memcpy(to, from, static_cast<size_t>(x.ne[0]) * 4);
    } else {
      for (int64_t i = 0; i < x.ne[0]; ++i) std::memcpy(to + i * 4, from + i * x.nb[0], 4);
    }
  }
}

class CopyStep final : public Step {
 public:
  explicit CopyStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const int dim = node_.op == Op::concat ? std::get<graph::ConcatParams>(node_.params).dim : 0;
    int64_t offset = 0;
    for (const ValueId input : node_.inputs) {
      const View& x = context.view(input);
      copy_into(x, context.view(node_.output), dim, offset, worker, context.n_workers);
      offset += x.ne[static_cast<size_t>(dim)];
    }
  }

 private:
  const Node& node_;
};

// Rows of an embedding weight, dequantised.
class EmbeddingRowsStep final : public Step {
 public:
  EmbeddingRowsStep(const Node& node, tensor::DType dtype) : node_(node), info_(tensor::dtype_info(dtype)) {}

  void run(const RunContext& context, int worker) override {
    const View &table = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const int32_t* indices = context.view(node_.inputs[1]).row_i32(0);
    const auto row_bytes = static_cast<int64_t>(tensor::row_bytes(info_.type, static_cast<uint64_t>(table.ne[0])));
    const WorkRange rows = split_work(out.ne[1], worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      info_.dequantize(table.data + indices[row] * row_bytes, out.row(row), table.ne[0]);
  }

 private:
  const Node& node_;
  const tensor::DTypeInfo& info_;
};

class GetRowsStep final : public Step {
 public:
  explicit GetRowsStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &table = context.view(node_.inputs[0]), &indices = context.view(node_.inputs[1]);
    const View& out = context.view(node_.output);
    const WorkRange rows = split_work(out.n_rows(), worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t i1 = row % out.ne[1], i2 = row / out.ne[1];
      const int32_t index = indices.row_i32(i2)[i1];
      std::memcpy(out.at(i1, i2, 0), table.at(index, i2, 0), static_cast<size_t>(out.ne[0]) * 4);
    }
  }

 private:
  const Node& node_;
};

// Rows of a cache by cell (block x block_tokens + token), as attention reads them.
class CacheRowsStep final : public Step {
 public:
  CacheRowsStep(const Node& node, const graph::CacheRef& ref) : node_(node), ref_(ref) {}

  void run(const RunContext& context, int worker) override {
    const bool writes = node_.op == Op::set_rows;
    const CpuCache::Part& part = context.cache->part(ref_);
    const int32_t* cells = context.view(node_.inputs[writes ? 2 : 1]).row_i32(0);
    const View& values = context.view(writes ? node_.inputs[1] : node_.output);
    const auto tokens = static_cast<int32_t>(part.layout.block_tokens);
    const WorkRange rows = split_work(values.ne[1], worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int32_t block = cells[row] / tokens, position = cells[row] % tokens;
      if (writes) {
        context.kernels->kv_store(part.layout, part.data, &block, position, values.row(row));
      } else {
        context.kernels->kv_load(part.layout, part.data, &block, position, values.row(row));
      }
    }
  }

 private:
  const Node& node_;
  graph::CacheRef ref_;
};

// The cache behind a cache value or the result of set_rows.
const graph::CacheRef* cache_of(const graph::Graph& graph, ValueId id) {
  for (;;) {
    const graph::Value& value = graph.value(id);
    if (value.kind == graph::Value::Kind::cache) return &value.cache;
    if (value.kind != graph::Value::Kind::node) return nullptr;
    const Node& node = graph.nodes[static_cast<size_t>(value.index)];
    if (node.op != Op::set_rows) return nullptr;
    id = node.inputs[0];
  }
}

}  // namespace

void plan_copy(Planner& planner, const Node& node) {
  planner.add_step(std::make_unique<CopyStep>(node), {node.output, node.inputs, {}, {}, false});
}

void plan_get_rows(Planner& planner, const Node& node) {
  const ValueId table = node.inputs[0];
  if (const graph::CacheRef* ref = cache_of(planner.graph, table)) {
    planner.add_step(std::make_unique<CacheRowsStep>(node, *ref), {node.output, {node.inputs[1]}, {}, {}, true});
    return;
  }
  const graph::WeightSpec* weight = planner.weight_of(table);
  if (weight != nullptr && weight->role == graph::WeightRole::embedding) {
    planner.require(weight->ne[2] == 1, "tables with a batch dimension");
    planner.add_step(std::make_unique<EmbeddingRowsStep>(node, weight->dtype),
                     {node.output, {node.inputs[1]}, {}, {}, false});
    return;
  }
  planner.require(planner.max_view(table).nb[0] == 4, "rows of the table are not contiguous; use cont");
  planner.require(planner.max_view(node.inputs[1]).nb[0] == 4, "indices are not contiguous; use cont");
  planner.add_step(std::make_unique<GetRowsStep>(node), {node.output, node.inputs, {}, {}, false});
}

void plan_set_rows(Planner& planner, const Node& node) {
  planner.require(is_contiguous(planner.max_view(node.inputs[1])), "values are not contiguous; use cont");
  planner.add_step(std::make_unique<CacheRowsStep>(node, *cache_of(planner.graph, node.inputs[0])),
                   {graph::kNoValue, {node.inputs[1], node.inputs[2]}, {}, {}, true});
}

}  // namespace caravan::device::cpu
