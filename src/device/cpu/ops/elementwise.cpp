// Element-wise ops: unary functions, products and sums with repetition, gated activations.
#include <algorithm>

#include "base/error.h"
#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

using graph::Op;
using UnaryKernel = void (*)(const float* x, int64_t n, float* out);
using BinaryKernel = void (*)(const float* x, const float* y, int64_t n, float* out);

UnaryKernel unary_kernel(const Kernels& kernels, Op op) {
  switch (op) {
    case Op::silu:
      return kernels.silu;
    case Op::gelu:
      return kernels.gelu;
    case Op::gelu_erf:
      return kernels.gelu_erf;
    case Op::relu:
      return kernels.relu;
    case Op::tanh:
      return kernels.tanh;
    case Op::sigmoid:
      return kernels.sigmoid;
    default:
      return nullptr;
  }
}

BinaryKernel binary_kernel(const Kernels& kernels, Op op) {
  switch (op) {
    case Op::add:
      return kernels.add;
    case Op::mul:
      return kernels.mul;
    case Op::div:
      return kernels.div;
    default:
      return nullptr;
  }
}

class UnaryStep final : public Step {
 public:
  explicit UnaryStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    for_row_parts(out.n_rows(), out.ne[0], worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      apply(*context.kernels, x.row(row) + begin, end - begin, out.row(row) + begin);
    });
  }

 private:
  void apply(const Kernels& kernels, const float* x, int64_t n, float* out) const {
    if (node_.op == Op::scale) {
      const auto& p = std::get<graph::ScaleParams>(node_.params);
      kernels.scale(x, p.factor, n, out);
      if (p.bias != 0)
        for (int64_t i = 0; i < n; ++i) out[i] += p.bias;
    } else if (node_.op == Op::clamp) {
      const auto& p = std::get<graph::ClampParams>(node_.params);
      for (int64_t i = 0; i < n; ++i) out[i] = x[i] < p.min ? p.min : x[i] > p.max ? p.max : x[i];
    } else {
      unary_kernel(kernels, node_.op)(x, n, out);
    }
  }
  const Node& node_;
};

class BinaryStep final : public Step {
 public:
  explicit BinaryStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &a = context.view(node_.inputs[0]), &b = context.view(node_.inputs[1]);
    const View& out = context.view(node_.output);
    const BinaryKernel kernel = binary_kernel(*context.kernels, node_.op);
    for_row_parts(out.n_rows(), out.ne[0], worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t i1 = row % out.ne[1], i2 = row / out.ne[1] % out.ne[2], i3 = row / (out.ne[1] * out.ne[2]);
      const auto* y = reinterpret_cast<const float*>(b.at(i1 % b.ne[1], i2 % b.ne[2], i3 % b.ne[3]));
      const float* x = a.row(row);
      float* z = out.row(row);
      if (b.ne[0] == 1) {
        for (int64_t i = begin; i < end; ++i) z[i] = combine(x[i], y[0]);
        return;
      }
      // y repeats along the row: whole pieces between multiples of its length.
      for (int64_t i = begin; i < end;) {
        const int64_t offset = i % b.ne[0], n = std::min(end - i, b.ne[0] - offset);
        kernel(x + i, y + offset, n, z + i);
        i += n;
      }
    });
  }

 private:
  float combine(float x, float y) const { return node_.op == Op::add ? x + y : node_.op == Op::mul ? x * y : x / y; }
  const Node& node_;
};

class GatedStep final : public Step {
 public:
  explicit GatedStep(const Node& node)
      : node_(node), activation_(std::get<graph::GatedParams>(node.params).activation) {}

  void run(const RunContext& context, int worker) override {
    const View &gate = context.view(node_.inputs[0]), &up = context.view(node_.inputs[1]);
    const View& out = context.view(node_.output);
    for_row_parts(out.n_rows(), out.ne[0], worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      gated(*context.kernels, activation_, gate.row(row) + begin, up.row(row) + begin, end - begin,
            out.row(row) + begin);
    });
  }

 private:
  const Node& node_;
  graph::Activation activation_;
};

// In pieces whose operands are limited on the stack. gelu_quick(x) is x * sigmoid(1.702 x).
void gated_oai(const Kernels& kernels, const float* gate, const float* up, int64_t n, float* out) {
  constexpr int64_t kPiece = 256;
  constexpr float kLimit = graph::kSwigluOaiLimit;
  float g[kPiece], u[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t size = std::min(kPiece, n - begin);
    for (int64_t i = 0; i < size; ++i) g[i] = gate[begin + i] > kLimit ? kLimit : gate[begin + i];
    for (int64_t i = 0; i < size; ++i) u[i] = std::clamp(up[begin + i], -kLimit, kLimit) + 1;
    kernels.gelu_quick(g, size, g);
    kernels.mul(g, u, size, out + begin);
  }
}

}  // namespace

void gated(const Kernels& kernels, graph::Activation activation, const float* gate, const float* up, int64_t n,
           float* out) {
  switch (activation) {
    case graph::Activation::silu:
      kernels.silu_mul(gate, up, n, out);
      return;
    case graph::Activation::gelu:
      kernels.gelu_mul(gate, up, n, out);
      return;
    case graph::Activation::gelu_erf:
      kernels.gelu_erf(gate, n, out);
      break;
    case graph::Activation::relu:
      kernels.relu(gate, n, out);
      break;
    case graph::Activation::swiglu_oai:
      gated_oai(kernels, gate, up, n, out);
      return;
  }
  kernels.mul(out, up, n, out);
}

void plan_elementwise(Planner& planner, const Node& node) {
  Touches touches{node.output, node.inputs, {}, {}, false};
  for (const ValueId input : node.inputs)
    planner.require(planner.max_view(input).nb[0] == 4, "rows of an operand are not contiguous; use cont");
  std::unique_ptr<Step> step;
  if (node.op == Op::gated) {
    step = std::make_unique<GatedStep>(node);
  } else if (node.inputs.size() == 2) {
    step = std::make_unique<BinaryStep>(node);
  } else {
    step = std::make_unique<UnaryStep>(node);
  }
  planner.add_step(std::move(step), std::move(touches));
}

}  // namespace caravan::device::cpu
