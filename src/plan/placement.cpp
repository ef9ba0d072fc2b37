#include "plan/placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/progress.h"
#include "plan/replicas.h"

namespace caravan::plan {
namespace {

constexpr uint32_t kLeastContext = 4096;
// With no context asked for, the cache grows until the fullest device holds this share of its free memory: the rest is
// for what else runs there.
constexpr double kDefaultFill = 0.85;

// Sizes of any run of layers for one choice of blocks per group.
class SliceSizes {
 public:
  SliceSizes(const PlacementRequest& request, const std::vector<uint32_t>& n_blocks) : request_(request) {
    weights_.resize(request.n_layer + 1, 0);
    kv_.resize(request.n_layer + 1, 0);
    std::vector<uint64_t> layer_kv(request.n_layer, 0);
    for (size_t g = 0; g < request.groups.size(); ++g)
      for (const uint32_t layer : request.groups[g].layers)
        layer_kv[layer] = request.needs.layer_kv_cache[layer] * n_blocks[g];
    for (uint32_t i = 0; i < request.n_layer; ++i) {
      weights_[i + 1] = weights_[i] + request.needs.layer_weights[i];
      kv_[i + 1] = kv_[i] + layer_kv[i];
    }
  }

  stage::MemoryNeed need(uint32_t begin, uint32_t end) const {
    const auto& needs = request_.needs;
    stage::MemoryNeed need;
    need.weights = weights_[end] - weights_[begin] + needs.shared_weights;
    if (begin == 0) need.weights += needs.embedding_weights;
    if (end == request_.n_layer) need.weights += needs.output_weights;
    need.kv_cache = kv_[end] - kv_[begin];
    need.scratch = needs.scratch;
    return need;
  }

