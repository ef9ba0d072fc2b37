#include "cluster/cluster_pipeline.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <future>
#include <numeric>
#include <random>

#include "base/log.h"
#include "base/progress.h"
#include "models/registry.h"
#include "remote/inlet.h"
#include "remote/remote_stage.h"
#include "stage/layer_sample.h"
#include "stage/local_stage.h"
#include "weights/source.h"

namespace caravan::cluster {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kStillWaitingInterval = std::chrono::seconds(10);
// How long others are waited for after the first one that came late.
constexpr auto kTogether = std::chrono::seconds(5);
// How often tickets are looked at that take too long.
constexpr auto kLookInterval = std::chrono::seconds(1);
// A device that failed is left out of plans for so long, and longer each time.
constexpr auto kFirstAvoidance = std::chrono::seconds(5);
constexpr auto kLongestAvoidance = std::chrono::seconds(120);
// Reservations that are refused one after the other before a pause: another server took the memory meanwhile.
constexpr uint32_t kRefusalsAtOnce = 3;
constexpr uint32_t kRefusalsAtStart = 20;
constexpr int kOverdueFactor = 10;
// A backend says what its stages have, as with any heartbeat.
constexpr auto kQueueTimeout = std::chrono::milliseconds(500);

uint64_t random_session() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

engine::GroupLimits group_limits(const models::CacheGroup& group, uint32_t n_blocks) {
  engine::GroupLimits limits;
  switch (group.kind) {
    case models::CacheGroup::Kind::full:
      limits.kind = engine::GroupLimits::Kind::full;
      break;
    case models::CacheGroup::Kind::window:
      limits.kind = engine::GroupLimits::Kind::window;
      break;
    case models::CacheGroup::Kind::none:
      limits.kind = engine::GroupLimits::Kind::none;
      break;
  }
  limits.window = group.window;
  limits.n_blocks = n_blocks;
  return limits;
}

// Adds a step to a running mean, of which recent steps are the larger part.
void note_speed(double& seconds_per_row, double seconds, uint32_t n_rows) {
  constexpr double kWeight = 0.1;
  if (n_rows == 0) return;
  const double now = seconds / n_rows;
  seconds_per_row = seconds_per_row == 0 ? now : (1 - kWeight) * seconds_per_row + kWeight * now;
}

// Up to longest, so that servers that were refused together do not come back together.
std::chrono::milliseconds random_part(std::chrono::milliseconds longest) {
  static thread_local std::minstd_rand random(std::random_device{}());
  return std::chrono::milliseconds(std::uniform_int_distribution<int64_t>(0, longest.count())(random));
}

}  // namespace

// Where a plan would put the model.
struct ClusterPipeline::Candidate {
  plan::Placement placement;
  std::vector<plan::DeviceOffer> offers;
  std::vector<Membership::Member> members;  // parallel to offers; without a backend: this machine
  std::map<size_t, std::string> left_out;   // why offers are not used

  // Why it cannot be used any more; empty: it can.
  std::string why_broken() const {
    for (const plan::PlacedStage& placed : placement.stages) {
      std::string reason = members[placed.device].why_lost();
      if (!reason.empty()) return reason;
    }
    return "";
  }
};

// A plan that is being loaded by a thread of its own.
struct ClusterPipeline::Loading {
  Candidate candidate;
  std::atomic<bool> cancelled{false};
  std::atomic<bool> done{false};
  // Set when done.
  std::unique_ptr<ActivePlan> plan;
  std::exception_ptr error;
  std::string device;  // that was being loaded
  std::thread thread;
};

// The stages in use and the batches under way. Stages are destroyed first to last: one that still delivers finds the
// next alive.
struct ClusterPipeline::ActivePlan {
  struct Part {
    std::string device;
    stage::Slice slice;
    uint64_t held_bytes = 0;    // on the device
    Membership::Member member;  // keeps the connection
    std::unique_ptr<Hop> hop;
    std::unique_ptr<stage::Stage> stage;
    stage::DirectStage* direct = nullptr;  // the stage, if it is on a backend
    bool hands_on = false;                 // its hidden rows go straight to the next part's backend
    double seconds_per_row = 0;            // under mutex; running mean; 0: nothing was computed yet
    std::shared_ptr<engine::StageCounters> counters = std::make_shared<engine::StageCounters>();
  };
  // A batch under way.
  struct Flight {
    std::shared_ptr<const stage::Batch> batch;
    size_t stage = 0;  // that computes it, or hands it on to who does
    Clock::time_point since;
    std::vector<double> stage_seconds;  // of each part, as far as they are done
  };
  ~ActivePlan() {
    for (Part& part : parts) part.stage.reset();
  }

  // The part whose output comes to us when a step is started at this one.
  size_t end_of_row(size_t part) const {
    while (parts[part].hands_on) ++part;
    return part;
  }

  uint64_t epoch = 0;
  engine::PlanSummary summary;
  std::optional<plan::Prediction> prediction;
  std::vector<Part> parts;
  std::mutex mutex;
  std::map<uint64_t, Flight> in_flight;  // under mutex; by ticket
  bool retired = false;                  // under events_mutex_: its results no longer count
};

// Takes the outputs of one stage of a plan and passes them on.
class ClusterPipeline::Hop : public stage::OutputSink {
 public:
  Hop(ClusterPipeline& pipeline, ActivePlan& plan, size_t stage) : pipeline_(pipeline), plan_(plan), stage_(stage) {}
  void deliver(stage::StageOutput output) noexcept override {
    pipeline_.stage_delivered(plan_, stage_, std::move(output));
  }

