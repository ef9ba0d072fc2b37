// Mixture of experts: rows are grouped by expert, so that each expert's weights are read once per batch, and each row's
// results are summed in rank order.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

using graph::GateUp;
using graph::Gating;
using graph::MoeParams;
using graph::MoeVector;

// A row's choice: entries are sorted by expert, then row.
struct MoeBuffers {
  int probabilities;  // f32 [max_rows][n_expert]
  int experts;        // i32 [max_rows][n_used]
  int shares;         // f32 [max_rows][n_used]
  int entries;        // i32 [max_rows][n_used]: where row's rank went in the sorted order
  int expert_begin;   // i32 [n_expert + 1]: first entry of each expert
  int entry_expert;   // i32 [max_rows * n_used]: expert of each entry
  int inputs;         // activations of the sorted entries, for gate and up
  int gate, up;       // f32 [max_rows * n_used][n_ff]; up -1: gate has rows of 2 * n_ff
  int hidden;         // activations of the sorted entries, for down; -1: f32, in gate
  int results;        // f32 [max_rows * n_used][n_embd]
};

class MoeStep final : public Step {
 public:
  MoeStep(const Node& node, const graph::Graph& graph, const MoeBuffers& buffers, ActivationKind input_kind,
          ActivationKind hidden_kind, int n_workers)
      : node_(node),
        graph_(graph),
        params_(std::get<MoeParams>(node.params)),
        buffers_(buffers),
        input_kind_(input_kind),
        hidden_kind_(hidden_kind),
        n_embd_(graph.type(node.inputs[0]).ne[0]),
        n_expert_(graph.type(node.inputs[1]).ne[0]),
        n_ff_(graph.type(node.inputs[params_.down_index()]).ne[0]),
        gate_width_(graph.type(node.inputs[2]).ne[1]),
        gate_queue_(n_workers),
        up_queue_(n_workers),
        down_queue_(n_workers) {
    chosen_.reserve(static_cast<size_t>(n_expert_));
  }

  void run(const RunContext& context, int worker) override {
    route(context, worker);
    context.pool->barrier();
    if (worker == 0) group(context);
    context.pool->barrier();
    gather(context, worker);
    context.pool->barrier();
    const size_t input_stride = activation_row_bytes(input_kind_, n_embd_);
    products(context, worker, gate_queue_, node_.inputs[2], buffers_.inputs, input_stride, buffers_.gate, gate_width_);
    if (buffers_.up >= 0)
      products(context, worker, up_queue_, node_.inputs[3], buffers_.inputs, input_stride, buffers_.up, n_ff_);
    context.pool->barrier();
    activate(context, worker);
    context.pool->barrier();
    const bool quantized = hidden_kind_ == ActivationKind::q8;
    if (quantized) {
      quantize_rows(
          context, worker, n_entries(context), n_ff_,
          [&](int64_t entry) { return floats(context, buffers_.gate) + entry * gate_width_; },
          context.work_buffer(buffers_.hidden));
      context.pool->barrier();
    }
    products(context, worker, down_queue_, node_.inputs[params_.down_index()],
             quantized ? buffers_.hidden : buffers_.gate,
             quantized ? activation_row_bytes(hidden_kind_, n_ff_) : static_cast<size_t>(gate_width_) * sizeof(float),
             buffers_.results, n_embd_);
    context.pool->barrier();
    combine(context, worker);
  }

 private:
  int64_t n_rows(const RunContext& context) const { return context.view(node_.inputs[0]).ne[1]; }
  int64_t n_entries(const RunContext& context) const { return n_rows(context) * params_.n_expert_used; }
  // Values of a vector operand for an expert, or null when it is not there.
  const float* vector_of(const RunContext& context, MoeVector vector, int64_t expert = 0) const {
    if (!params_.has(vector)) return nullptr;
    return context.view(node_.inputs[params_.index_of(vector)]).row(expert);
  }
  static float* floats(const RunContext& context, int buffer) {
    return reinterpret_cast<float*>(context.work_buffer(buffer));
  }
  static int32_t* ints(const RunContext& context, int buffer) {
    return reinterpret_cast<int32_t*>(context.work_buffer(buffer));
  }

