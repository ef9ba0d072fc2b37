// Matrix products: packed weights with int8 or f32 activations, experts by index, and computed operands.
#include <algorithm>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {

void multiply_panels(const RunContext& context, const PackedMatrix& w, WorkRange panels, const void* activations,
                     size_t activation_stride, int64_t n_rows, float* out, int64_t out_stride) {
  constexpr int64_t kTileBytes = 256 << 10;
  const int64_t tile = std::max<int64_t>(16, kTileBytes / static_cast<int64_t>(activation_stride) / 16 * 16);
  for (int64_t row = 0; row < n_rows; row += tile)
    context.kernels->mul_mat(w, panels.begin, panels.end,
                             static_cast<const std::byte*>(activations) + activation_stride * static_cast<size_t>(row),
                             activation_stride, std::min(tile, n_rows - row), out + row * out_stride, out_stride);
}

namespace {

class QuantizeStep final : public Step {
 public:
  QuantizeStep(ValueId x, int buffer) : x_(x), buffer_(buffer) {}

  void run(const RunContext& context, int worker) override {
    const View& x = context.view(x_);
    quantize_rows(
        context, worker, x.n_rows(), x.ne[0], [&](int64_t row) { return x.row(row); }, context.work_buffer(buffer_));
  }

 private:
  ValueId x_;
  int buffer_;
};

// A packed weight times rows; buffer < 0: f32 activations, read in place. A weight of three dimensions is a matrix for
// each index of dimension 2.
class MulMatStep final : public Step {
 public:
  MulMatStep(const Node& node, const graph::Graph& graph, int buffer, int n_workers)
      : node_(node), graph_(graph), buffer_(buffer), queue_(n_workers) {}

  void bind(const RunContext& context) override {
    for (int64_t i = 0; i < graph_.type(node_.inputs[0]).ne[2]; ++i)
      matrices_.push_back(matrix_of(context, graph_, node_.inputs[0], i));
  }

  void prepare(const RunContext&) override {
    queue_.reset(static_cast<int64_t>(matrices_.size()) * matrices_[0].n_panels());
  }

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[1]), &out = context.view(node_.output);
    const size_t stride =
        buffer_ < 0 ? static_cast<size_t>(x.nb[1]) : activation_row_bytes(ActivationKind::q8, x.ne[0]);
    const int64_t n_rows = matrices_.size() == 1 ? x.n_rows() : x.ne[1];
    share_panels(queue_, worker, matrices_[0], [&](int64_t i, WorkRange panels) {
      const std::byte* activations =
          buffer_ < 0 ? x.at(0, i, 0) : context.work_buffer(buffer_) + stride * static_cast<size_t>(i * n_rows);
      multiply_panels(context, matrices_[static_cast<size_t>(i)], panels, activations, stride, n_rows,
                      reinterpret_cast<float*>(out.at(0, i, 0)), out.ne[0]);
    });
  }

 private:
  const Node& node_;
  const graph::Graph& graph_;
  int buffer_;
  WorkQueue queue_;
  std::vector<PackedMatrix> matrices_;
};

// Both operands computed: one dot product per element, w repeated along dimensions 2 and 3.
class ComputedMulMatStep final : public Step {
 public:
  explicit ComputedMulMatStep(const Node& node) : node_(node) {}

  void run(const RunContext& context, int worker) override {
    const View &w = context.view(node_.inputs[0]), &x = context.view(node_.inputs[1]),
               &out = context.view(node_.output);
    for_row_parts(out.n_rows(), out.ne[0], worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t i2 = row / out.ne[1] % out.ne[2], i3 = row / (out.ne[1] * out.ne[2]);
      const int64_t w2 = i2 / (out.ne[2] / w.ne[2]), w3 = i3 / (out.ne[3] / w.ne[3]);
      for (int64_t i = begin; i < end; ++i)
        out.row(row)[i] = context.kernels->dot(reinterpret_cast<const float*>(w.at(i, w2, w3)), x.row(row), x.ne[0]);
    });
  }

 private:
  const Node& node_;
};