 private:
  ClusterPipeline& pipeline_;
  ActivePlan& plan_;
  const size_t stage_;
};

ClusterPipeline::ClusterPipeline(const gguf::Model& model, device::Device& device, BackendConnector* connector,
                                 ClusterOptions options)
    : model_(model),
      device_(device),
      connector_(connector),
      options_(std::move(options)),
      arch_(models::find_arch(model.metadata())),
      hyperparameter_metadata_(models::hyperparameter_metadata(model.metadata(), options_.n_ctx)),
      hp_(arch_.read(hyperparameter_metadata_)),
      work_(models::model_work(arch_, hp_, models::tensor_map(model))),
      layer_kinds_(models::layer_kinds(arch_, hp_, models::tensor_map(model))),
      session_(random_session()),
      hashes_(model, weights::HashMemory(options_.hash_folder)) {
  CARAVAN_ASSERT(connector_ != nullptr || options_.backends.empty(), "backends need a connector");
  // Before anything is waited for, and while all backends count: later only those that are there do.
  if (!options_.tensor_split.empty() && options_.tensor_split.size() != options_.backends.size())
    throw RequestError(fmt::format("--tensor-split has {} shares for {} backends; give one number for each",
                                   options_.tensor_split.size(), options_.backends.size()));
  models::check_model(arch_, hp_, models::tensor_map(model));
}

ClusterPipeline::~ClusterPipeline() {
  stopping_.store(true);
  watch_->signal();
  if (watcher_.joinable()) watcher_.join();
  active_.reset();
  membership_.reset();
}

void ClusterPipeline::start() {
  const auto deadline = Clock::now() + options_.rpc_wait;
  if (!options_.backends.empty()) wait_for_backends(deadline);
  make_first_plan();
  if (membership_) watcher_ = std::thread([this] { watch(); });
}

// Until all have come, or the deadline has passed and somebody has.
void ClusterPipeline::wait_for_backends(Clock::time_point deadline) {
  spdlog::info("waiting up to {} s for backends {}", options_.rpc_wait.count(), fmt::join(options_.backends, ", "));
  MembershipOptions membership;
  membership.names = options_.backends;
  membership.retry_interval = options_.retry_interval;
  auto members = std::make_unique<Membership>(*connector_, membership, [watch = watch_] { watch->signal(); });
  {
    const std::lock_guard lock(plan_mutex_);
    membership_ = std::move(members);
  }
  bool late = false;
  while (!stopping() && !membership_->complete()) {
    // One that refuses us for good is a mistake that waiting would hide.
    if (const std::exception_ptr refusal = membership_->refusal()) std::rethrow_exception(refusal);
    if (Clock::now() >= deadline && membership_->tried()) {
      const bool nobody = membership_->missing().size() == options_.backends.size();
      if (!nobody && std::exchange(late, false)) {  // those that come together should find one plan
        deadline = Clock::now() + std::min(options_.rpc_wait, kTogether);
        continue;
      }
      if (!nobody || !options_.waits_on) break;
      late = true;
      keep_waiting(fmt::format("no backend answered within {} s", options_.rpc_wait.count()));
    }
    std::unique_lock lock(watch_->mutex);
    watch_->changed.wait_until(lock, std::max(deadline, Clock::now() + options_.retry_interval),
                               [this] { return stopping() || watch_->signalled; });
    watch_->signalled = false;
  }
  const std::vector<std::string> missing = membership_->missing();
  if (missing.empty()) return;
  if (missing.size() == options_.backends.size())
    throw Error(fmt::format("no backend answered within {} s:{}", options_.rpc_wait.count(), membership_->reasons()));
  spdlog::warn("backends that did not answer within {} s:{}\ngoing on without them if the model fits",
               options_.rpc_wait.count(), membership_->reasons());
}

// Plans again when a backend is lost meanwhile, or another server takes the memory.
void ClusterPipeline::make_first_plan() {
  while (!stopping()) {
    Loading loading;
    try {
      if (membership_) considered_ = membership_->generation();
      loading.candidate = choose();
      load_plan(loading);
      activate(std::move(loading.plan));
      return;
    } catch (const ResourceError& error) {
      const bool refused = !loading.device.empty() && ++n_refused_ < kRefusalsAtStart;
      if (!refused) {
        const auto absent = membership_ ? membership_->missing() : std::vector<std::string>();
        if (absent.empty()) throw;
        const auto why = fmt::format("without the missing backends {}: {}", fmt::join(absent, ", "), error.what());
        if (!options_.waits_on) throw ResourceError(why);
        keep_waiting(why);
      } else {
        spdlog::warn("{}; planning again", error.what());
      }
    } catch (const Error& error) {
      if (loading.candidate.why_broken().empty()) throw;
      spdlog::warn("{}; planning again", error.what());
    }
    // What was lost may come back at once, and is worth a moment.
    std::unique_lock lock(watch_->mutex);
    watch_->changed.wait_for(lock, options_.retry_interval + random_part(options_.retry_interval),
                             [this] { return stopping(); });
  }
}

