// argsort and top_k.
#include <algorithm>
#include <numeric>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {

void rank_indices(const float* x, int64_t n, graph::SortOrder order, int64_t k, int32_t* indices) {
  std::iota(indices, indices + n, 0);
  const auto before = [&](int32_t a, int32_t b) {
    if (x[a] != x[b]) return order == graph::SortOrder::descending ? x[a] > x[b] : x[a] < x[b];
    return a < b;
  };
  std::partial_sort(indices, indices + k, indices + n, before);
}

namespace {

class SortStep final : public Step {
 public:
  explicit SortStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const auto order =
        node_.op == graph::Op::top_k ? graph::SortOrder::descending : std::get<graph::SortParams>(node_.params).order;
    auto* indices = reinterpret_cast<int32_t*>(context.scratch(worker));
    const WorkRange rows = split_work(out.n_rows(), worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      rank_indices(x.row(row), x.ne[0], order, out.ne[0], indices);
      std::copy_n(indices, out.ne[0], reinterpret_cast<int32_t*>(out.row_bytes(row)));
    }
  }

 private:
  const Node& node_;
};

}  // namespace

void plan_sort(Planner& planner, const Node& node) {
  planner.require(planner.max_view(node.inputs[0]).nb[0] == 4, "rows of the operand are not contiguous; use cont");
  planner.need_scratch(static_cast<size_t>(planner.max_view(node.inputs[0]).ne[0]) * sizeof(int32_t));
  planner.add_step(std::make_unique<SortStep>(node), {node.output, node.inputs, {}, {}, false});
}

}  // namespace caravan::device::cpu
