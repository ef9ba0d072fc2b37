#include "cluster/planner.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "base/log.h"
#include "stage/layer_sample.h"
#include "stage/loaded_slice.h"

namespace caravan::cluster {

namespace {

// How hidden rows come to each stage of a candidate; without hops all are relayed.
void set_inputs(Planner::Candidate& candidate, const HopTable& hops) {
  auto& stages = candidate.placement.stages;
  for (size_t i = 1; i < stages.size(); ++i) {
    const size_t from = stages[i - 1].device, to = stages[i].device;
    if (stages[i].slice.embeds || !candidate.members[from].backend || !candidate.members[to].backend) continue;
    const bool direct = !hops.empty() && hops[from][to].rtt;
    stages[i].input = direct ? plan::InputPath::direct : plan::InputPath::relayed;
    if (!direct && !hops.empty()) candidate.relayed[i] = hops[from][to].why_not;
  }
}

// What the cost model is told of them.
std::vector<std::vector<std::optional<double>>> one_way_seconds(const HopTable& hops, size_t n_members) {
  std::vector<std::vector<std::optional<double>>> seconds(n_members, std::vector<std::optional<double>>(n_members));
  for (size_t i = 0; i < hops.size(); ++i)
    for (size_t j = 0; j < hops[i].size(); ++j)
      if (hops[i][j].rtt) seconds[i][j] = std::chrono::duration<double>(*hops[i][j].rtt).count() / 2;
  return seconds;
}

}  // namespace

Planner::Planner(Subject subject, device::Device& device, PlannerOptions options, Machines machines)
    : subject_(subject),
      device_(device),
      options_(std::move(options)),
      machines_(machines),
      work_(models::model_work(subject.arch, subject.hp, models::tensor_map(subject.model))),
      layer_kinds_(models::layer_kinds(subject.arch, subject.hp, models::tensor_map(subject.model))) {}

std::string Planner::Candidate::why_broken() const {
  for (const plan::PlacedStage& placed : placement.stages) {
    std::string reason = members[placed.device].why_lost();
    if (!reason.empty()) return reason;
  }
  return "";
}

plan::PlacementRequest Planner::placement_request() const {
  plan::PlacementRequest request;
  request.n_layer = subject_.hp.n_layer;
  request.n_ctx_train = subject_.hp.n_ctx_train;
  request.cache = options_.cache;
  const auto groups = subject_.arch.cache_groups(subject_.hp);
  stage::CacheConfig one_block = options_.cache;
  one_block.n_blocks.clear();
  for (const auto& group : groups) {
    const bool cached = group.kind != models::CacheGroup::Kind::none;
    one_block.n_blocks.push_back(cached ? 1 : 0);
    plan::PlacementRequest::Group g;
    for (const auto& layer : group.layers) g.layers.push_back(layer.layer);
    if (cached) g.window = group.window;
    request.groups.push_back(std::move(g));
  }
  request.needs =
      stage::layer_needs(subject_.arch, subject_.hp, models::tensor_map(subject_.model), one_block, device_);
  request.n_ctx = options_.n_ctx;
  request.n_gpu_layers = options_.n_gpu_layers;
  request.tensor_split = options_.tensor_split;
  return request;
}

bool Planner::is_avoided(const Situation& situation, const Membership::Member& member, Choice choice) {
  if (member.leaving()) return true;
  if (choice == Choice::anybody) return false;
  if (situation.avoided.contains(member.name)) return true;
  return choice == Choice::reliable && !situation.numeric_class.empty() &&
         member.backend->numeric_class() != situation.numeric_class;
}

Planner::Candidate Planner::choose_from(const Situation& situation, Choice choice) {
  Candidate candidate;
  candidate.avoided = situation.avoided;
  if (options_.local_memory > 0 || machines_ == Machines::local_only) {
    candidate.offers.push_back({"local", options_.local_memory, true});
    candidate.members.emplace_back();
  }
  std::map<size_t, size_t> n_of_name;
  for (const Membership::Member& member : situation.members) ++n_of_name[member.configured];
  auto request = placement_request();
  std::vector<double> shares;
  for (const Membership::Member& member : situation.members) {
    if (is_avoided(situation, member, choice)) continue;
    if (!request.tensor_split.empty()) {
      const double share = request.tensor_split[member.configured];
      if (share == 0) continue;  // the user gives it nothing, whoever else is missing
      shares.push_back(share / static_cast<double>(n_of_name[member.configured]));
    }
    candidate.offers.push_back({member.name, member.backend->memory_free(), false});
    candidate.members.push_back(member);
  }
  for (const Situation::Held& held : situation.held)
    for (size_t i = 0; i < candidate.members.size(); ++i)
      if (candidate.members[i].connection == held.connection) candidate.offers[i].memory_free += held.bytes;
  request.tensor_split = shares;  // those of the connected ones
  if (candidate.offers.empty())
    throw ResourceError(request.tensor_split.empty() && options_.tensor_split.empty()
                            ? "no backend is there"
                            : "no backend is there to which --tensor-split gives layers");
  const HopTable hops = situation.relays ? HopTable() : hops_.look(candidate.members);
  place(request, candidate, hops);
  const size_t n_in_use = situation.epochs.size();
  if (n_in_use > 0 && request.n_ctx == 0 && std::max(n_in_use, candidate.placement.n_replicas()) > 1) {
    // With the context of those in use they can go on.
    request.n_ctx = situation.n_ctx;
    Candidate same = candidate;
    try {
      place(request, same, hops);
      if (same.placement.n_replicas() >= candidate.placement.n_replicas()) candidate = std::move(same);
    } catch (const ResourceError&) {
      // That context has no room any more.
    }
  }
  set_inputs(candidate, hops);
  candidate.left_out = plan::left_out(request, candidate.offers, candidate.placement);
  return candidate;
}

// By memory; and then by speed, where that is wanted and the speeds of all are known.
void Planner::place(const plan::PlacementRequest& request, Candidate& candidate, const HopTable& hops) {
  candidate.placement = plan::place(request, candidate.offers);
  if (machines_ == Machines::local_only) return;
  const bool uses_local = std::any_of(candidate.placement.stages.begin(), candidate.placement.stages.end(),
                                      [&](const auto& placed) { return candidate.offers[placed.device].local; });
  plan::CostModel::Input input;
  for (const Membership::Member& member : candidate.members) {
    const Backend::Speeds* speeds = member.backend ? member.backend->speeds() : nullptr;
    if (member.backend && speeds == nullptr) return;
    const bool measured = speeds != nullptr || uses_local;
    input.devices.push_back(speeds != nullptr ? speeds->device : measured ? local_profile() : stage::DeviceProfile());
    input.links.push_back(speeds != nullptr ? speeds->link : stage::LinkProfile());
  }
  input.work = work_;
  input.layer_kinds = layer_kinds_;
  for (const uint64_t bytes : request.needs.layer_kv_cache)
    input.layer_kv_bytes.push_back(static_cast<double>(bytes) / request.cache.block_tokens);
  input.n_embd = subject_.hp.n_embd;
  input.n_slots = request.cache.max_slots;
  input.hops = one_way_seconds(hops, candidate.members.size());
  const plan::CostModel model(std::move(input));
  candidate.placement = plan::place(request, candidate.offers, plan::Speed{model, options_.goal});
  for (plan::PlacedStage& placed : candidate.placement.stages)
    placed.row_seconds = model.stage_seconds({placed.device, placed.slice.layer_begin, placed.slice.layer_end}, 1, 1);
}

// Measured when layers first come to this machine.
const stage::DeviceProfile& Planner::local_profile() {
  if (local_profile_.matrices.empty()) {
    const stage::SpeedQuestions questions = stage::speed_questions(subject_.model, subject_.metadata, options_.cache);
    try {
      for (const auto& [kind, sample] : questions.layers)
        local_profile_.layers[kind] = stage::measure_layer(device_, sample, options_.local_memory);
    } catch (const ResourceError& error) {
      spdlog::info("{}; it is estimated from products of matrices", error.what());
    }
    stage::measure_profile(device_, questions.all_types, options_.local_memory, local_profile_);
  }
  return local_profile_;
}

Planner::Candidate Planner::choose(const Situation& situation, Choice last) {
  if (situation.hops_failed) hops_.doubt();
  for (const Choice choice : {Choice::reliable, Choice::any_class}) {
    if (choice == last) break;
    try {
      return choose_from(situation, choice);
    } catch (const ResourceError&) {
      // With everybody, perhaps; what is thrown there is for people.
    }
  }
  return choose_from(situation, last);
}

}  // namespace caravan::cluster