  // Probabilities, choice and shares of each row.
  void route(const RunContext& context, int worker) const {
    const Kernels& kernels = *context.kernels;
    const View& logits = context.view(node_.inputs[1]);
    const int64_t n_used = params_.n_expert_used;
    auto* ranked = reinterpret_cast<float*>(context.scratch(worker));
    auto* order = reinterpret_cast<int32_t*>(ranked + n_expert_);
    const WorkRange rows = split_work(n_rows(context), worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* probabilities = floats(context, buffers_.probabilities) + row * n_expert_;
      std::memcpy(probabilities, logits.row(row), static_cast<size_t>(n_expert_) * sizeof(float));
      if (params_.gating == Gating::softmax) kernels.softmax(probabilities, n_expert_, probabilities);
      if (params_.gating == Gating::sigmoid) kernels.sigmoid(probabilities, n_expert_, probabilities);
      std::memcpy(ranked, probabilities, static_cast<size_t>(n_expert_) * sizeof(float));
      if (const float* bias = vector_of(context, MoeVector::selection_bias))
        kernels.add(ranked, bias, n_expert_, ranked);
      if (params_.n_group > 1) exclude_groups(ranked, order);
      rank_indices(ranked, n_expert_, graph::SortOrder::descending, n_used, order);
      float* shares = floats(context, buffers_.shares) + row * n_used;
      for (int64_t rank = 0; rank < n_used; ++rank) {
        ints(context, buffers_.experts)[row * n_used + rank] = order[rank];
        shares[rank] = probabilities[order[rank]];
      }
      if (params_.gating == Gating::softmax_over_selected) kernels.softmax(shares, n_used, shares);
      if (params_.weight_norm == graph::WeightNorm::sum_to_one) {
        const float sum = std::max(kernels.sum(shares, n_used), graph::kMinWeightSum);
        for (int64_t rank = 0; rank < n_used; ++rank) shares[rank] /= sum;
      }
      if (params_.weight_scale != 1) kernels.scale(shares, params_.weight_scale, n_used, shares);
    }
  }

  // Gives the experts of all but the best groups no chance. order: room for n_expert ids and after them as many scores.
  void exclude_groups(float* ranked, int32_t* order) const {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    const int64_t size = n_expert_ / params_.n_group;
    auto* scores = reinterpret_cast<float*>(order + n_expert_);
    for (int64_t group = 0; group < params_.n_group; ++group) {
      float best = kNever, second = kNever;
      for (int64_t i = group * size; i < (group + 1) * size; ++i) {
        second = std::max(second, std::min(best, ranked[i]));
        best = std::max(best, ranked[i]);
      }
      scores[group] = best + second;
    }
    rank_indices(scores, params_.n_group, graph::SortOrder::descending, params_.n_group, order);
    for (int64_t rank = params_.n_group_used; rank < params_.n_group; ++rank)
      std::fill_n(ranked + order[rank] * size, size, kNever);
  }

  // Counting sort of (row, rank) by expert.
  void group(const RunContext& context) {
    const int64_t n = n_entries(context);
    const int32_t* experts = ints(context, buffers_.experts);
    int32_t* begin = ints(context, buffers_.expert_begin);
    std::fill_n(begin, n_expert_ + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++begin[experts[i] + 1];
    for (int64_t expert = 0; expert < n_expert_; ++expert) begin[expert + 1] += begin[expert];
    int32_t* entries = ints(context, buffers_.entries);
    int32_t* entry_expert = ints(context, buffers_.entry_expert);
    for (int64_t i = 0; i < n; ++i) {
      entries[i] = begin[experts[i]]++;
      entry_expert[entries[i]] = experts[i];
    }
    for (int64_t expert = n_expert_; expert > 0; --expert) begin[expert] = begin[expert - 1];
    begin[0] = 0;
    chosen_.clear();
    for (int32_t expert = 0; expert < n_expert_; ++expert)
      if (begin[expert + 1] > begin[expert]) chosen_.push_back(expert);
    const auto reset = [&](WorkQueue& queue, ValueId weight) {
      queue.reset(static_cast<int64_t>(chosen_.size()) * matrix_of(context, graph_, weight).n_panels());
    };
    reset(gate_queue_, node_.inputs[2]);
    if (buffers_.up >= 0) reset(up_queue_, node_.inputs[3]);
    reset(down_queue_, node_.inputs[params_.down_index()]);
  }

  // Each row's activation at the places of its entries.
  void gather(const RunContext& context, int worker) const {
    const View& x = context.view(node_.inputs[0]);
    const int64_t n_used = params_.n_expert_used;
    const size_t stride = activation_row_bytes(input_kind_, n_embd_);
    const int32_t* entries = ints(context, buffers_.entries);
    for_row_parts(n_rows(context), n_embd_, worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      for (int64_t rank = 0; rank < n_used; ++rank) {
        std::byte* out =
            context.work_buffer(buffers_.inputs) + stride * static_cast<size_t>(entries[row * n_used + rank]);
        const size_t offset = activation_row_bytes(input_kind_, begin);
        const size_t bytes = activation_row_bytes(input_kind_, end) - offset;
        if (input_kind_ == ActivationKind::f32) {
          std::memcpy(out + offset, x.row(row) + begin, bytes);
        } else if (rank == 0) {
          context.kernels->quantize_row(x.row(row) + begin, end - begin,
                                        reinterpret_cast<ActivationBlock*>(out + offset));
        } else {
          std::memcpy(
              out + offset,
              context.work_buffer(buffers_.inputs) + stride * static_cast<size_t>(entries[row * n_used]) + offset,
              bytes);
        }
      }
    });
  }

