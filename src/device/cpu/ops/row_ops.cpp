// Ops over whole rows: norms, softmax, sums.
#include <cstring>
#include <limits>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

using graph::Op;

class NormStep final : public Step {
 public:
  explicit NormStep(const Node& node) : node_(node), eps_(std::get<graph::NormParams>(node.params).eps) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const float* weight = node_.inputs.size() > 1 ? context.view(node_.inputs[1]).row(0) : nullptr;
    const float* bias = node_.inputs.size() > 2 ? context.view(node_.inputs[2]).row(0) : nullptr;
    const WorkRange rows = split_work(out.n_rows(), worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      if (node_.op == Op::rms_norm) {
        context.kernels->rms_norm(x.row(row), weight, x.ne[0], eps_, out.row(row));
      } else {
        context.kernels->layer_norm(x.row(row), weight, bias, x.ne[0], eps_, out.row(row));
      }
  }

 private:
  const Node& node_;
  float eps_;
};

class SoftMaxStep final : public Step {
 public:
  explicit SoftMaxStep(const Node& node) : node_(node), scale_(std::get<graph::SoftMaxParams>(node.params).scale) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const WorkRange rows = split_work(out.n_rows(), worker, context.n_workers);
    auto* work = reinterpret_cast<float*>(context.scratch(worker));
    const int64_t n = x.ne[0];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* mask = node_.inputs.size() > 1 ? context.view(node_.inputs[1]).row(row % x.ne[1]) : nullptr;
      int64_t length = n;
      scale_and_mask(*context.kernels, x.row(row), mask, n, work);
      if (node_.inputs.size() > 2) work[length++] = context.view(node_.inputs[2]).row(0)[row / x.ne[1] % x.ne[2]];
      normalize(*context.kernels, work, length);
      std::memcpy(out.row(row), work, static_cast<size_t>(n) * sizeof(float));
    }
  }

 private:
  void scale_and_mask(const Kernels& kernels, const float* x, const float* mask, int64_t n, float* out) const {
    kernels.scale(x, scale_, n, out);
    if (mask != nullptr) kernels.add(out, mask, n, out);
  }

  static void normalize(const Kernels& kernels, float* x, int64_t n) {
    bool any = false;
    for (int64_t i = 0; i < n && !any; ++i) any = x[i] != -std::numeric_limits<float>::infinity();
    if (any) {
      kernels.softmax(x, n, x);
    } else {
      std::memset(x, 0, static_cast<size_t>(n) * sizeof(float));
    }
  }

  const Node& node_;
  float scale_;
};

class SumRowsStep final : public Step {
 public:
  explicit SumRowsStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const WorkRange rows = split_work(out.n_rows(), worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) *out.row(row) = context.kernels->sum(x.row(row), x.ne[0]);
  }

 private:
  const Node& node_;
};

}  // namespace

void plan_row_op(Planner& planner, const Node& node) {
  Touches touches{node.output, node.inputs, {}, {}, false};
  for (const ValueId input : node.inputs)
    planner.require(planner.max_view(input).nb[0] == 4, "rows of an operand are not contiguous; use cont");
  std::unique_ptr<Step> step;
  if (node.op == Op::soft_max) {
    planner.need_scratch(static_cast<size_t>(planner.max_view(node.inputs[0]).ne[0] + 1) * sizeof(float));
    step = std::make_unique<SoftMaxStep>(node);
  } else if (node.op == Op::sum_rows) {
    step = std::make_unique<SumRowsStep>(node);
  } else {
    step = std::make_unique<NormStep>(node);
  }
  planner.add_step(std::move(step), std::move(touches));
}

}  // namespace caravan::device::cpu