 private:
  const PlacementRequest& request_;
  std::vector<uint64_t> weights_, kv_;  // prefix sums over layers
};

// One device's part of an attempt: it may take layers up to `budget` bytes.
struct Seat {
  size_t device;
  double budget;
};

// Gives each seat, in order, as many of the layers [begin, end) as fit its budget. nullopt when layers are left over.
std::optional<std::vector<PlacedStage>> fill(const SliceSizes& sizes, uint32_t n_layer, uint32_t begin, uint32_t end,
                                             const std::vector<Seat>& seats) {
  std::vector<PlacedStage> stages;
  uint32_t next = begin;
  for (const Seat& seat : seats) {
    uint32_t last = next;
    while (last < end && static_cast<double>(sizes.need(next, last + 1).total()) <= seat.budget) ++last;
    // The output matrix may not fit together with the last layers: such a seat leaves the last layer to the next one.
    if (last == next) continue;
    stages.push_back({seat.device, 0, {next, last, next == 0, last == n_layer}, sizes.need(next, last)});
    next = last;
  }
  if (next < end) return std::nullopt;
  return stages;
}

// Fills devices to the smallest common share of their free memory that holds all layers [begin, end).
std::optional<std::vector<PlacedStage>> balance(const SliceSizes& sizes, uint32_t n_layer, uint32_t begin, uint32_t end,
                                                const std::vector<DeviceOffer>& offers,
                                                const std::vector<size_t>& devices) {
  const auto attempt = [&](double share) {
    std::vector<Seat> seats;
    for (const size_t d : devices) seats.push_back({d, share * static_cast<double>(offers[d].memory_free)});
    return fill(sizes, n_layer, begin, end, seats);
  };
  auto best = attempt(1.0);
  if (!best) return std::nullopt;
  double low = 0, high = 1;
  constexpr int kSteps = 40;  // to a 10^-12 part of the memory
  for (int i = 0; i < kSteps; ++i) {
    const double middle = (low + high) / 2;
    if (auto found = attempt(middle)) {
      best = std::move(found);
      high = middle;
    } else {
      low = middle;
    }
  }
  return best;
}

// Cuts [begin, end) by the user's shares; nullopt when a part does not fit its device.
std::optional<std::vector<PlacedStage>> split_by_shares(const SliceSizes& sizes, uint32_t n_layer, uint32_t begin,
                                                        uint32_t end, const std::vector<DeviceOffer>& offers,
                                                        const std::vector<size_t>& devices,
                                                        const std::vector<double>& shares) {
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<PlacedStage> stages;
  double before = 0;
  uint32_t next = begin;
  for (size_t i = 0; i < devices.size(); ++i) {
    before += shares[i];
    const auto last =
        i + 1 == devices.size() ? end : begin + static_cast<uint32_t>(std::lround((end - begin) * before / sum));
    if (last <= next) continue;
    PlacedStage stage{devices[i], 0, {next, last, next == 0, last == n_layer}, sizes.need(next, last)};
    if (stage.need.total() > offers[devices[i]].memory_free) return std::nullopt;
    stages.push_back(stage);
    next = last;
  }
  if (next < end) return std::nullopt;
  return stages;
}

// All layers for a given number of blocks, or nullopt.
std::optional<std::vector<PlacedStage>> try_place(const PlacementRequest& request,
                                                  const std::vector<DeviceOffer>& offers,
                                                  const std::vector<uint32_t>& n_blocks) {
  const SliceSizes sizes(request, n_blocks);
  std::vector<size_t> backends, locals;
  for (size_t i = 0; i < offers.size(); ++i) (offers[i].local ? locals : backends).push_back(i);

  const auto on_backends = [&](uint32_t begin) {
    return request.tensor_split.empty() ? balance(sizes, request.n_layer, begin, request.n_layer, offers, backends)
                                        : split_by_shares(sizes, request.n_layer, begin, request.n_layer, offers,
                                                          backends, request.tensor_split);
  };
  // The first n layers on the server itself, the others on backends.
  const auto with_local = [&](uint32_t n) -> std::optional<std::vector<PlacedStage>> {
    if (n == 0) return backends.empty() ? std::nullopt : on_backends(0);
    auto stages = balance(sizes, request.n_layer, 0, n, offers, locals);
    if (!stages || n == request.n_layer) return stages;
    const auto rest = backends.empty() ? std::nullopt : on_backends(n);
    if (!rest) return std::nullopt;
    stages->insert(stages->end(), rest->begin(), rest->end());
    return stages;
  };

  if (backends.empty()) return with_local(request.n_layer);
  if (request.n_gpu_layers) return with_local(request.n_layer - std::min(request.n_layer, *request.n_gpu_layers));
  for (uint32_t n = 0; n <= (locals.empty() ? 0 : request.n_layer); ++n)
    if (auto stages = with_local(n)) return stages;
  return std::nullopt;
}

PlacedStage as_placed(const PlacementRequest& request, const SliceSizes& sizes, const StageSpan& s, size_t replica) {
  const stage::Slice slice{s.begin, s.end, s.begin == 0, s.end == request.n_layer};
  return {s.device, replica, slice, sizes.need(s.begin, s.end)};
}

// Moves the layers that backends hold so that they are computed fastest, within the memory each has.
void place_for_speed(const PlacementRequest& request, const std::vector<DeviceOffer>& offers, const Speed& speed,
                     Placement& placement) {
  const SliceSizes sizes(request, placement.cache.n_blocks);
  std::vector<StageSpan> fixed;
  for (const PlacedStage& stage : placement.stages)
    if (offers[stage.device].local) fixed.push_back({stage.device, stage.slice.layer_begin, stage.slice.layer_end});
  const uint32_t begin = fixed.empty() ? 0 : fixed.back().end;
  std::vector<size_t> backends;
  for (size_t i = 0; i < offers.size(); ++i)
    if (!offers[i].local) backends.push_back(i);
  const auto fits = [&](const StageSpan& stage) {
    return sizes.need(stage.begin, stage.end).total() <= offers[stage.device].memory_free;
  };
  std::vector<StageSpan> spans = fixed;
  if (begin < request.n_layer && request.tensor_split.empty() && speed.goal) {
    const auto fastest = fastest_stages(speed.model, fixed, begin, backends, fits, *speed.goal);
    if (fastest) {
      spans = *fastest;
      placement.stages.clear();
      for (const StageSpan& span : spans) placement.stages.push_back(as_placed(request, sizes, span, 0));
    }
  }
  spans.clear();
  for (const PlacedStage& s : placement.stages) spans.push_back({s.device, s.slice.layer_begin, s.slice.layer_end});
  placement.prediction = speed.model.predict(spans);
}

// Places the model several times instead of once, where that is better for the goal.
void replicate(const PlacementRequest& request, const std::vector<DeviceOffer>& offers, const Speed& speed,
               Placement& placement) {
  const bool local =
      std::any_of(placement.stages.begin(), placement.stages.end(), [&](auto& s) { return offers[s.device].local; });
  if (local || !request.tensor_split.empty() || !speed.goal || *speed.goal == Goal::latency) return;
  const bool may_shorten = *speed.goal == Goal::throughput && request.n_ctx == 0;
  uint32_t n_ctx = may_shorten ? std::min(placement.n_ctx, kLeastContext) : placement.n_ctx;
  auto sizes = std::make_unique<SliceSizes>(request, blocks_for_context(request, n_ctx));
  std::vector<size_t> backends;
  for (size_t i = 0; i < offers.size(); ++i)
    if (!offers[i].local) backends.push_back(i);
  const auto fits = [&](const StageSpan& stage) {
    return sizes->need(stage.begin, stage.end).total() <= offers[stage.device].memory_free;
  };
  const auto found = fastest_replicas(speed.model, backends, fits, *speed.goal);
  if (!found || found->score <= CostModel::score(*placement.prediction, *speed.goal)) return;

  // The largest context that all of them hold.
  const auto holds = [&](uint32_t context) {
    const SliceSizes larger(request, blocks_for_context(request, context));
    for (const Replica& replica : found->replicas)
      for (const StageSpan& s : replica.stages)
        if (static_cast<double>(larger.need(s.begin, s.end).total()) >
            kDefaultFill * static_cast<double>(offers[s.device].memory_free))
          return false;
    return true;
  };
  const uint32_t block = request.cache.block_tokens;
  if (may_shorten && holds(placement.n_ctx)) n_ctx = placement.n_ctx;
  for (uint32_t low = n_ctx / block, high = placement.n_ctx / block; low + 1 < high;) {
    const uint32_t middle = low + (high - low) / 2;
    if (holds(middle * block))
      n_ctx = (low = middle) * block;
    else
      high = middle;
  }
  placement.n_ctx = n_ctx;
  placement.cache.n_blocks = blocks_for_context(request, n_ctx);
  sizes = std::make_unique<SliceSizes>(request, placement.cache.n_blocks);
  placement.prediction = found->prediction;
  placement.stages.clear();
  for (size_t r = 0; r < found->replicas.size(); ++r) {
    placement.replica_speeds.push_back(found->replicas[r].speed);
    for (const StageSpan& span : found->replicas[r].stages)
      placement.stages.push_back(as_placed(request, *sizes, span, r));
  }
}

std::string does_not_fit(const PlacementRequest& request, const std::vector<DeviceOffer>& offers,
                         const std::vector<uint32_t>& n_blocks, uint32_t n_ctx) {
  const stage::MemoryNeed need = SliceSizes(request, n_blocks).need(0, request.n_layer);
  uint64_t have = 0;
  std::string table;
  for (const DeviceOffer& offer : offers) {
    table += fmt::format("\n  {:<28} free {:>10}", offer.name, format_bytes(offer.memory_free));
    have += offer.memory_free;
  }
  return fmt::format(
      "the model does not fit: with a context of {} tokens it needs {} (weights {}, KV cache {}) and {} of scratch on "
      "each "
      "device, {} are free:{}\nAdd a backend, raise --mem, lower -c, or use a smaller quantisation{}.",
      n_ctx, format_bytes(need.weights + need.kv_cache), format_bytes(need.weights), format_bytes(need.kv_cache),
      format_bytes(need.scratch), format_bytes(have), table,
      request.n_gpu_layers || !request.tensor_split.empty() ? ", or leave -ngl and --tensor-split to the planner" : "");
}

}  // namespace

std::vector<uint32_t> blocks_for_context(const PlacementRequest& request, uint32_t n_ctx) {
  const uint32_t block = request.cache.block_tokens;
  const auto blocks = [block](uint64_t tokens) { return static_cast<uint32_t>((tokens + block - 1) / block); };
  // Every sequence may leave its last block half empty.
  const uint32_t full = blocks(n_ctx) + request.cache.max_slots;
  std::vector<uint32_t> n_blocks;
  for (const auto& group : request.groups) {
    if (!group.window) {
      n_blocks.push_back(0);
    } else if (*group.window == 0) {
      n_blocks.push_back(full);
    } else {
      // For each sequence its window and a partly used block at either end; for all of them the rows of one batch.
      const uint64_t windows = (uint64_t{blocks(*group.window)} + 2) * request.cache.max_slots;
      n_blocks.push_back(static_cast<uint32_t>(std::min<uint64_t>(full, windows + blocks(request.cache.max_rows))));
    }
  }
  return n_blocks;
}

namespace {

Placement place_by_memory(const PlacementRequest& request, const std::vector<DeviceOffer>& offers) {
  CARAVAN_ASSERT(request.cache.block_tokens > 0 && request.n_layer > 0, "the caller fills the request");
  const auto n_backends =
      static_cast<size_t>(std::count_if(offers.begin(), offers.end(), [](auto& o) { return !o.local; }));
  if (!request.tensor_split.empty()) {
    const bool sane =
        std::all_of(request.tensor_split.begin(), request.tensor_split.end(), [](double s) { return s >= 0; }) &&
        std::accumulate(request.tensor_split.begin(), request.tensor_split.end(), 0.0) > 0;
    if (request.tensor_split.size() != n_backends || !sane)
      throw RequestError(
          fmt::format("--tensor-split has {} shares for {} backends; give one number >= 0 for each, not all 0",
                      request.tensor_split.size(), n_backends));
  }

  const uint32_t most = request.n_ctx > 0 ? request.n_ctx : std::max(request.n_ctx_train, 1u);
  const uint32_t least = request.n_ctx > 0 ? request.n_ctx : std::min(most, kLeastContext);
  Placement placement;
  placement.cache = request.cache;
  const auto attempt = [&](uint32_t n_ctx, double fill) {
    std::vector<DeviceOffer> reduced = offers;
    for (DeviceOffer& offer : reduced)
      offer.memory_free = static_cast<uint64_t>(fill * static_cast<double>(offer.memory_free));
    const auto n_blocks = blocks_for_context(request, n_ctx);
    auto stages = try_place(request, reduced, n_blocks);
    if (!stages) return false;
    placement.stages = std::move(*stages);
    placement.cache.n_blocks = n_blocks;
    placement.n_ctx = n_ctx;
    return true;
  };

  if (request.n_ctx == 0 && attempt(most, kDefaultFill)) return placement;
  if (!attempt(least, 1.0))
    throw ResourceError(does_not_fit(request, offers, blocks_for_context(request, least), least));
  // The largest multiple of a block between least and most that fits.
  uint32_t low = least / request.cache.block_tokens, high = most / request.cache.block_tokens;
  while (low + 1 < high) {
    const uint32_t middle = low + (high - low) / 2;
    (attempt(middle * request.cache.block_tokens, kDefaultFill) ? low : high) = middle;
  }
  return placement;
}

}  // namespace

Placement place(const PlacementRequest& request, const std::vector<DeviceOffer>& offers,
                const std::optional<Speed>& speed) {
  Placement placement = place_by_memory(request, offers);
  if (!speed) return placement;
  place_for_speed(request, offers, *speed, placement);
  replicate(request, offers, *speed, placement);
  return placement;
}

std::span<const PlacedStage> Placement::replica(size_t index) const {
  const auto of_replica = [index](const PlacedStage& stage) { return stage.replica == index; };
  const auto first = std::find_if(stages.begin(), stages.end(), of_replica);
  return {first, std::find_if_not(first, stages.end(), of_replica)};
}

std::map<size_t, std::string> left_out(const PlacementRequest& request, const std::vector<DeviceOffer>& offers,
                                       const Placement& placement) {
  const SliceSizes sizes(request, placement.cache.n_blocks);
  uint64_t least = std::numeric_limits<uint64_t>::max();
  for (uint32_t i = 0; i < request.n_layer; ++i) least = std::min(least, sizes.need(i, i + 1).total());
  std::map<size_t, std::string> reasons;
  size_t backend = 0;
  for (size_t i = 0; i < offers.size(); ++i) {
    const std::optional<double> share =
        offers[i].local || request.tensor_split.empty() ? std::nullopt : std::optional(request.tensor_split[backend]);
    backend += !offers[i].local;
    const auto holds = [&](const PlacedStage& stage) { return stage.device == i; };
    if (std::any_of(placement.stages.begin(), placement.stages.end(), holds)) continue;
    if (offers[i].local)
      reasons[i] = "not needed: the backends hold all layers";
    else if (share)
      reasons[i] = "--tensor-split gives it nothing";
    else if (offers[i].memory_free < least)
      reasons[i] = fmt::format("{} are free, one layer with its cache and scratch takes {}",
                               format_bytes(offers[i].memory_free), format_bytes(least));
    else if (placement.prediction)
      reasons[i] = "it would slow things down";
    else
      reasons[i] = "the others hold all layers";
  }
  return reasons;
}

std::string_view input_name(InputPath input) {
  return input == InputPath::direct ? "direct" : input == InputPath::relayed ? "relayed" : "server";
}

std::string describe(const Placement& placement, const std::vector<DeviceOffer>& offers,
                     const std::map<size_t, std::string>& left_out) {
  std::string table = fmt::format("{:<28} {:>10} {:>8} {:>10} {:>10} {:>10} {:>10}", "device", "layers", "input",
                                  "weights", "KV cache", "scratch", "free");
  for (const PlacedStage& stage : placement.stages) {
    const DeviceOffer& offer = offers[stage.device];
    if (placement.n_replicas() > 1 && stage.slice.embeds) table += fmt::format("\nreplica {}", stage.replica + 1);
    table += fmt::format("\n{:<28} {:>10} {:>8} {:>10} {:>10} {:>10} {:>10}", offer.name,
                         fmt::format("{}-{}", stage.slice.layer_begin, stage.slice.layer_end - 1),
                         input_name(stage.input), format_bytes(stage.need.weights), format_bytes(stage.need.kv_cache),
                         format_bytes(stage.need.scratch), format_bytes(offer.memory_free));
  }
  for (const auto& [device, reason] : left_out)
    if (!offers[device].local) table += fmt::format("\n{:<28} left out: {}", offers[device].name, reason);
  if (const auto& p = placement.prediction)
    table += fmt::format("\npredicted: prompt {:.4g} tokens/s, generation {:.4g} tokens/s, {:.4g} with {} sequences",
                         p->prompt, p->generation, p->streams, placement.cache.max_slots);
  return table;
}

}  // namespace caravan::plan
