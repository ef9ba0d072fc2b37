#include "plan/cost_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace caravan::plan {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::array<uint32_t, 5> kChunks = {32, 64, 128, 256, 512};
// The chunk at which stages are balanced for prompts.
constexpr uint32_t kTypicalChunk = 128;
// Up to so many devices every order of them is tried.
constexpr size_t kMostPermuted = 4;
// Each further candidate's slowest stage is at least so much faster.
constexpr double kFrontierStep = 0.98;
// Candidates are refined whose score is at least this part of the best one's.
constexpr double kWorthRefining = 0.75;

uint32_t groups_of(uint32_t n_slots, size_t n_stages) {
  return std::max(1u, std::min(n_slots, static_cast<uint32_t>(n_stages)));
}

uint32_t rows_of(uint32_t n_slots, size_t n_stages) {
  const uint32_t groups = groups_of(n_slots, n_stages);
  return std::max(1u, (n_slots + groups - 1) / groups);
}

}  // namespace

CostModel::CostModel(Input input) : input_(std::move(input)) {
  CARAVAN_ASSERT(input_.layer_kv_bytes.size() == input_.work.layers.size(), "one figure per layer");
  CARAVAN_ASSERT(input_.links.size() == input_.devices.size(), "one link per device");
}

double CostModel::seconds(size_t device, const models::WorkByType& by_type, uint32_t n_rows) const {
  double sum = 0;
  for (const auto& [type, work] : by_type) {
    const stage::MatrixRate rate = input_.devices[device].rate(type);
    sum += std::max(work.bytes / rate.bytes_per_s, 2 * work.multiplies * n_rows / rate.ops_per_s);
  }
  return sum;
}

const std::vector<double>& CostModel::layer_seconds(size_t device, uint32_t n_rows) const {
  std::vector<double>& sums = layer_seconds_[{device, n_rows}];
  if (sums.empty()) {
    sums.push_back(0);
    const stage::DeviceProfile& profile = input_.devices[device];
    for (size_t i = 0; i < input_.work.layers.size(); ++i) {
      const auto times =
          i < input_.layer_kinds.size() ? profile.layers.find(input_.layer_kinds[i]) : profile.layers.end();
      if (times != profile.layers.end()) {
        sums.push_back(sums.back() + times->second(n_rows));
        continue;
      }
      const double attention =
          input_.context * input_.layer_kv_bytes[i] * n_rows / input_.devices[device].cache_bytes_per_s;
      sums.push_back(sums.back() + seconds(device, input_.work.layers[i], n_rows) + attention);
    }
  }
  return sums;
}

CostModel::StageTimes CostModel::stage_times(size_t device, uint32_t n_rows, uint32_t n_outputs) const {
  StageTimes times;
  times.sums_ = &layer_seconds(device, n_rows);
  times.step_ = input_.devices[device].step_seconds;
  times.output_ = n_outputs == 0 ? 0 : seconds(device, input_.work.output, n_outputs);
  return times;
}

double CostModel::hop_seconds(std::optional<size_t> from, std::optional<size_t> to, uint32_t n_rows) const {
  if (!from || !to) return input_.links[from ? *from : to.value()].latency_seconds;
  const stage::LinkProfile &first = input_.links[*from], &second = input_.links[*to];
  const double bytes = 4.0 * input_.n_embd * n_rows;
  const double direct_bytes_per_s = std::min(first.bytes_per_s, second.bytes_per_s);
  if (input_.hops.empty()) return std::max(first.latency_seconds, second.latency_seconds) + bytes / direct_bytes_per_s;
  if (const std::optional<double>& direct = input_.hops[*from][*to]) return *direct + bytes / direct_bytes_per_s;
  return first.latency_seconds + bytes / first.bytes_per_s + second.latency_seconds + bytes / second.bytes_per_s;
}

Prediction CostModel::predict(std::span<const StageSpan> stages) const {
  // The time of a step through all stages, and of the slowest stage or hop in it.
  const auto pass = [&](uint32_t n_rows, uint32_t n_outputs) {
    double sum = hop_seconds(std::nullopt, stages.front().device, n_rows);
    double slowest = 0;
    for (size_t i = 0; i < stages.size(); ++i) {
      const bool last = i + 1 == stages.size();
      const double hop =
          hop_seconds(stages[i].device, last ? std::nullopt : std::optional(stages[i + 1].device), n_rows);
      const double compute = stage_seconds(stages[i], n_rows, n_outputs);
      sum += compute + hop;
      slowest = std::max({slowest, compute, last ? 0 : hop});
    }
    return std::pair(sum, slowest);
  };

  Prediction prediction;
  prediction.generation = 1 / pass(1, 1).first;
  const uint32_t n_slots = std::max(1u, input_.n_slots);
  const uint32_t groups = groups_of(n_slots, stages.size());
  const auto [step, slowest] = pass(rows_of(n_slots, stages.size()), rows_of(n_slots, stages.size()));
  prediction.streams = n_slots / std::max(step, groups * slowest);
  for (const uint32_t chunk : kChunks) {
    const auto [first, next] = pass(chunk, 1);
    const double n_chunks = std::ceil(static_cast<double>(kTypicalPrompt) / chunk);
    prediction.prompt = std::max(prediction.prompt, kTypicalPrompt / (first + (n_chunks - 1) * next));
  }
  return prediction;
}

