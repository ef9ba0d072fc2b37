// Rotary position embedding. Angles are computed in double once per row of the batch and rounded to f32 cosines and
// sines; layers with equal parameters share them. Conventions: ggml's rope; YaRN: arXiv:2309.00071.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

// The dimension pair that turns n_turns times within the original context (YaRN, section 3.2).
double yarn_pair(const graph::RopeParams& p, double n_turns) {
  return p.n_rot * std::log(p.n_ctx_orig / (n_turns * 2 * std::numbers::pi)) / (2 * std::log(double{p.freq_base}));
}

// 1 for pairs that are extrapolated (high frequencies), 0 for those that are interpolated, a ramp between.
double yarn_extrapolated_share(const graph::RopeParams& p, int pair) {
  const double low = std::max(0.0, std::floor(yarn_pair(p, p.beta_fast)));
  const double high = std::min(p.n_rot - 1.0, std::ceil(yarn_pair(p, p.beta_slow)));
  return 1 - std::clamp((pair - low) / std::max(0.001, high - low), 0.0, 1.0);
}

// cosines [n_rot / 2], then sines [n_rot / 2], per row.
class RopeTableStep final : public Step {
 public:
  RopeTableStep(const Node& rope, int buffer)
      : rope_(rope), params_(std::get<graph::RopeParams>(rope.params)), buffer_(buffer) {}

  // Angle per position and pair.
  void bind(const RunContext& context) override {
    const float* factors = rope_.inputs.size() > 2 ? context.view(rope_.inputs[2]).row(0) : nullptr;
    magnitude_ = params_.attn_factor;
    if (params_.ext_factor != 0) magnitude_ *= 1 + 0.1 * std::log(1 / double{params_.freq_scale});
    for (int pair = 0; pair < params_.n_rot / 2; ++pair) {
      double frequency = std::pow(double{params_.freq_base}, -2.0 * pair / params_.n_rot);
      if (factors != nullptr) frequency /= factors[pair];
      double share = 0;
      if (params_.ext_factor != 0) share = yarn_extrapolated_share(params_, pair) * params_.ext_factor;
      frequencies_.push_back(frequency * params_.freq_scale * (1 - share) + frequency * share);
    }
  }

  void run(const RunContext& context, int worker) override {
    const View& positions = context.view(rope_.inputs[1]);
    const auto n_pairs = static_cast<int64_t>(frequencies_.size());
    auto* table = reinterpret_cast<float*>(context.work_buffer(buffer_));
    for_row_parts(positions.ne[0], n_pairs, worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
      const double position = positions.row_i32(0)[row];
      const double magnitude = magnitude_ * temperature(position);
      float* cosines = table + row * n_pairs * 2;
      for (int64_t pair = begin; pair < end; ++pair) {
        const double angle = position * frequencies_[static_cast<size_t>(pair)];
        cosines[pair] = static_cast<float>(std::cos(angle) * magnitude);
        cosines[n_pairs + pair] = static_cast<float>(std::sin(angle) * magnitude);
      }
    });
  }

 private:
  double temperature(double position) const {
    if (params_.temperature_scale == 0) return 1;
    return 1 + params_.temperature_scale * std::log(1 + std::floor(position / params_.temperature_length));
  }

  const Node& rope_;
  const graph::RopeParams& params_;
  int buffer_;
  double magnitude_ = 1;
  std::vector<double> frequencies_;
};

class RopeStep final : public Step {
 public:
  RopeStep(const Node& node, int table)
      : node_(node), params_(std::get<graph::RopeParams>(node.params)), table_(table) {}

  void run(const RunContext& context, int worker) override {
    const View &x = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const auto* table = reinterpret_cast<const float*>(context.work_buffer(table_));
    const auto pairing = params_.pairing == graph::RopePairing::adjacent ? RopePairing::normal : RopePairing::neox;
    const int64_t head_dim = x.ne[0], n_pairs = params_.n_rot / 2;
    // Rows, or the heads of few rows.
    const WorkRange heads = split_work(x.ne[1] * x.ne[2], worker, context.n_workers);
    for (int64_t head = heads.begin; head < heads.end;) {
      const int64_t row = head / x.ne[1], first = head % x.ne[1];
      const int64_t n = std::min(heads.end - head, x.ne[1] - first);
      const float* cosines = table + row * params_.n_rot;
      context.kernels->rope(pairing, reinterpret_cast<const float*>(x.at(first, row, 0)), n, head_dim, params_.n_rot,
                            cosines, cosines + n_pairs, reinterpret_cast<float*>(out.at(first, row, 0)));
      head += n;
    }
  }

 private:
  const Node& node_;
  const graph::RopeParams& params_;
  int table_;
};

}  // namespace

std::unique_ptr<Step> make_rope_table_step(const Node& rope, int buffer) {
  return std::make_unique<RopeTableStep>(rope, buffer);
}

void plan_rope(Planner& planner, const Node& node) {
  const View& x = planner.max_view(node.inputs[0]);
  planner.require(x.nb[0] == 4 && x.nb[1] == x.ne[0] * 4, "heads of the operand are not contiguous; use cont");
  planner.require(planner.max_view(node.inputs[1]).nb[0] == 4, "positions are not contiguous; use cont");
  if (node.inputs.size() > 2)
    planner.require(planner.weight_of(node.inputs[2]) != nullptr, "frequency factors must be a weight");
  const int table = planner.rope_table(node);
  planner.add_step(std::make_unique<RopeStep>(node, table), {node.output, {node.inputs[0]}, {}, {table}, false});
}

}  // namespace caravan::device::cpu