// One product per (expert rank, row); the fused moe groups rows by expert instead.
class MulMatIdStep final : public Step {
 public:
  MulMatIdStep(const Node& node, const graph::Graph& graph, int buffer) : node_(node), graph_(graph), buffer_(buffer) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[1]), &experts = context.view(node_.inputs[2]);
    const View& out = context.view(node_.output);
    for (int64_t row = 0; row < out.ne[2]; ++row)
      for (int64_t rank = 0; rank < out.ne[1]; ++rank) {
        const int64_t source = rank % x.ne[1];
        const PackedMatrix w = matrix_of(context, graph_, node_.inputs[0], experts.row_i32(row)[rank]);
        const size_t stride = activation_row_bytes(buffer_ < 0 ? ActivationKind::f32 : ActivationKind::q8, x.ne[0]);
        const std::byte* activation =
            buffer_ < 0 ? x.at(source, row, 0)
                        : context.work_buffer(buffer_) + stride * static_cast<size_t>(row * x.ne[1] + source);
        multiply_panels(context, w, split_work(w.n_panels(), worker, context.n_workers), activation, stride, 1,
                        reinterpret_cast<float*>(out.at(rank, row, 0)), out.ne[0]);
      }
  }

 private:
  const Node& node_;
  const graph::Graph& graph_;
  int buffer_;
};

}  // namespace

std::unique_ptr<Step> make_quantize_step(ValueId x, int buffer) { return std::make_unique<QuantizeStep>(x, buffer); }

void plan_mul_mat(Planner& planner, const Node& node) {
  const ValueId w = node.inputs[0], x = node.inputs[1];
  planner.require(planner.max_view(x).nb[0] == 4, "rows of the second operand are not contiguous; use cont");
  const graph::WeightSpec* weight = planner.weight_of(w);
  if (weight == nullptr || weight->role != graph::WeightRole::matrix) {
    planner.require(planner.max_view(w).nb[0] == 4, "rows of the first operand are not contiguous; use cont");
    planner.add_step(std::make_unique<ComputedMulMatStep>(node), {node.output, {w, x}, {}, {}, false});
    return;
  }
  const View& view = planner.max_view(x);
  planner.require(weight->ne[3] == 1, "weights of four dimensions");
  planner.require(weight->ne[2] == 1 || (view.ne[2] == weight->ne[2] && view.ne[3] == 1),
                  "matrices that are repeated along dimension 2");
  if (activation_kind(weight->dtype) == ActivationKind::q8) {
    const int buffer = planner.quantized(x);
    planner.add_step(std::make_unique<MulMatStep>(node, planner.graph, buffer, planner.n_workers),
                     {node.output, {}, {}, {buffer}, false});
    return;
  }
  planner.require(is_contiguous(view) || (view.ne[2] == weight->ne[2] && view.ne[3] == 1),
                  "the second operand is not contiguous; use cont");
  planner.add_step(std::make_unique<MulMatStep>(node, planner.graph, -1, planner.n_workers),
                   {node.output, {x}, {}, {}, false});
}

void plan_mul_mat_id(Planner& planner, const Node& node) {
  const ValueId x = node.inputs[1];
  planner.require(planner.max_view(x).nb[0] == 4 && planner.max_view(node.inputs[2]).nb[0] == 4,
                  "rows of an operand are not contiguous; use cont");
  const graph::WeightSpec* weight = planner.weight_of(node.inputs[0]);
  const int buffer = activation_kind(weight->dtype) == ActivationKind::q8 ? planner.quantized(x) : -1;
  Touches touches{node.output, {x, node.inputs[2]}, {}, {}, false};
  if (buffer >= 0) touches.buffers_read.push_back(buffer);
  planner.add_step(std::make_unique<MulMatIdStep>(node, planner.graph, buffer), std::move(touches));
}

}  // namespace caravan::device::cpu