  // Every chosen expert's entries times its matrix; the workers share the panels of all of them.
  void products(const RunContext& context, int worker, WorkQueue& queue, ValueId weight, int activations, size_t stride,
                int out, int64_t n_out) const {
    const int32_t* begin = ints(context, buffers_.expert_begin);
    share_panels(queue, worker, matrix_of(context, graph_, weight), [&](int64_t i, WorkRange panels) {
      const int64_t expert = chosen_[static_cast<size_t>(i)], first = begin[expert];
      multiply_panels(context, matrix_of(context, graph_, weight, expert), panels,
                      context.work_buffer(activations) + stride * static_cast<size_t>(first), stride,
                      begin[expert + 1] - first, floats(context, out) + first * n_out, n_out);
    });
  }

  // Columns [begin, end) of an expert's product, times its scale, plus its bias.
  void scale_and_bias(const RunContext& context, int64_t expert, MoeVector scale, MoeVector bias, float* row,
                      int64_t begin, int64_t end) const {
    if (const float* factors = vector_of(context, scale))
      context.kernels->scale(row + begin, factors[expert], end - begin, row + begin);
    if (const float* values = vector_of(context, bias, expert))
      context.kernels->add(row + begin, values + begin, end - begin, row + begin);
  }

  void activate(const RunContext& context, int worker) const {
    float *gates = floats(context, buffers_.gate), *ups = buffers_.up < 0 ? nullptr : floats(context, buffers_.up);
    const int32_t* experts = ints(context, buffers_.entry_expert);
    for_row_parts(n_entries(context), n_ff_, worker, context.n_workers, [&](int64_t entry, int64_t begin, int64_t end) {
      float* gate = gates + entry * gate_width_;
      float* up = ups == nullptr ? gate + n_ff_ : ups + entry * n_ff_;
      scale_and_bias(context, experts[entry], MoeVector::gate_scale, MoeVector::gate_bias, gate, begin, end);
      if (ups == nullptr) {
        scale_and_bias(context, experts[entry], MoeVector::gate_scale, MoeVector::gate_bias, gate, begin + n_ff_,
                       end + n_ff_);
      } else {
        scale_and_bias(context, experts[entry], MoeVector::up_scale, MoeVector::up_bias, up, begin, end);
      }
      gated(*context.kernels, params_.activation, gate + begin, up + begin, end - begin, gate + begin);
    });
  }