// Says now and then for whom the first plan waits, and what people can do.
void ClusterPipeline::keep_waiting(const std::string& why) {
  if (const std::exception_ptr refusal = membership_->refusal()) std::rethrow_exception(refusal);
  if (Clock::now() < next_log_) return;
  spdlog::warn(
      "{}\nwaiting on for {}:{}\nStart them, or mend the names: each must resolve and be reached from here. `caravan "
      "doctor --rpc {}` looks for the cause; with --rpc-exit the server ends instead of waiting.",
      why, fmt::join(membership_->missing(), ", "), membership_->reasons(), fmt::join(options_.backends, ","));
  next_log_ = Clock::now() + kStillWaitingInterval;
}

plan::PlacementRequest ClusterPipeline::placement_request() const {
  plan::PlacementRequest request;
  request.n_layer = hp_.n_layer;
  request.n_ctx_train = hp_.n_ctx_train;
  request.cache = options_.cache;
  const auto groups = arch_.cache_groups(hp_);
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
  request.needs = stage::layer_needs(arch_, hp_, models::tensor_map(model_), one_block, device_);
  request.n_ctx = options_.n_ctx;
  request.n_gpu_layers = options_.n_gpu_layers;
  request.tensor_split = options_.tensor_split;
  return request;
}

weights::Manifest ClusterPipeline::manifest_of(const stage::Slice& slice, bool hashed) {
  const auto names = models::slice_tensor_names(arch_, hp_, slice, models::tensor_map(model_));
  if (!hashed) return weights::make_manifest(model_, names, weights::Hashing::none, nullptr, 1);
  const auto all = models::slice_tensor_names(arch_, hp_, models::whole_model(hp_), models::tensor_map(model_));
  if (const uint64_t unknown = hashes_.unknown_bytes(all); unknown > 0) {
    Progress progress("hashing " + model_.path(), unknown);
    hashes_.compute(all, &progress, options_.n_hash_threads);
  }
  return hashes_.manifest(names);
}

stage::LoadRequest ClusterPipeline::load_request(const plan::PlacedStage& placed, const plan::Placement& placement,
                                                 const std::string& name) {
  stage::LoadRequest request;
  request.hyperparameters = hyperparameter_metadata_;
  request.manifest = manifest_of(placed.slice, name != "local");
  request.slice = placed.slice;
  request.cache = placement.cache;
  return request;
}