double CostModel::score(const Prediction& p, Goal goal) {
  const double prompt = kTypicalPrompt / p.prompt;
  const double alone = kTypicalAnswer / (prompt + kTypicalAnswer / p.generation);
  const double together = kTypicalAnswer / (prompt + kTypicalAnswer / p.streams);
  switch (goal) {
    case Goal::latency:
      return alone;
    case Goal::throughput:
      return together;
    case Goal::automatic:
      break;
  }
  return std::sqrt(alone * together);
}

namespace {

// The devices in one order: finds, for a number of stages and a bound on the slowest, the least time of a step.
class Search {
 public:
  Search(const CostModel& model, const std::vector<StageSpan>& first, uint32_t begin, std::vector<size_t> order,
         const std::function<bool(const StageSpan&)>& fits)
      : model_(model), first_(first), begin_(begin), order_(std::move(order)), n_(model.n_layer() - begin) {
    // What fits is asked once per run of layers.
    fits_.resize(order_.size() * (n_ + 1) * (n_ + 1));
    for (size_t d = 0; d < order_.size(); ++d)
      for (uint32_t b = 0; b < n_; ++b)
        for (uint32_t e = b + 1; e <= n_; ++e) {
          fits_[index(d, b, e)] = fits({order_[d], begin_ + b, begin_ + e});
          if (!fits_[index(d, b, e)]) break;  // nor does more
        }
  }

  // Stages whose step of one row is shortest, while none takes more than bound with n_rows; nullopt: there are none.
  std::optional<std::vector<StageSpan>> best(size_t n_stages, double bound, uint32_t n_rows, uint32_t n_outputs) const {
    struct Entry {
      double seconds = kInfinity;
      size_t device = 0;
      uint32_t begin = 0;
    };
    const size_t n_devices = order_.size();
    // entries[j][d][e]: j stages, the last on device d, cover the first e layers.
    std::vector<Entry> entries(n_stages * n_devices * (n_ + 1));
    const auto at = [&](size_t j, size_t d, uint32_t e) -> Entry& {
      return entries[(j * n_devices + d) * (n_ + 1) + e];
    };
    std::vector<CostModel::StageTimes> alone, bounded;
    for (const size_t device : order_) {
      alone.push_back(model_.stage_times(device, 1, 1));
      bounded.push_back(model_.stage_times(device, n_rows, n_outputs));
    }
    std::optional<size_t> before;
    if (!first_.empty()) before = first_.back().device;
    for (size_t j = 0; j < n_stages; ++j)
      for (size_t d = j; d < n_devices; ++d)
        for (uint32_t b = 0; b < n_; ++b) {
          Entry from;
          if (j == 0) {
            if (b > 0) break;
            from = {model_.hop_seconds(before, order_[d], 1), 0, 0};
          } else {
            for (size_t p = j - 1; p < d; ++p) {
              if (model_.hop_seconds(order_[p], order_[d], n_rows) > bound) continue;
              const double seconds = at(j - 1, p, b).seconds + model_.hop_seconds(order_[p], order_[d], 1);
              if (seconds < from.seconds) from = {seconds, p, 0};
            }
          }
          if (from.seconds == kInfinity) continue;
          for (uint32_t e = b + 1; e <= n_ && fits_[index(d, b, e)]; ++e) {
            if (bounded[d](begin_ + b, begin_ + e) > bound) break;
            const double seconds = from.seconds + alone[d](begin_ + b, begin_ + e);
            if (seconds < at(j, d, e).seconds) at(j, d, e) = {seconds, from.device, b};
          }
        }
    size_t device = 0;
    for (size_t d = 0; d < n_devices; ++d)
      if (at(n_stages - 1, d, n_).seconds < at(n_stages - 1, device, n_).seconds) device = d;
    if (at(n_stages - 1, device, n_).seconds == kInfinity) return std::nullopt;
    std::vector<StageSpan> stages(n_stages);
    uint32_t end = n_;
    for (size_t j = n_stages; j-- > 0;) {
      const Entry& entry = at(j, device, end);
      stages[j] = {order_[device], begin_ + entry.begin, begin_ + end};
      end = entry.begin;
      device = entry.device;
    }
    stages.insert(stages.begin(), first_.begin(), first_.end());
    return stages;
  }