  void combine(const RunContext& context, int worker) const {
    const View& out = context.view(node_.output);
    const int64_t n_used = params_.n_expert_used;
    float *results = floats(context, buffers_.results), *shares = floats(context, buffers_.shares);
    const int32_t* entries = ints(context, buffers_.entries);
    const int32_t* experts = ints(context, buffers_.experts);
    for_row_parts(n_rows(context), n_embd_, worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      for (int64_t rank = 0; rank < n_used; ++rank) {
        const int64_t choice = row * n_used + rank;
        float* result = results + entries[choice] * n_embd_;
        scale_and_bias(context, experts[choice], MoeVector::down_scale, MoeVector::down_bias, result, begin, end);
        if (rank == 0) {
          context.kernels->scale(result + begin, shares[choice], end - begin, out.row(row) + begin);
        } else {
          context.kernels->add_scaled(result + begin, shares[choice], end - begin, out.row(row) + begin);
        }
      }
    });
  }

  const Node& node_;
  const graph::Graph& graph_;
  const MoeParams& params_;
  MoeBuffers buffers_;
  ActivationKind input_kind_, hidden_kind_;
  int64_t n_embd_, n_expert_, n_ff_, gate_width_;
  std::vector<int32_t> chosen_;  // experts that some row of the batch goes to
  WorkQueue gate_queue_, up_queue_, down_queue_;
};

}  // namespace

void plan_moe(Planner& planner, const Node& node) {
  const auto& params = std::get<MoeParams>(node.params);
  for (const ValueId input : {node.inputs[0], node.inputs[1]})
    planner.require(planner.max_view(input).nb[0] == 4, "rows of an operand are not contiguous; use cont");
  const bool fused = params.gate_up == GateUp::fused;
  const ValueId gate = node.inputs[2], down = node.inputs[params.down_index()];
  const tensor::DType gate_type = planner.weight_of(gate)->dtype;
  planner.require(fused || activation_kind(gate_type) == activation_kind(planner.weight_of(node.inputs[3])->dtype),
                  "gate and up experts of a quantised and an unquantised type");
  for (size_t i = params.down_index() + 1; i < node.inputs.size(); ++i)
    planner.require(planner.weight_of(node.inputs[i]) != nullptr, "scales and biases of experts must be weights");
  const ActivationKind input_kind = activation_kind(gate_type);
  const ActivationKind hidden_kind = activation_kind(planner.weight_of(down)->dtype);
  const int64_t n_embd = planner.max_view(node.inputs[0]).ne[0], n_ff = planner.max_view(down).ne[0];
  const auto gate_width = static_cast<uint64_t>(planner.max_view(gate).ne[1]);
  const auto rows = static_cast<uint64_t>(planner.max_view(node.inputs[0]).ne[1]);
  const auto n_expert = static_cast<uint64_t>(planner.max_view(node.inputs[1]).ne[0]);
  const uint64_t n_entries = rows * static_cast<uint64_t>(params.n_expert_used);

  MoeBuffers buffers{};
  buffers.probabilities = planner.add_buffer(rows * n_expert * 4);
  buffers.experts = planner.add_buffer(n_entries * 4);
  buffers.shares = planner.add_buffer(n_entries * 4);
  buffers.entries = planner.add_buffer(n_entries * 4);
  buffers.expert_begin = planner.add_buffer((n_expert + 1) * 4);
  buffers.entry_expert = planner.add_buffer(n_entries * 4);
  buffers.inputs = planner.add_buffer(n_entries * activation_row_bytes(input_kind, n_embd));
  buffers.gate = planner.add_buffer(n_entries * gate_width * 4);
  buffers.up = fused ? -1 : planner.add_buffer(n_entries * static_cast<uint64_t>(n_ff) * 4);
  buffers.hidden =
      hidden_kind == ActivationKind::q8 ? planner.add_buffer(n_entries * activation_row_bytes(hidden_kind, n_ff)) : -1;
  buffers.results = planner.add_buffer(n_entries * static_cast<uint64_t>(n_embd) * 4);
  planner.need_scratch(n_expert * 12);  // what is ranked, the order, scores of groups

  Touches touches{node.output, {node.inputs[0], node.inputs[1]}, {}, {}, false};
  for (const int id : {buffers.probabilities, buffers.experts, buffers.shares, buffers.entries, buffers.expert_begin,
                       buffers.entry_expert, buffers.inputs, buffers.gate, buffers.up, buffers.hidden, buffers.results})
    if (id >= 0) touches.buffers_written.push_back(id);
  planner.add_step(std::make_unique<MoeStep>(node, planner.graph, buffers, input_kind, hidden_kind, planner.n_workers),
                   std::move(touches));
}

}  // namespace caravan::device::cpu
