#include "plan/replicas.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "base/error.h"

namespace caravan::plan {
namespace {

using Group = std::vector<size_t>;  // devices, ascending

// Whether a group holds the model is asked for all orders of up to so many devices.
constexpr size_t kMostPermuted = 10;
// The search ends after so many steps, in the unit of cost() below: a few seconds.
constexpr double kMostSteps = 2e7;

// What the search for the stages of a group takes: it grows with orders, pairs of devices and pairs of layers.
double cost(size_t n_devices, uint32_t n_layer) {
  const auto n = static_cast<double>(n_devices);
  const double orders = n_devices <= 4 ? std::tgamma(n + 1) : 3 * n;
  return orders * n * n * n_layer * n_layer;
}

// Evaluates divisions of devices into groups. What one group can do is computed once.
class Search {
 public:
  Search(const CostModel& model, const std::function<bool(const StageSpan&)>& fits, Goal goal)
      : model_(model), fits_(fits), goal_(goal) {}

  // Whether the devices hold all layers, in some order.
  bool holds(const Group& group) {
    auto found = holds_.find(group);
    if (found == holds_.end()) found = holds_.emplace(group, reaches_end(group)).first;
    return found->second;
  }

  // Groups that do not hold the model are left out, and those that would get no sequence.
  std::optional<Replicas> evaluate(const std::vector<Group>& groups) {
    std::vector<const Group*> used;
    for (const Group& group : groups)
      if (holds(group)) used.push_back(&group);
    while (used.size() > 1) {
      const auto n_replicas = static_cast<uint32_t>(used.size());
      const uint32_t even = (model_.n_slots() + n_replicas - 1) / n_replicas;
      if (std::erase_if(used, [&](const Group* group) { return stages(*group, even) == nullptr; }) > 0) continue;
      std::vector<double> speeds;
      for (const Group* group : used)
        speeds.push_back(CostModel::score(slots(even).predict(*stages(*group, even)), Goal::throughput));
      const std::vector<uint32_t> shares = share_slots(model_.n_slots(), speeds);
      size_t least = 0;  // the slowest of those that get the fewest
      for (size_t i = 1; i < used.size(); ++i)
        if (std::pair(shares[i], speeds[i]) < std::pair(shares[least], speeds[least])) least = i;
      if (shares[least] > 0) return predict(used, even, shares);
      used.erase(used.begin() + static_cast<ptrdiff_t>(least));
    }
    return std::nullopt;
  }

 private:
  CostModel& slots(uint32_t n_slots) { return models_.try_emplace(n_slots, model_.with_slots(n_slots)).first->second; }

  bool reaches_end(const Group& group) const {
    const auto extend = [&](uint32_t begin, size_t device) {
      uint32_t end = begin;
      while (end < model_.n_layer() && fits_({device, begin, end + 1})) ++end;
      return end;
    };
    if (group.size() > kMostPermuted) {
      uint32_t end = 0;
      for (const size_t device : group) end = extend(end, device);
      return end == model_.n_layer();
    }
    std::vector<uint32_t> reach(size_t{1} << group.size());  // layers that each subset holds
    for (size_t subset = 1; subset < reach.size(); ++subset)
      for (size_t i = 0; i < group.size(); ++i)
        if (subset >> i & 1) reach[subset] = std::max(reach[subset], extend(reach[subset ^ size_t{1} << i], group[i]));
    return reach.back() == model_.n_layer();
  }

  // The fastest stages of a group that computes so many sequences; nullptr: none are found, or the search has ended.
  const std::vector<StageSpan>* stages(const Group& group, uint32_t n_slots) {
    const auto key = std::pair(group, n_slots);
    auto found = stages_.find(key);
    if (found == stages_.end()) {
      if (steps_ > kMostSteps) return nullptr;
      steps_ += cost(group.size(), model_.n_layer());
      found = stages_.emplace(key, fastest_stages(slots(n_slots), {}, 0, group, fits_, goal_)).first;
    }
    return found->second ? &*found->second : nullptr;
  }

  Replicas predict(const std::vector<const Group*>& used, uint32_t even, const std::vector<uint32_t>& shares) {
    Replicas result;
    double alone = 0, together = 0;
    for (size_t i = 0; i < used.size(); ++i) {
      const std::vector<StageSpan>& spans = *stages(*used[i], even);
      const Prediction own = slots(shares[i]).predict(spans);
      result.replicas.push_back({spans, CostModel::score(own, Goal::throughput)});
      result.prediction.prompt = std::max(result.prediction.prompt, own.prompt);
      result.prediction.generation = std::max(result.prediction.generation, own.generation);
      result.prediction.streams += own.streams;
      alone = std::max(alone, CostModel::score(own, Goal::latency));
      together += result.replicas.back().speed;
    }
    result.score = goal_ == Goal::throughput ? together : goal_ == Goal::latency ? alone : std::sqrt(alone * together);
    return result;
  }

