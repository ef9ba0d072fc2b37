#include "cluster/plan_loader.h"

#include <fmt/format.h>

#include <numeric>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "models/registry.h"
#include "remote/inlet.h"
#include "remote/remote_stage.h"
#include "stage/local_stage.h"
#include "weights/source.h"

namespace caravan::cluster {
namespace {

std::vector<remote::PeerAddress> addresses(const std::vector<Membership::Member>& members) {
  std::vector<remote::PeerAddress> addresses;
  for (const Membership::Member& member : members)
    if (const auto address = member.backend->peer_address())
      addresses.push_back({address->endpoint, address->backend_id});
  return addresses;
}

std::vector<engine::StageSummary> summarize(const Replica& replica, std::span<const plan::PlacedStage> stages) {
  std::vector<engine::StageSummary> summaries;
  for (size_t i = 0; i < stages.size(); ++i) {
    engine::StageSummary summary;
    summary.device = replica.parts[i].device;
    summary.layer_begin = stages[i].slice.layer_begin;
    summary.layer_end = stages[i].slice.layer_end;
    summary.embeds = stages[i].slice.embeds;
    summary.outputs = stages[i].slice.outputs;
    summary.weight_bytes = stages[i].need.weights;
    summary.kv_bytes = stages[i].need.kv_cache;
    summary.scratch_bytes = stages[i].need.scratch;
    summary.counters = replica.parts[i].counters;
    if (const auto* remote = dynamic_cast<const remote::RemoteStage*>(replica.parts[i].stage.get())) {
      const remote::WeightOrigins origins = remote->origins();
      summary.weights_from = {{"models-dir", origins.models_dir},
                              {"cache", origins.cache},
                              {"peer", origins.peers},
                              {"server", origins.server}};
    }
    summaries.push_back(std::move(summary));
  }
  return summaries;
}

}  // namespace

std::vector<Membership::Member> weight_givers(std::vector<Membership::Member> members,
                                              const Membership::Member& receiver,
                                              const std::set<std::string>& avoided) {
  std::erase_if(members, [&](const Membership::Member& member) {
    return member.connection == receiver.connection || member.leaving() || avoided.contains(member.name);
  });
  return members;
}

PlanLoader::PlanLoader(Planner::Subject subject, device::Device& device, PlanLoaderOptions options, MakeSink make_sink)
    : subject_(subject),
      device_(device),
      options_(std::move(options)),
      make_sink_(std::move(make_sink)),
      hashes_(subject.model, weights::HashMemory(options_.hash_folder)) {}

void PlanLoader::load(LoadTask& task, const Membership* membership) {
  const Planner::Candidate& candidate = task.candidate;
  const plan::Placement& placement = candidate.placement;
  task.kept.resize(placement.n_replicas());
  for (size_t r = 0; r < placement.n_replicas(); ++r)
    task.replicas.push_back(task.kept[r] == 0 ? make_replica(candidate, r) : nullptr);
  // All of the memory first: where some is refused, nothing was loaded in vain.
  std::vector<ReplicaPart*> parts;
  std::vector<stage::LoadRequest> requests;
  for (size_t r = 0; r < placement.n_replicas(); ++r)
    for (size_t i = 0; task.replicas[r] && i < task.replicas[r]->parts.size(); ++i) {
      const plan::PlacedStage& placed = placement.replica(r)[i];
      ReplicaPart& part = task.replicas[r]->parts[i];
      task.device = part.device;
      requests.push_back(load_request(placed, placement, task.device));
      part.stage->reserve(requests.back(), placed.need);
      if (auto* remote = dynamic_cast<remote::RemoteStage*>(part.stage.get()))
        remote->ask_others(addresses(weight_givers(membership->members(), part.member, candidate.avoided)));
      parts.push_back(&part);
    }
  if (!parts.empty()) load_stages(task, parts, std::move(requests));
  for (const auto& replica : task.replicas) {
    if (!replica) continue;
    open_stages(task, *replica);
    replica->summary = summarize(*replica, placement.replica(static_cast<size_t>(&replica - task.replicas.data())));
  }
}

// The stages of one of a candidate's replicas, not loaded yet.
std::unique_ptr<Replica> PlanLoader::make_replica(const Planner::Candidate& candidate, size_t index) {
  auto replica = std::make_unique<Replica>();
  const std::span<const plan::PlacedStage> stages = candidate.placement.replica(index);
  if (!candidate.placement.replica_speeds.empty()) replica->speed = candidate.placement.replica_speeds[index];
  for (size_t i = 0; i < stages.size(); ++i) {
    ReplicaPart part;
    part.device = candidate.offers[stages[i].device].name;
    part.slice = stages[i].slice;
    part.held_bytes = stages[i].need.total();
    part.predicted_per_row = stages[i].row_seconds;
    part.member = candidate.members[stages[i].device];
    part.sink = make_sink_(*replica, i);
    part.stage = part.member.backend ? part.member.backend->make_stage()
                                     : std::make_unique<stage::LocalStage>(device_, options_.poll);
    part.direct = dynamic_cast<stage::DirectStage*>(part.stage.get());
    part.hands_on = i + 1 < stages.size() && stages[i + 1].input == plan::InputPath::direct;
    replica->parts.push_back(std::move(part));
  }
  return replica;
}

weights::Manifest PlanLoader::manifest_of(const stage::Slice& slice, bool hashed) {
  const auto names = models::slice_tensor_names(subject_.arch, subject_.hp, slice, models::tensor_map(subject_.model));
  if (!hashed) return weights::make_manifest(subject_.model, names, weights::Hashing::none, nullptr, 1);
  const auto all = models::slice_tensor_names(subject_.arch, subject_.hp, models::whole_model(subject_.hp),
                                              models::tensor_map(subject_.model));
  if (const uint64_t unknown = hashes_.unknown_bytes(all); unknown > 0) {
    Progress progress("hashing " + subject_.model.path(), unknown);
    hashes_.compute(all, &progress, options_.n_hash_threads);
  }
  return hashes_.manifest(names);
}

stage::LoadRequest PlanLoader::load_request(const plan::PlacedStage& placed, const plan::Placement& placement,
                                            const std::string& name) {
  stage::LoadRequest request;
  request.hyperparameters = subject_.metadata;
  request.manifest = manifest_of(placed.slice, name != "local");
  request.slice = placed.slice;
  request.cache = placement.cache;
  return request;
}

// Hashes that turn out to be wrong are computed again, once for all stages that find out.
void PlanLoader::load_stage(stage::LoadRequest request, stage::Stage& stage,
                            const std::function<void(uint64_t)>& on_progress) {
  weights::ModelSource source(subject_.model);
  weights::WeightSource* const sources[] = {&source};
  try {
    stage.load(request, sources, on_progress);
  } catch (const weights::SourceError& error) {
    const Digest before = stage::content_key(request);
    {
      const std::lock_guard lock(rehash_mutex_);
      if (hashes_.recalled()) {
        // The file may have changed though its size and time have not.
        spdlog::warn("{}; the hashes that were remembered of {} are computed again", error.what(),
                     subject_.model.path());
        hashes_.forget();
      }
      request.manifest = manifest_of(request.slice, true);
    }
    if (stage::content_key(request) == before) throw;
    stage.load(request, sources, on_progress);
  }
}

// All stages at the same time: machines may have weights of their own, and each prepares what comes. One that fails
// ends the others' loading.
void PlanLoader::load_stages(LoadTask& task, const std::vector<ReplicaPart*>& parts,
                             std::vector<stage::LoadRequest> requests) {
  std::vector<uint64_t> done(requests.size());
  uint64_t total = 0;
  for (const stage::LoadRequest& request : requests) total += request.manifest.size_bytes();
  const bool alone = requests.size() == 1;
  Progress progress(alone ? fmt::format("loading layers 0-{} on {}", subject_.hp.n_layer - 1, parts.front()->device)
                          : fmt::format("loading {} layers on {} devices", subject_.hp.n_layer, requests.size()),
                    total);
  std::mutex mutex;
  std::exception_ptr failure;
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto on_progress = [&, i](uint64_t bytes) {
        const std::lock_guard lock(mutex);
        if (task.cancelled || failure) throw Error("loading was given up: the plan can no longer be used");
        done[i] = bytes;
        progress.update(std::accumulate(done.begin(), done.end(), uint64_t{0}));
      };
      threads.emplace_back([&, i, on_progress] {
        try {
          load_stage(std::move(requests[i]), *parts[i]->stage, on_progress);
        } catch (...) {
          const std::lock_guard lock(mutex);
          if (!failure) task.device = parts[i]->device;
          if (!failure) failure = std::current_exception();
        }
      });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// Opens the last stage first: one that connects to the next finds it waiting. Where that fails after all, the server
// relays.
void PlanLoader::open_stages(LoadTask& task, Replica& replica) {
  for (bool again = true; again;) {
    again = false;
    replica.epoch = ++epoch_;
    std::string next_key;  // of the route into the part after
    for (size_t i = replica.parts.size(); i-- > 0 && !again;) {
      ReplicaPart& part = replica.parts[i];
      task.device = part.device;
      stage::Routes routes;
      if (part.hands_on) {
        routes.output = replica.parts[i + 1].direct->address();
        routes.output->key = next_key;
      }
      if (i > 0 && replica.parts[i - 1].hands_on) routes.input_key = next_key = remote::make_route_key();
      if (!routes.input_key && !routes.output) {
        part.stage->open(options_.session, replica.epoch, *part.sink);
        continue;
      }
      try {
        part.direct->open(options_.session, replica.epoch, *part.sink, routes);
      } catch (const remote::StalledError&) {
        throw;  // the backend stands still, not its connection to the next
      } catch (const Error& error) {
        if (!part.hands_on) throw;
        spdlog::warn("activations from {} to {} are relayed by this server: {}", part.device,
                     replica.parts[i + 1].device, error.what());
        part.hands_on = false;
        again = true;
      }
    }
  }
}

}  // namespace caravan::cluster