// Hashes that turn out to be wrong are computed again, once for all stages that find out.
void ClusterPipeline::load_stage(stage::LoadRequest request, stage::Stage& stage,
                                 const std::function<void(uint64_t)>& on_progress) {
  weights::ModelSource source(model_);
  weights::WeightSource* const sources[] = {&source};
  try {
    stage.load(request, sources, on_progress);
  } catch (const weights::SourceError& error) {
    const Digest before = stage::content_key(request);
    {
      const std::lock_guard lock(rehash_mutex_);
      if (hashes_.recalled()) {
        // The file may have changed though its size and time have not.
        spdlog::warn("{}; the hashes that were remembered of {} are computed again", error.what(), model_.path());
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
void ClusterPipeline::load_stages(Loading& loading, ActivePlan& plan, std::vector<stage::LoadRequest> requests) {
  std::vector<uint64_t> done(requests.size());
  uint64_t total = 0;
  for (const stage::LoadRequest& request : requests) total += request.manifest.size_bytes();
  const bool alone = requests.size() == 1;
  Progress progress(alone ? fmt::format("loading layers 0-{} on {}", hp_.n_layer - 1, plan.parts.front().device)
                          : fmt::format("loading {} layers on {} devices", hp_.n_layer, requests.size()),
                    total);
  std::mutex mutex;
  std::exception_ptr failure;
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto on_progress = [&, i](uint64_t bytes) {
        const std::lock_guard lock(mutex);
        if (loading.cancelled || failure) throw Error("loading was given up: the plan can no longer be used");
        done[i] = bytes;
        progress.update(std::accumulate(done.begin(), done.end(), uint64_t{0}));
      };
      threads.emplace_back([&, i, on_progress] {
        try {
          load_stage(std::move(requests[i]), *plan.parts[i].stage, on_progress);
        } catch (...) {
          const std::lock_guard lock(mutex);
          if (!failure) loading.device = plan.parts[i].device;
          if (!failure) failure = std::current_exception();
        }
      });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

bool ClusterPipeline::is_avoided(const Membership::Member& member, Choice choice) const {
  if (member.leaving()) return true;
  if (choice == Choice::anybody) return false;
  const auto avoided = avoided_.find(member.name);
  if (avoided != avoided_.end() && Clock::now() < avoided->second.until) return true;
  return choice == Choice::reliable && !numeric_class_.empty() && member.backend->numeric_class() != numeric_class_;
}

// Places the model on those who are there; what the plan in use holds counts as free.
ClusterPipeline::Candidate ClusterPipeline::choose(Choice choice) const {
  Candidate candidate;
  if (options_.local_memory > 0 || !membership_) {
    candidate.offers.push_back({"local", options_.local_memory, true});
    candidate.members.emplace_back();
  }
  const std::vector<Membership::Member> members =
      membership_ ? membership_->members() : std::vector<Membership::Member>();
  std::map<size_t, size_t> n_of_name;
  for (const Membership::Member& member : members) ++n_of_name[member.configured];
  auto request = placement_request();
  std::vector<double> shares;
  for (const Membership::Member& member : members) {
    if (is_avoided(member, choice)) continue;
    if (!request.tensor_split.empty()) {
      const double share = request.tensor_split[member.configured];
      if (share == 0) continue;  // the user gives it nothing, whoever else is missing
      shares.push_back(share / static_cast<double>(n_of_name[member.configured]));
    }
    candidate.offers.push_back({member.name, member.backend->memory_free(), false});
    candidate.members.push_back(member);
  }
  if (active_) {
    for (const ActivePlan::Part& part : active_->parts) {
      for (size_t i = 0; i < candidate.members.size(); ++i) {
        if (candidate.members[i].connection == part.member.connection && part.member.backend)
          candidate.offers[i].memory_free += part.held_bytes;
      }
    }
  }
  request.tensor_split = shares;  // those of the connected ones
  if (candidate.offers.empty())
    throw ResourceError(request.tensor_split.empty() && options_.tensor_split.empty()
                            ? "no backend is there"
                            : "no backend is there to which --tensor-split gives layers");
  place(request, candidate);
  candidate.left_out = plan::left_out(request, candidate.offers, candidate.placement);
  return candidate;
}

// By memory; and then by speed, where that is wanted and the speeds of all are known.
void ClusterPipeline::place(const plan::PlacementRequest& request, Candidate& candidate) const {
  candidate.placement = plan::place(request, candidate.offers);
  if (!membership_) return;
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
  input.n_embd = hp_.n_embd;
  input.n_slots = request.cache.max_slots;
  const plan::CostModel model(std::move(input));
  candidate.placement = plan::place(request, candidate.offers, plan::Speed{model, options_.goal});
}

// Measured when layers first come to this machine.
const stage::DeviceProfile& ClusterPipeline::local_profile() const {
  if (local_profile_.matrices.empty()) {
    const stage::SpeedQuestions questions = stage::speed_questions(model_, hyperparameter_metadata_, options_.cache);
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

ClusterPipeline::Proposal ClusterPipeline::propose() {
  const auto deadline = Clock::now() + options_.rpc_wait;
  if (!options_.backends.empty()) wait_for_backends(deadline);
  Candidate candidate = choose();
  probe_hops(candidate);
  Proposal proposal;
  for (const Membership::Member& member : candidate.members) {
    const Backend::Speeds* speeds = member.backend ? member.backend->speeds() : nullptr;
    proposal.speeds.push_back(speeds != nullptr ? std::optional(*speeds) : std::nullopt);
  }
  proposal.placement = std::move(candidate.placement);
  proposal.offers = std::move(candidate.offers);
  proposal.left_out = std::move(candidate.left_out);
  if (membership_) proposal.missing = membership_->missing();
  return proposal;
}

std::optional<plan::Prediction> ClusterPipeline::prediction() const {
  const std::lock_guard lock(plan_mutex_);
  return active_ ? active_->prediction : std::nullopt;
}

// On the best that the model fits.
ClusterPipeline::Candidate ClusterPipeline::choose() const {
  for (const Choice choice : {Choice::reliable, Choice::any_class}) {
    try {
      return choose(choice);
    } catch (const ResourceError&) {
      // With everybody, perhaps; what is thrown there is for people.
    }
  }
  return choose(Choice::anybody);
}

// Finds out which backends reach the next stage's: those hand hidden rows on by themselves.
void ClusterPipeline::probe_hops(Candidate& candidate) const {
  plan::Placement& placement = candidate.placement;
  struct Probe {
    size_t stage;
    std::future<std::chrono::microseconds> rtt;
  };
  std::vector<Probe> probes;
  const auto backend_of = [&](size_t stage) -> const Backend* {
    return candidate.members[placement.stages[stage].device].backend.get();
  };
  const bool relay = options_.relay || Clock::now() < relay_until_.load();
  for (size_t i = 1; i < placement.stages.size(); ++i) {
    const Backend* from = backend_of(i - 1);
    const Backend* to = backend_of(i);
    if (from == nullptr || to == nullptr || from == to) continue;
    placement.stages[i].input = plan::InputPath::relayed;
    const auto address = to->peer_address();
    if (relay || !address) continue;
    probes.push_back({i, std::async(std::launch::async, [from, address] { return from->probe(*address); })});
  }
  for (Probe& probe : probes) {
    try {
      const std::chrono::duration<double, std::milli> rtt = probe.rtt.get();
      placement.stages[probe.stage].input = plan::InputPath::direct;
      spdlog::debug("{} reaches {}: {:.2f} ms", backend_of(probe.stage - 1)->name(), backend_of(probe.stage)->name(),
                    rtt.count());
    } catch (const Error& error) {
      spdlog::warn("activations from {} to {} are relayed by this server: {}", backend_of(probe.stage - 1)->name(),
                   backend_of(probe.stage)->name(), error.what());
    }
  }
}

// Opens the last stage first: one that connects to the next finds it waiting. Where that fails after all, the server
// relays.
void ClusterPipeline::open_stages(ActivePlan& plan) {
  for (bool again = true; again;) {
    again = false;
    plan.epoch = ++epoch_;
    std::string next_key;  // of the route into the part after
    for (size_t i = plan.parts.size(); i-- > 0 && !again;) {
      ActivePlan::Part& part = plan.parts[i];
      stage::Routes routes;
      if (part.hands_on) {
        routes.output = plan.parts[i + 1].direct->address();
        routes.output->key = next_key;
      }
      if (i > 0 && plan.parts[i - 1].hands_on) routes.input_key = next_key = remote::make_route_key();
      if (!routes.input_key && !routes.output) {
        part.stage->open(session_, plan.epoch, *part.hop);
        continue;
      }
      try {
        part.direct->open(session_, plan.epoch, *part.hop, routes);
      } catch (const Error& error) {
        if (!part.hands_on) throw;
        spdlog::warn("activations from {} to {} are relayed by this server: {}", part.device, plan.parts[i + 1].device,
                     error.what());
        part.hands_on = false;
        again = true;
      }
    }
  }
}

// Loads and opens a candidate's stages: loading.plan.
void ClusterPipeline::load_plan(Loading& loading) {
  Candidate& candidate = loading.candidate;
  const plan::Placement& placement = candidate.placement;
  probe_hops(candidate);
  spdlog::info("plan:\n{}", plan::describe(placement, candidate.offers, candidate.left_out));
  auto next = std::make_unique<ActivePlan>();
  for (size_t i = 0; i < placement.stages.size(); ++i) {
    const plan::PlacedStage& placed = placement.stages[i];
    ActivePlan::Part part;
    part.device = candidate.offers[placed.device].name;
    part.slice = placed.slice;
    part.held_bytes = placed.need.total();
    part.member = candidate.members[placed.device];
    part.hop = std::make_unique<Hop>(*this, *next, i);
    part.stage = part.member.backend ? part.member.backend->make_stage() : std::make_unique<stage::LocalStage>(device_);
    part.direct = dynamic_cast<stage::DirectStage*>(part.stage.get());
    part.hands_on = i + 1 < placement.stages.size() && placement.stages[i + 1].input == plan::InputPath::direct;
    next->parts.push_back(std::move(part));
  }
  // All of the memory first: where some is refused, nothing was loaded in vain.
  std::vector<stage::LoadRequest> requests;
  for (size_t i = 0; i < placement.stages.size(); ++i) {
    const plan::PlacedStage& placed = placement.stages[i];
    loading.device = next->parts[i].device;
    requests.push_back(load_request(placed, placement, loading.device));
    next->parts[i].stage->reserve(requests.back(), placed.need);
    if (auto* remote = dynamic_cast<remote::RemoteStage*>(next->parts[i].stage.get()))
      remote->ask_others(backends_beside(next->parts[i].member));
  }
  load_stages(loading, *next, std::move(requests));
  open_stages(*next);
  next->summary = summarize(*next, candidate);
  next->prediction = placement.prediction;
  loading.plan = std::move(next);
}

// Those that may have weights which this one is to load.
std::vector<remote::PeerAddress> ClusterPipeline::backends_beside(const Membership::Member& member) const {
  std::vector<remote::PeerAddress> others;
  for (const Membership::Member& other : membership_->members()) {
    if (other.connection == member.connection || other.leaving()) continue;
    if (const auto address = other.backend->peer_address()) others.push_back({address->endpoint, address->backend_id});
  }
  return others;
}

engine::PlanSummary ClusterPipeline::summarize(const ActivePlan& plan, const Candidate& candidate) const {
  const plan::Placement& placement = candidate.placement;
  engine::PlanSummary summary;
  for (size_t i = 0; i < placement.stages.size(); ++i) {
    const plan::PlacedStage& placed = placement.stages[i];
    summary.stages.push_back({candidate.offers[placed.device].name, placed.slice.layer_begin, placed.slice.layer_end,
                              placed.slice.embeds, placed.slice.outputs, placed.need.weights, placed.need.kv_cache,
                              placed.need.scratch});
    summary.stages.back().counters = plan.parts[i].counters;
    if (const auto* remote = dynamic_cast<const remote::RemoteStage*>(plan.parts[i].stage.get())) {
      const remote::WeightOrigins origins = remote->origins();
      summary.stages.back().weights_from = {{"models-dir", origins.models_dir},
                                            {"cache", origins.cache},
                                            {"peer", origins.peers},
                                            {"server", origins.server}};
    }
  }
  summary.epoch = plan.epoch;
  summary.n_ctx = hp_.n_positions > 0 ? std::min(placement.n_ctx, hp_.n_positions) : placement.n_ctx;
  summary.n_embd = hp_.n_embd;
  summary.n_vocab = hp_.n_vocab;
  summary.block_tokens = placement.cache.block_tokens;
  summary.max_rows = placement.cache.max_rows;
  summary.max_outputs = placement.cache.max_outputs;
  summary.max_slots = placement.cache.max_slots;
  const auto groups = arch_.cache_groups(hp_);
  for (size_t g = 0; g < groups.size(); ++g)
    summary.groups.push_back(group_limits(groups[g], placement.cache.n_blocks[g]));
  summary.numeric_class = plan.parts.front().stage->numeric_class();
  return summary;
}

// Makes a loaded plan the one in use; what was in flight in the one before is lost.
void ClusterPipeline::activate(std::unique_ptr<ActivePlan> next) {
  const engine::PlanSummary& summary = next->summary;
  std::string numeric_class = summary.numeric_class;
  for (const auto& part : next->parts) {
    if (part.stage->numeric_class() == summary.numeric_class) continue;
    spdlog::warn("{} computes in class {}, the first stage in {}: results depend on where layers are", part.device,
                 part.stage->numeric_class(), summary.numeric_class);
    numeric_class.clear();
  }
  if (!numeric_class_.empty() && numeric_class != numeric_class_)
    spdlog::warn("the new plan computes in another numeric class than {}: answers in progress may go on differently",
                 numeric_class_);
  numeric_class_ = numeric_class;
  spdlog::info("ready: {} layers on {} device(s), context {} tokens, {} sequences at a time", hp_.n_layer,
               next->parts.size(), summary.n_ctx, summary.max_slots);
  if (lost_since_)
    spdlog::info("recovered in {:.2f} s", std::chrono::duration<double>(Clock::now() - *lost_since_).count());
  lost_since_.reset();
  if (const auto absent = membership_ ? membership_->missing() : std::vector<std::string>(); !absent.empty())
    spdlog::warn("serving without {}", fmt::join(absent, ", "));
  std::unique_ptr<ActivePlan> before;
  {
    const std::scoped_lock lock(plan_mutex_, events_mutex_);
    before = std::exchange(active_, std::move(next));
    if (before) before->retired = true;
    events_.emplace_back(engine::PlanReady{active_->summary});
    events_changed_.notify_one();
  }
}

uint64_t ClusterPipeline::submit(stage::Batch batch) {
  const uint64_t ticket = next_ticket_.fetch_add(1);
  const std::lock_guard lock(plan_mutex_);
  // PlanLost is in the queue already, perhaps the next PlanReady too: the ticket is lost with the plan it was made for.
  if (!active_ || active_->epoch != polled_epoch_) return ticket;
  auto shared = std::make_shared<const stage::Batch>(std::move(batch));
  {
    const std::lock_guard in_flight_lock(active_->mutex);
    active_->in_flight[ticket] = {shared, 0, Clock::now(), std::vector<double>(active_->parts.size())};
  }
  start_step(*active_, 0, ticket, std::move(shared), {});
  return ticket;
}

// Starts a step at a stage; what it hands on comes back from the last stage of the row.
void ClusterPipeline::start_step(ActivePlan& plan, size_t stage, uint64_t ticket,
                                 std::shared_ptr<const stage::Batch> batch, std::vector<float> input) {
  const stage::Fence fence{session_, plan.epoch, ticket};
  const size_t last = plan.end_of_row(stage);
  if (last != stage) plan.parts[last].direct->expect(fence, batch);
  plan.parts[stage].stage->enqueue(fence, std::move(batch), std::move(input));
}

void ClusterPipeline::stage_delivered(ActivePlan& plan, size_t stage, stage::StageOutput output) noexcept {
  const uint64_t ticket = output.fence.ticket;
  const bool last = stage + 1 == plan.parts.size();
  if (output.stage_lost) return watch_->report({plan.epoch, std::move(output.error)});  // its tickets go with the plan
  std::shared_ptr<const stage::Batch> batch;
  std::vector<double> seconds;
  {
    const std::lock_guard lock(plan.mutex);
    const auto found = plan.in_flight.find(ticket);
    if (output.fence.epoch != plan.epoch || found == plan.in_flight.end()) {
      n_stale_.fetch_add(1);
      return;
    }
    batch = found->second.batch;
    if (output.error.empty()) {
      // The stages that the step has passed without us, then this one.
      std::vector<double> passed = std::move(output.earlier_seconds);
      passed.push_back(output.compute_seconds);
      for (size_t i = 0; i < std::min(passed.size(), stage + 1); ++i) {
        const double took = passed[passed.size() - 1 - i];
        note_speed(plan.parts[stage - i].seconds_per_row, took, batch->n_rows());
        found->second.stage_seconds[stage - i] = took;
        ++plan.parts[stage - i].counters->batches;
        plan.parts[stage - i].counters->compute_us += static_cast<uint64_t>(took * 1e6);
      }
    }
    found->second.stage = stage + 1;
    found->second.since = Clock::now();
    if (last || !output.error.empty()) {
      seconds = std::move(found->second.stage_seconds);
      plan.in_flight.erase(found);
    }
  }
  if (!output.error.empty()) {
    push_from(plan, engine::TicketFailed{ticket, fmt::format("{}: {}", plan.parts[stage].device, output.error)});
  } else if (last) {
    push_from(plan, engine::Completion{ticket, std::move(output.outputs), std::move(seconds)});
  } else {
    start_step(plan, stage + 1, ticket, std::move(batch), std::move(output.hidden));
  }
}

// Drops what a plan delivers after it was lost.
void ClusterPipeline::push_from(const ActivePlan& plan, engine::PipelineEvent event) {
  const std::lock_guard lock(events_mutex_);
  if (plan.retired) {
    n_stale_.fetch_add(1);
    return;
  }
  events_.push_back(std::move(event));
  events_changed_.notify_one();
}

std::optional<engine::PipelineEvent> ClusterPipeline::poll(std::chrono::milliseconds timeout) {
  std::unique_lock lock(events_mutex_);
  events_changed_.wait_for(lock, timeout, [this] { return !events_.empty() || woken_; });
  woken_ = false;
  if (events_.empty()) return std::nullopt;
  engine::PipelineEvent event = std::move(events_.front());
  events_.pop_front();
  if (const auto* ready = std::get_if<engine::PlanReady>(&event)) polled_epoch_ = ready->plan.epoch;
  return event;
}

engine::PipelineStatus ClusterPipeline::status() const {
  engine::PipelineStatus status;
  const std::lock_guard lock(plan_mutex_);
  for (const Membership::Member& member : membership_ ? membership_->members() : std::vector<Membership::Member>()) {
    const remote::LinkTraffic traffic = member.backend->traffic();
    status.machines.push_back({member.name, std::chrono::duration<double>(traffic.rtt).count(),
                               std::chrono::duration<double>(traffic.mean_rtt).count(), traffic.received_bytes,
                               traffic.sent_bytes});
  }
  if (!active_) return status;
  status.epoch = active_->epoch;
  status.queues.resize(active_->parts.size());
  {
    const std::lock_guard in_flight_lock(active_->mutex);
    for (const auto& [ticket, flight] : active_->in_flight) ++status.queues.at(flight.stage);
  }
  // Backends know better where a batch is that goes from one to the next by itself.
  for (size_t i = 0; i < active_->parts.size(); ++i)
    if (const auto* remote = dynamic_cast<const remote::RemoteStage*>(active_->parts[i].stage.get()))
      status.queues[i] = remote->queue().n_tickets;
  return status;
}

void ClusterPipeline::wake() {
  const std::lock_guard lock(events_mutex_);
  woken_ = true;
  events_changed_.notify_one();
}

void ClusterPipeline::Watch::signal() {
  const std::lock_guard lock(mutex);
  signalled = true;
  changed.notify_all();
}

void ClusterPipeline::Watch::report(Failure failure) {
  const std::lock_guard lock(mutex);
  failures.push_back(std::move(failure));
  signalled = true;
  changed.notify_all();
}

void ClusterPipeline::watch() {
  Clock::time_point next_look = Clock::now();
  while (!stopping()) {
    {
      std::unique_lock lock(watch_->mutex);
      watch_->changed.wait_until(lock, next_look, [this] { return stopping() || watch_->signalled; });
      watch_->signalled = false;
    }
    if (stopping()) break;
    next_look = Clock::now() + std::min<Clock::duration>(kLookInterval, options_.ticket_patience);
    retire_broken_plan();
    if (loading_ && !loading_->candidate.why_broken().empty()) loading_->cancelled = true;
    if (loading_ && loading_->done) finish_loading();
    if (!loading_ && !active_) {
      if (Clock::now() >= next_attempt_ || membership_->generation() != considered_) plan_again();
      if (!loading_) next_look = std::min(next_look, next_attempt_);
    } else if (!loading_) {
      plan_better();
    }
  }
  if (!loading_) return;
  loading_->cancelled = true;
  loading_->thread.join();
}

// Ends the plan in use when one of its stages is gone.
void ClusterPipeline::retire_broken_plan() {
  if (!active_) return;
  std::deque<Watch::Failure> failures;
  {
    // Those of a plan that is being loaded stay.
    const std::lock_guard lock(watch_->mutex);
    failures = watch_->failures;
    std::erase_if(watch_->failures, [this](const auto& failure) { return failure.epoch <= active_->epoch; });
  }
  for (const ActivePlan::Part& part : active_->parts) {
    if (const std::string reason = part.member.why_lost(); !reason.empty()) return retire(reason);
  }
  for (const Watch::Failure& failure : failures) {
    if (failure.epoch == active_->epoch) return retire(failure.reason);
  }
  if (const auto reason = overdue()) retire(*reason);
}

// Why the plan in use has failed: a ticket takes far longer than its stage ever did. Stages compute in order, so a
// ticket waits for all before it.
std::optional<std::string> ClusterPipeline::overdue() {
  const Clock::time_point now = Clock::now();
  std::optional<size_t> stuck;
  {
    const std::lock_guard lock(active_->mutex);
    std::vector<double> ahead(active_->parts.size());  // seconds of computing
    for (const auto& [ticket, flight] : active_->in_flight) {
      double predicted = 0;
      bool known = true;
      for (size_t i = flight.stage; i <= active_->end_of_row(flight.stage); ++i) {
        const double per_row = active_->parts[i].seconds_per_row;
        predicted += ahead[i] += per_row * flight.batch->n_rows();
        known = known && per_row > 0;
      }
      const auto patience = known ? options_.ticket_patience : options_.first_ticket_patience;
      const double most =
          predicted + std::max(std::chrono::duration<double>(patience).count(), kOverdueFactor * predicted);
      if (std::chrono::duration<double>(now - flight.since).count() > most) stuck = flight.stage;
      if (stuck) break;
    }
  }
  if (!stuck) return std::nullopt;
  if (active_->parts[*stuck].hands_on) {
    const std::optional<size_t> hanging = hanging_stage(*stuck);
    if (!hanging) {  // it is lost on the way between two: the next plan shows
      relay_until_ = Clock::now() + kLongestAvoidance;
      return fmt::format(
          "{} and the stages after it have not answered a batch for far longer than it ever took; "
          "activations go through this server for a while",
          active_->parts[*stuck].device);
    }
    stuck = hanging;
  }
  ActivePlan::Part& part = active_->parts[*stuck];
  std::string reason = fmt::format("{} has not answered a batch for far longer than it ever took", part.device);
  avoid(part.device);
  if (part.member.backend) membership_->drop(part.member, reason);
  return reason;
}

// Of a row of stages that hand on, of whose batches one is overdue: the one that has had a batch for the longest, and
// for so long that it must be the cause. nullopt: none has.
std::optional<size_t> ClusterPipeline::hanging_stage(size_t first) const {
  std::optional<size_t> hanging;
  std::chrono::milliseconds longest = options_.ticket_patience / 2;
  for (size_t i = first; i <= active_->end_of_row(first); ++i) {
    const auto* remote = dynamic_cast<const remote::RemoteStage*>(active_->parts[i].stage.get());
    const auto queue = remote != nullptr ? remote->ask_queue(kQueueTimeout) : std::nullopt;
    if (!queue || queue->n_tickets == 0 || queue->oldest_age < longest) continue;
    longest = queue->oldest_age;
    hanging = i;
  }
  return hanging;
}

// A failed device is not chosen for a while when there are others.
void ClusterPipeline::avoid(const std::string& device) {
  auto& avoided = avoided_[device];
  avoided.wait = std::clamp<std::chrono::milliseconds>(avoided.wait * 2, kFirstAvoidance, kLongestAvoidance);
  avoided.until = Clock::now() + avoided.wait;
}

// Ends the plan in use: requests wait for the next.
void ClusterPipeline::retire(const std::string& reason) {
  spdlog::warn("the plan is lost: {}; requests wait for the next", reason);
  lost_since_ = Clock::now();
  std::unique_ptr<ActivePlan> retired;
  {
    const std::scoped_lock lock(plan_mutex_, events_mutex_);
    retired = std::move(active_);
    retired->retired = true;
    events_.emplace_back(engine::PlanLost{reason});
    events_changed_.notify_one();
  }
  retired.reset();
  next_attempt_ = next_log_ = Clock::now();
}

void ClusterPipeline::begin_loading(Candidate candidate) {
  loading_ = std::make_unique<Loading>();
  loading_->candidate = std::move(candidate);
  plan_is_loading_ = true;
  loading_->thread = std::thread([this, loading = loading_.get()] {
    try {
      load_plan(*loading);
    } catch (...) {
      loading->error = std::current_exception();
    }
    loading->done = true;
    watch_->signal();
  });
}

void ClusterPipeline::finish_loading() {
  const std::unique_ptr<Loading> loading = std::move(loading_);
  loading->thread.join();
  plan_is_loading_ = false;
  const std::string broken = loading->candidate.why_broken();
  if (loading->plan && broken.empty()) {
    for (const auto& part : loading->plan->parts) avoided_.erase(part.device);
    n_refused_ = 0;
    activate(std::move(loading->plan));
    return;
  }
  next_attempt_ = Clock::now();
  if (!broken.empty()) {
    spdlog::warn("{} while the next plan was loaded: planning again", broken);
    considered_ = 0;
    return;
  }
  loading_failed(*loading);
}

void ClusterPipeline::loading_failed(Loading& loading) {
  try {
    std::rethrow_exception(loading.error);
  } catch (const ResourceError& error) {
    if (active_) {
      spdlog::info("no room to load the next plan beside the one in use: {}", error.what());
      return retire("the model is being placed anew");
    }
    spdlog::warn("{}; planning again with what is free now", error.what());
    if (++n_refused_ > kRefusalsAtOnce) next_attempt_ += random_part(options_.retry_interval);
  } catch (const std::exception& error) {
    spdlog::error("{}: {}; planning without it where that can be", loading.device, error.what());
    avoid(loading.device);
    if (active_) considered_ = 0;  // perhaps somebody else has come, too
    next_attempt_ += options_.retry_interval;
  }
}

// Without a plan: on what is there.
void ClusterPipeline::plan_again() {
  considered_ = membership_->generation();
  try {
    begin_loading(choose());
  } catch (const Error& error) {
    next_attempt_ = Clock::now() + options_.retry_interval;
    if (Clock::now() < next_log_) return;
    spdlog::warn("no plan yet: {}", error.what());
    if (const auto absent = membership_->missing(); !absent.empty())
      spdlog::warn("waiting for {} to return:{}", fmt::join(absent, ", "), membership_->reasons());
    next_log_ = Clock::now() + kStillWaitingInterval;
  }
}

// With a plan: whether another one would use somebody who has come, or do without somebody who leaves.
void ClusterPipeline::plan_better() {
  const uint64_t generation = membership_->generation();
  bool wanted = std::exchange(considered_, generation) != generation;
  for (auto& [device, avoided] : avoided_) {
    const bool over = avoided.until <= Clock::now();
    wanted = wanted || (over && !avoided.was_over);
    avoided.was_over = over;
  }
  if (!wanted) return;
  const auto uses = [this](const Membership::Member& member) {
    return std::any_of(active_->parts.begin(), active_->parts.end(),
                       [&](const auto& part) { return part.member.connection == member.connection; });
  };
  std::string comes, leaves;
  for (const Membership::Member& member : membership_->members()) {
    if (uses(member) && member.leaving()) leaves = member.name;
    if (!uses(member) && !is_avoided(member, Choice::reliable)) comes = member.name;
  }
  if (comes.empty() && leaves.empty()) return;
  try {
    Candidate candidate = leaves.empty() ? choose(Choice::reliable) : choose();
    const bool same = std::equal(
        candidate.placement.stages.begin(), candidate.placement.stages.end(), active_->parts.begin(),
        active_->parts.end(), [&](const plan::PlacedStage& placed, const ActivePlan::Part& part) {
          return candidate.members[placed.device].connection == part.member.connection && placed.slice == part.slice;
        });
    if (same) return;
    spdlog::info("{}: the model is placed anew", leaves.empty() ? comes + " has come" : leaves + " is about to leave");
    uint64_t local_bytes = 0;  // of both plans
    for (const ActivePlan::Part& part : active_->parts) local_bytes += part.member.backend ? 0 : part.held_bytes;
    for (const plan::PlacedStage& placed : candidate.placement.stages)
      local_bytes += candidate.members[placed.device].backend ? 0 : placed.need.total();
    if (local_bytes > options_.local_memory) return retire("the model is being placed anew");
    begin_loading(std::move(candidate));
  } catch (const Error& error) {
    spdlog::warn("the plan stays as it is: {}", error.what());
  }
}

}  // namespace caravan::cluster