  const CostModel& model_;
  const std::function<bool(const StageSpan&)>& fits_;
  const Goal goal_;
  double steps_ = 0;
  std::map<uint32_t, CostModel> models_;  // by slots
  std::map<Group, bool> holds_;
  std::map<std::pair<Group, uint32_t>, std::optional<std::vector<StageSpan>>> stages_;
};

Group joined(const Group& a, const Group& b) {
  Group group = a;
  group.insert(group.end(), b.begin(), b.end());
  std::sort(group.begin(), group.end());
  return group;
}

// As many groups that hold the model as are easily found; the last one may not.
std::vector<Group> smallest_groups(const CostModel& model, Search& search, const std::vector<size_t>& devices,
                                   const std::function<bool(const StageSpan&)>& fits) {
  std::vector<Group> groups;
  std::vector<std::pair<uint32_t, size_t>> others;  // first layers that a device holds, and the device
  for (const size_t device : devices) {
    uint32_t room = 0;
    while (room < model.n_layer() && fits({device, 0, room + 1})) ++room;
    if (room == model.n_layer())
      groups.push_back({device});
    else
      others.emplace_back(room, device);
  }
  std::sort(others.begin(), others.end());
  for (auto small = others.begin(), large = others.end(); small != large;) {
    Group group = {(--large)->second};
    while (small != large && !search.holds(group)) group = joined(group, {(small++)->second});
    groups.push_back(std::move(group));
  }
  return groups;
}

// All divisions that differ by two groups joined, a device moved from one to another or to a new one, or two devices
// exchanged.
std::vector<std::vector<Group>> neighbours(const std::vector<Group>& groups) {
  std::vector<std::vector<Group>> result;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (size_t j = i + 1; j < groups.size(); ++j) {
      result.push_back(groups);
      result.back()[i] = joined(groups[i], groups[j]);
      result.back().erase(result.back().begin() + static_cast<ptrdiff_t>(j));
      for (const size_t a : groups[i])
        for (const size_t b : groups[j]) {
          result.push_back(groups);
          std::replace(result.back()[i].begin(), result.back()[i].end(), a, b);
          std::replace(result.back()[j].begin(), result.back()[j].end(), b, a);
          for (const size_t k : {i, j}) std::sort(result.back()[k].begin(), result.back()[k].end());
        }
    }
    if (groups[i].size() == 1) continue;
    for (const size_t device : groups[i])
      for (size_t j = 0; j <= groups.size(); ++j) {
        if (i == j) continue;
        result.push_back(groups);
        result.back().emplace_back();
        std::erase(result.back()[i], device);
        result.back()[j] = joined(result.back()[j], {device});
        if (j < groups.size()) result.back().pop_back();
      }
  }
  return result;
}

}  // namespace

std::vector<uint32_t> share_slots(uint32_t n_slots, const std::vector<double>& speeds) {
  CARAVAN_ASSERT(!speeds.empty(), "somebody takes the slots");
  std::vector<uint32_t> shares(speeds.size());
  for (uint32_t i = 0; i < n_slots; ++i) {
    size_t least = 0;
    for (size_t r = 1; r < speeds.size(); ++r)
      if ((shares[r] + 1) / speeds[r] < (shares[least] + 1) / speeds[least]) least = r;
    ++shares[least];
  }
  return shares;
}

std::optional<Replicas> fastest_replicas(const CostModel& model, const std::vector<size_t>& devices,
                                         const std::function<bool(const StageSpan&)>& fits, Goal goal) {
  if (model.n_slots() < 2 || devices.size() < 2) return std::nullopt;
  Search search(model, fits, goal);
  std::vector<Group> groups = smallest_groups(model, search, devices, fits);
  std::optional<Replicas> best = search.evaluate(groups);
  for (bool improved = true; improved;) {
    improved = false;
    std::vector<Group> next;
    for (std::vector<Group>& changed : neighbours(groups)) {
      auto found = search.evaluate(changed);
      if (!found || (best && found->score <= best->score)) continue;
      best = std::move(found);
      next = std::move(changed);
      improved = true;
    }
    if (improved) groups = std::move(next);
  }
  return best;
}

}  // namespace caravan::plan