 private:
  size_t index(size_t d, uint32_t b, uint32_t e) const { return (d * (n_ + 1) + b) * (n_ + 1) + e; }

  const CostModel& model_;
  const std::vector<StageSpan>& first_;
  const uint32_t begin_;
  const std::vector<size_t> order_;
  const uint32_t n_;  // layers to place
  std::vector<bool> fits_;
};

// The orders of devices that are tried: all of a few, else by speed, the fastest first or last, and as given.
std::vector<std::vector<size_t>> orders(const CostModel& model, const std::vector<size_t>& devices) {
  std::vector<std::vector<size_t>> result;
  if (devices.size() <= kMostPermuted) {
    std::vector<size_t> order = devices;
    std::sort(order.begin(), order.end());
    do result.push_back(order);
    while (std::next_permutation(order.begin(), order.end()));
    return result;
  }
  std::vector<size_t> by_speed = devices;
  std::sort(by_speed.begin(), by_speed.end(), [&](size_t a, size_t b) {
    return model.stage_seconds({a, 0, 1}, 1, 0) < model.stage_seconds({b, 0, 1}, 1, 0);
  });
  result.push_back(by_speed);
  std::reverse(by_speed.begin(), by_speed.end());
  result.push_back(by_speed);
  result.push_back(devices);
  return result;
}

// Moves boundaries between stages one layer at a time, as long as that raises the score; stages before n_fixed stay.
double refine(const CostModel& model, std::vector<StageSpan>& stages, size_t n_fixed,
              const std::function<bool(const StageSpan&)>& fits, Goal goal) {
  double best = CostModel::score(model.predict(stages), goal);
  const auto moved = [&](size_t i, int by) {
    StageSpan left = stages[i], right = stages[i + 1];
    left.end += by;
    right.begin += by;
    if (left.begin == left.end || right.begin == right.end || !fits(left) || !fits(right)) return false;
    std::swap(stages[i], left);
    std::swap(stages[i + 1], right);
    const double score = CostModel::score(model.predict(stages), goal);
    if (score > best) {
      best = score;
      return true;
    }
    std::swap(stages[i], left);
    std::swap(stages[i + 1], right);
    return false;
  };
  for (bool improved = true; improved;) {
    improved = false;
    for (size_t i = n_fixed; i + 1 < stages.size(); ++i)
      for (const int by : {-1, 1})
        while (moved(i, by)) improved = true;
  }
  return best;
}

}  // namespace

std::optional<std::vector<StageSpan>> fastest_stages(const CostModel& model, std::vector<StageSpan> first,
                                                     uint32_t begin, const std::vector<size_t>& devices,
                                                     const std::function<bool(const StageSpan&)>& fits, Goal goal) {
  std::optional<std::vector<StageSpan>> best;
  double best_score = 0;
  for (const std::vector<size_t>& order : orders(model, devices)) {
    const Search search(model, first, begin, order, fits);
    for (size_t n_stages = 1; n_stages <= order.size(); ++n_stages) {
      const uint32_t group = rows_of(model.n_slots(), first.size() + n_stages);
      // From the shortest step on, along the frontier on which the slowest stage becomes faster and the step longer.
      for (const auto& [n_rows, n_outputs] : {std::pair(group, group), std::pair(kTypicalChunk, 1u)}) {
        double bound = kInfinity;
        while (const auto stages = search.best(n_stages, bound, n_rows, n_outputs)) {
          if (CostModel::score(model.predict(*stages), goal) > kWorthRefining * best_score) {
            std::vector<StageSpan> refined = *stages;
            const double score = refine(model, refined, first.size(), fits, goal);
            if (score > best_score) {
              best_score = score;
              best = std::move(refined);
            }
          }
          double slowest = 0;
          for (size_t i = first.size(); i < stages->size(); ++i) {
            slowest = std::max(slowest, model.stage_seconds((*stages)[i], n_rows, n_outputs));
            if (i > first.size())
              slowest = std::max(slowest, model.hop_seconds((*stages)[i - 1].device, (*stages)[i].device, n_rows));
          }
          bound = slowest * kFrontierStep;
        }
      }
    }
  }
  return best;
}

}  // namespace caravan::plan
