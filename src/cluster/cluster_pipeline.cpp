#include "cluster/cluster_pipeline.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <future>
#include <random>
#include <set>

#include "base/log.h"
#include "models/registry.h"
#include "remote/remote_stage.h"

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

void log_relayed(const Planner::Candidate& candidate) {
  const auto& stages = candidate.placement.stages;
  for (const auto& [stage, reason] : candidate.relayed)
    spdlog::warn("activations from {} to {} are relayed by this server: {}",
                 candidate.offers[stages[stage - 1].device].name, candidate.offers[stages[stage].device].name, reason);
}

// Up to longest, so that servers that were refused together do not come back together.
std::chrono::milliseconds random_part(std::chrono::milliseconds longest) {
  static thread_local std::minstd_rand random(std::random_device{}());
  return std::chrono::milliseconds(std::uniform_int_distribution<int64_t>(0, longest.count())(random));
}

}  // namespace

// A plan that is being made by a thread of its own: backends are asked for their memory, and the search takes a while.
struct ClusterPipeline::Planning {
  Situation situation;
  std::string why;  // another plan is wanted beside the one in use; empty: there is none
  std::atomic<bool> done{false};
  // Set when done.
  Candidate candidate;
  std::exception_ptr error;
  std::thread thread;
};

// A plan that is being loaded by a thread of its own.
struct ClusterPipeline::Loading : LoadTask {
  std::atomic<bool> done{false};
  // Set when done.
  std::exception_ptr error;
  std::thread thread;
};

// The replicas in use, at least one.
struct ClusterPipeline::ActivePlan {
  engine::PlanSummary limits;  // without replicas and stages
  uint32_t n_ctx = 0;          // that was placed
  std::vector<uint32_t> n_blocks;
  std::optional<plan::Prediction> prediction;
  std::vector<std::unique_ptr<Replica>> replicas;

  Replica* find(uint64_t epoch) const {
    for (const auto& replica : replicas)
      if (replica->epoch == epoch) return replica.get();
    return nullptr;
  }
  std::vector<uint64_t> epochs() const {
    std::vector<uint64_t> epochs;
    for (const auto& replica : replicas) epochs.push_back(replica->epoch);
    return epochs;
  }
  engine::PlanSummary summary() const {
    engine::PlanSummary all = limits;
    for (const auto& replica : replicas) {
      for (engine::StageSummary stage : replica->summary) {
        stage.replica = static_cast<uint32_t>(all.replicas.size());
        all.stages.push_back(std::move(stage));
      }
      all.replicas.push_back({replica->epoch, replica->speed});
    }
    return all;
  }
};

// Takes the outputs of one stage of a replica and passes them on.
class ClusterPipeline::Hop : public stage::OutputSink {
 public:
  Hop(ClusterPipeline& pipeline, Replica& replica, size_t stage)
      : pipeline_(pipeline), replica_(replica), stage_(stage) {}
  void deliver(stage::StageOutput output) noexcept override {
    pipeline_.stage_delivered(replica_, stage_, std::move(output));
  }

 private:
  ClusterPipeline& pipeline_;
  Replica& replica_;
  const size_t stage_;
};

ClusterPipeline::ClusterPipeline(const gguf::Model& model, device::Device& device, BackendConnector* connector,
                                 ClusterOptions options)
    : connector_(connector),
      options_(std::move(options)),
      arch_(models::find_arch(model.metadata())),
      hyperparameter_metadata_(models::hyperparameter_metadata(model.metadata(), options_.n_ctx)),
      hp_(arch_.read(hyperparameter_metadata_)),
      session_(random_session()),
      planner_({model, hyperparameter_metadata_, arch_, hp_}, device, options_,
               options_.backends.empty() ? Planner::Machines::local_only : Planner::Machines::backends),
      loader_({model, hyperparameter_metadata_, arch_, hp_}, device,
              {session_, options_.n_hash_threads, options_.hash_folder, options_.poll},
              [this](Replica& replica, size_t stage) { return std::make_unique<Hop>(*this, replica, stage); }) {
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
  if (membership_) membership_->stop();
  if (watcher_.joinable()) watcher_.join();
  reaper_.wait_for_earlier({});
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
  std::vector<std::string> missing;
  bool late = false;
  while (!stopping()) {
    const bool tried = membership_->tried();
    missing = membership_->missing();
    if (tried && missing.empty()) return;
    // One that refuses us for good is a mistake that waiting would hide.
    if (const std::exception_ptr refusal = membership_->refusal()) std::rethrow_exception(refusal);
    if (Clock::now() >= deadline && tried) {
      const bool nobody = missing.size() == options_.backends.size();
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
      loading.candidate = planner_.choose(situation(), Choice::anybody);
      load_plan(loading);
      activate(loading);
      return;
    } catch (const ResourceError& error) {
      const bool refused = !loading.device.empty() && ++n_refused_ < kRefusalsAtStart;
      if (!refused) {
        if (membership_ && membership_->generation() != considered_) continue;  // with those who came meanwhile
        const auto absent = membership_ ? membership_->missing() : std::vector<std::string>();
        if (absent.empty() && (!options_.waits_on || !membership_ || membership_->awaited().empty())) throw;
        const std::string why =
            absent.empty() ? error.what()
                           : fmt::format("without the missing backends {}: {}", fmt::join(absent, ", "), error.what());
        if (!options_.waits_on) throw ResourceError(why);
        keep_waiting(why);
      } else {
        spdlog::warn("{}; planning again", error.what());
      }
    } catch (const remote::StalledError& error) {
      if (!note_stall(loading) && !options_.waits_on) throw;
      spdlog::error("{}; planning without it where that can be", error.what());
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
      why, fmt::join(membership_->awaited(), ", "), membership_->reasons(), fmt::join(options_.backends, ","));
  next_log_ = Clock::now() + kStillWaitingInterval;
}

ClusterPipeline::Situation ClusterPipeline::situation() const {
  Situation situation;
  if (membership_) situation.members = membership_->members();
  for (const auto& [device, avoided] : avoided_)
    if (Clock::now() < avoided.until) situation.avoided.insert(device);
  situation.numeric_class = numeric_class_;
  situation.relays = options_.relay || Clock::now() < relay_until_;
  situation.hops_failed = hops_failed_;
  if (!active_) return situation;
  situation.epochs = active_->epochs();
  situation.n_ctx = active_->n_ctx;
  for (const ReplicaPart* part : parts_in_use())
    if (part->member.backend) situation.held.push_back({part->member.connection, part->held_bytes});
  return situation;
}

// The stages of all replicas in use.
std::vector<const ReplicaPart*> ClusterPipeline::parts_in_use() const {
  std::vector<const ReplicaPart*> parts;
  if (!active_) return parts;
  for (const auto& replica : active_->replicas)
    for (const ReplicaPart& part : replica->parts) parts.push_back(&part);
  return parts;
}

// The replica in use that has the stages of a candidate's; nullptr: none has.
const Replica* ClusterPipeline::in_use(const Candidate& candidate, size_t replica) const {
  if (!active_) return nullptr;
  const auto stages = candidate.placement.replica(replica);
  const auto same = [&](const plan::PlacedStage& placed, const ReplicaPart& part) {
    return candidate.members[placed.device].connection == part.member.connection && placed.slice == part.slice;
  };
  for (const auto& used : active_->replicas)
    if (std::equal(stages.begin(), stages.end(), used->parts.begin(), used->parts.end(), same)) return used.get();
  return nullptr;
}

ClusterPipeline::Proposal ClusterPipeline::propose() {
  const auto deadline = Clock::now() + options_.rpc_wait;
  if (!options_.backends.empty()) wait_for_backends(deadline);
  Candidate candidate = planner_.choose(situation(), Choice::anybody);
  log_relayed(candidate);
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

// The loading thread.
void ClusterPipeline::load_plan(Loading& loading) {
  Planner::Candidate& candidate = loading.candidate;
  log_relayed(candidate);
  spdlog::info("plan:\n{}", plan::describe(candidate.placement, candidate.offers, candidate.left_out));
  loader_.load(loading, membership_.get());
}

// What the engine is told of a placement beside its replicas and stages.
engine::PlanSummary ClusterPipeline::limits(const plan::Placement& placement) const {
  engine::PlanSummary summary;
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
  return summary;
}

// Makes a loaded plan the one in use; what was in flight in replicas that it does not keep is lost.
void ClusterPipeline::activate(Loading& loading) {
  const plan::Placement& placement = loading.candidate.placement;
  auto next = std::make_unique<ActivePlan>();
  next->limits = limits(placement);
  next->limits.epoch = ++n_plans_;
  next->n_ctx = placement.n_ctx;
  next->n_blocks = placement.cache.n_blocks;
  next->prediction = placement.prediction;
  size_t n_devices = 0;
  std::string numeric_class;
  for (size_t r = 0; r < loading.replicas.size(); ++r) {
    const Replica& replica = loading.replicas[r] ? *loading.replicas[r] : *active_->find(loading.kept[r]);
    for (const ReplicaPart& part : replica.parts) {
      std::string& first = next->limits.numeric_class;
      if (n_devices++ == 0) first = numeric_class = part.stage->numeric_class();
      if (part.stage->numeric_class() == first) continue;
      spdlog::warn("{} computes in class {}, the first stage in {}: results depend on where layers are", part.device,
                   part.stage->numeric_class(), first);
      numeric_class.clear();
    }
  }
  if (!numeric_class_.empty() && numeric_class != numeric_class_)
    spdlog::warn("the new plan computes in another numeric class than {}: answers in progress may go on differently",
                 numeric_class_);
  numeric_class_ = numeric_class;
  spdlog::info("ready: {} layers on {} device(s){}, context {} tokens, {} sequences at a time", hp_.n_layer, n_devices,
               placement.n_replicas() > 1 ? fmt::format(", {} replicas", placement.n_replicas()) : "",
               next->limits.n_ctx, next->limits.max_slots);
  const double seconds = lost_since_ ? std::chrono::duration<double>(Clock::now() - *lost_since_).count() : 0;
  if (lost_since_) spdlog::info("recovered in {:.2f} s", seconds);
  lost_since_.reset();
  stalled_.clear();
  if (const auto absent = membership_ ? membership_->missing() : std::vector<std::string>(); !absent.empty())
    spdlog::warn("serving without {}", fmt::join(absent, ", "));
  std::unique_ptr<ActivePlan> before;
  {
    const std::scoped_lock lock(plan_mutex_, events_mutex_);
    for (size_t r = 0; r < loading.replicas.size(); ++r) {
      if (!loading.replicas[r]) {
        const auto kept = std::find_if(active_->replicas.begin(), active_->replicas.end(),
                                       [&](const auto& used) { return used && used->epoch == loading.kept[r]; });
        loading.replicas[r] = std::move(*kept);
      }
      // Those that go on are compared with the others by what this plan predicts.
      loading.replicas[r]->speed = placement.replica_speeds.empty() ? 0 : placement.replica_speeds[r];
      next->replicas.push_back(std::move(loading.replicas[r]));
    }
    before = std::exchange(active_, std::move(next));
    if (before)
      for (const auto& replica : before->replicas)
        if (replica) replica->retired = true;
    if (std::exchange(recovers_, false)) {
      ++recovery_.recoveries;
      recovery_.seconds += seconds;
    }
    events_.emplace_back(engine::PlanReady{active_->summary()});
    events_changed_.notify_one();
  }
  if (before) dispose(std::move(before->replicas));
}

uint64_t ClusterPipeline::submit(stage::Batch batch, uint64_t replica) {
  const uint64_t ticket = next_ticket_.fetch_add(1);
  const std::lock_guard lock(plan_mutex_);
  Replica* const at = active_ ? active_->find(replica) : nullptr;
  if (at == nullptr) return ticket;  // what tells of its loss is in the queue already, and the ticket is lost with it
  auto shared = std::make_shared<const stage::Batch>(std::move(batch));
  {
    const std::lock_guard in_flight_lock(at->mutex);
    at->in_flight[ticket] = {shared, 0, Clock::now(), std::vector<double>(at->parts.size())};
  }
  start_step(*at, 0, ticket, std::move(shared), {});
  return ticket;
}

// Starts a step at a stage; what it hands on comes back from the last stage of the row.
void ClusterPipeline::start_step(Replica& replica, size_t stage, uint64_t ticket,
                                 std::shared_ptr<const stage::Batch> batch, std::vector<float> input) {
  const stage::Fence fence{session_, replica.epoch, ticket};
  const size_t last = replica.end_of_row(stage);
  if (last != stage) replica.parts[last].direct->expect(fence, batch);
  replica.parts[stage].stage->enqueue(fence, std::move(batch), std::move(input));
}

void ClusterPipeline::stage_delivered(Replica& replica, size_t stage, stage::StageOutput output) noexcept {
  const uint64_t ticket = output.fence.ticket;
  const bool last = stage + 1 == replica.parts.size();
  if (output.stage_lost)  // its tickets go with the replica
    return watch_->report({replica.epoch, std::move(output.error), replica.parts[stage].device});
  std::shared_ptr<const stage::Batch> batch;
  std::vector<double> seconds;
  {
    const std::lock_guard lock(replica.mutex);
    const auto found = replica.in_flight.find(ticket);
    if (output.fence.epoch != replica.epoch || found == replica.in_flight.end()) {
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
        note_speed(replica.parts[stage - i].seconds_per_row, took, batch->n_rows());
        found->second.stage_seconds[stage - i] = took;
        ++replica.parts[stage - i].counters->batches;
        replica.parts[stage - i].counters->compute_us += static_cast<uint64_t>(took * 1e6);
      }
    }
    found->second.stage = stage + 1;
    found->second.since = Clock::now();
    if (last || !output.error.empty()) {
      seconds = std::move(found->second.stage_seconds);
      replica.in_flight.erase(found);
    }
  }
  if (!output.error.empty()) {
    push_from(replica, engine::TicketFailed{ticket, fmt::format("{}: {}", replica.parts[stage].device, output.error)});
  } else if (last) {
    push_from(replica, engine::Completion{ticket, std::move(output.outputs), std::move(seconds)});
  } else {
    start_step(replica, stage + 1, ticket, std::move(batch), std::move(output.hidden));
  }
}

// Drops what a replica delivers after it was lost.
void ClusterPipeline::push_from(const Replica& replica, engine::PipelineEvent event) {
  {
    const std::lock_guard lock(events_mutex_);
    if (replica.retired) {
      n_stale_.fetch_add(1);
      return;
    }
    events_.push_back(std::move(event));
  }
  events_changed_.notify_one();
}

std::optional<engine::PipelineEvent> ClusterPipeline::poll(std::chrono::milliseconds timeout) {
  std::unique_lock lock(events_mutex_);
  // Without a time to wait, not asking the condition saves a system call per token.
  if (timeout > timeout.zero()) events_changed_.wait_for(lock, timeout, [this] { return !events_.empty() || woken_; });
  woken_ = false;
  if (events_.empty()) return std::nullopt;
  engine::PipelineEvent event = std::move(events_.front());
  events_.pop_front();
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
  status.recovery = recovery_;
  if (!active_) return status;
  status.epoch = active_->limits.epoch;
  for (const auto& replica : active_->replicas) {
    std::vector<uint64_t> queues(replica->parts.size());
    {
      const std::lock_guard in_flight_lock(replica->mutex);
      for (const auto& [ticket, flight] : replica->in_flight) ++queues.at(flight.stage);
    }
    // Backends know better where a batch is that goes from one to the next by itself.
    for (size_t i = 0; i < queues.size(); ++i)
      if (const auto* remote = dynamic_cast<const remote::RemoteStage*>(replica->parts[i].stage.get()))
        queues[i] = remote->queue().n_tickets;
    status.queues.insert(status.queues.end(), queues.begin(), queues.end());
  }
  return status;
}

void ClusterPipeline::wake() {
  {
    const std::lock_guard lock(events_mutex_);
    woken_ = true;
  }
  events_changed_.notify_one();
}

void ClusterPipeline::Watch::signal() {
  const std::lock_guard lock(mutex);
  signalled = true;
  changed.notify_all();
}

void ClusterPipeline::Watch::report(Loss failure) {
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
    retire_broken();
    if (planning_ && planning_->done) finish_planning();
    if (loading_ && !why_useless(*loading_).empty()) loading_->cancelled = true;
    if (loading_ && loading_->done) finish_loading();
    if (planning_ || loading_) continue;
    if (active_)
      plan_better();
    else if (Clock::now() >= next_attempt_ || membership_->generation() != considered_)
      plan_again();
    else
      next_look = std::min(next_look, next_attempt_);
  }
  if (planning_) planning_->thread.join();
  if (!loading_) return;
  loading_->cancelled = true;
  loading_->thread.join();
}

// Ends the replicas in use of which a stage is gone.
void ClusterPipeline::retire_broken() {
  if (!active_) return;
  std::deque<Loss> failures;
  {
    uint64_t latest = 0;
    for (const auto& replica : active_->replicas) latest = std::max(latest, replica->epoch);
    // Those of replicas that are being loaded stay.
    const std::lock_guard lock(watch_->mutex);
    failures = watch_->failures;
    std::erase_if(watch_->failures, [latest](const auto& failure) { return failure.epoch <= latest; });
    hops_failed_ = hops_failed_ || !failures.empty();
  }
  std::vector<Loss> losses;
  for (const auto& replica : active_->replicas)
    if (auto loss = why_broken(*replica, failures)) losses.push_back(std::move(*loss));
  if (!losses.empty()) retire(losses);
  // Then those that may have to be asked.
  losses.clear();
  if (!active_) return;
  for (const auto& replica : active_->replicas)
    if (auto loss = overdue(*replica)) losses.push_back(std::move(*loss));
  if (!losses.empty()) retire(losses);
}

std::optional<ClusterPipeline::Loss> ClusterPipeline::why_broken(const Replica& replica,
                                                                 const std::deque<Loss>& failures) {
  for (const ReplicaPart& part : replica.parts)
    if (std::string reason = part.member.why_lost(); !reason.empty())
      return Loss{replica.epoch, std::move(reason), part.device};
  for (const Loss& failure : failures)
    if (failure.epoch == replica.epoch) return failure;
  return std::nullopt;
}

// Why a replica has failed: a ticket takes far longer than its stage ever did. Stages compute in order, so a
// ticket waits for all before it.
std::optional<ClusterPipeline::Loss> ClusterPipeline::overdue(Replica& replica) {
  const Clock::time_point now = Clock::now();
  std::optional<size_t> stuck;
  {
    const std::lock_guard lock(replica.mutex);
    std::vector<double> ahead(replica.parts.size());  // seconds of computing
    for (const auto& [ticket, flight] : replica.in_flight) {
      double predicted = 0;
      bool known = true;
      for (size_t i = flight.stage; i <= replica.end_of_row(flight.stage); ++i) {
        const ReplicaPart& part = replica.parts[i];
        const double per_row = part.seconds_per_row > 0 ? part.seconds_per_row : part.predicted_per_row;
        predicted += ahead[i] += per_row * flight.batch->n_rows();
        known = known && per_row > 0;
      }
      const auto patience = known ? options_.ticket_patience : options_.first_ticket_patience;
      if (now - flight.since > longest_wait(predicted, patience)) stuck = flight.stage;
      if (stuck) break;
    }
  }
  if (!stuck) return std::nullopt;
  if (replica.parts[*stuck].hands_on) {
    const std::optional<size_t> hanging = hanging_stage(replica, *stuck);
    if (!hanging) {  // it is lost on the way between two: the next plan shows
      hops_failed_ = true;
      relay_until_ = Clock::now() + kLongestAvoidance;
      const std::string& device = replica.parts[*stuck].device;
      return Loss{replica.epoch,
                  device +
                      " and the stages after it have not answered a batch for far longer than it ever took; "
                      "activations go through this server for a while",
                  device};
    }
    stuck = hanging;
  }
  ReplicaPart& part = replica.parts[*stuck];
  std::string reason = fmt::format("{} has not answered a batch for far longer than it ever took", part.device);
  avoid(part.device);
  if (part.member.backend) membership_->drop(part.member, reason);
  return Loss{replica.epoch, std::move(reason), part.device};
}

// Of a row of stages that hand on, of whose batches one is overdue: the one that has had a batch for the longest, and
// for so long that it must be the cause. nullopt: none has.
std::optional<size_t> ClusterPipeline::hanging_stage(const Replica& replica, size_t first) const {
  std::vector<std::pair<size_t, std::future<std::optional<remote::StageQueue>>>> answers;  // all are asked at once
  for (size_t i = first; i <= replica.end_of_row(first); ++i)
    if (const auto* remote = dynamic_cast<const remote::RemoteStage*>(replica.parts[i].stage.get()))
      answers.emplace_back(i, std::async(std::launch::async, [remote] { return remote->ask_queue(kQueueTimeout); }));
  std::optional<size_t> hanging;
  std::chrono::milliseconds longest = options_.ticket_patience / 2;
  for (auto& [i, answer] : answers) {
    const std::optional<remote::StageQueue> queue = answer.get();
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

// Ends replicas in use, at least one: their requests go on at others, or wait for the next plan.
void ClusterPipeline::retire(const std::vector<Loss>& losses) {
  std::vector<std::unique_ptr<Replica>> retired;
  std::vector<std::string> reasons;
  for (const Loss& loss : losses)
    if (std::find(reasons.begin(), reasons.end(), loss.reason) == reasons.end()) reasons.push_back(loss.reason);
  const std::string reason = fmt::format("{}", fmt::join(reasons, "; "));
  const bool failed = std::any_of(losses.begin(), losses.end(), [](const Loss& loss) { return !loss.device.empty(); });
  {
    const std::scoped_lock lock(plan_mutex_, events_mutex_);
    for (const Loss& loss : losses) {
      if (loss.device.empty()) continue;
      ++recovery_.replicas_lost;
      ++recovery_.losses[loss.device];
    }
    for (auto& replica : active_->replicas) {
      const auto ends = [&](const Loss& loss) { return loss.epoch == replica->epoch; };
      if (std::none_of(losses.begin(), losses.end(), ends)) continue;
      replica->retired = true;
      retired.push_back(std::move(replica));
    }
    std::erase(active_->replicas, nullptr);
    if (active_->replicas.empty()) {
      active_.reset();
      events_.emplace_back(engine::PlanLost{reason});
    } else {
      active_->limits.epoch = ++n_plans_;
      active_->prediction.reset();
      if (failed) ++recovery_.recoveries;
      events_.emplace_back(engine::PlanReady{active_->summary()});
    }
    events_changed_.notify_one();
  }
  dispose(std::move(retired));
  considered_ = 0;
  if (active_) {
    spdlog::warn("a replica of the model is lost: {}; its requests go on at the other {}", reason,
                 active_->replicas.size());
    return;
  }
  spdlog::warn("the plan is lost: {}; requests wait for the next", reason);
  recovers_ = failed;
  lost_since_ = next_attempt_ = next_log_ = Clock::now();
}

// Nobody waits here for what their stages still do; who makes the next plan does, since that needs their memory.
void ClusterPipeline::dispose(std::vector<std::unique_ptr<Replica>> replicas) {
  for (std::unique_ptr<Replica>& replica : replicas)
    if (replica) reaper_.post([gone = std::shared_ptr<Replica>(std::move(replica))] {});
}

// Ends all replicas in use but some: the next plan needs their room.
void ClusterPipeline::retire_for_another(const std::vector<uint64_t>& kept) {
  std::vector<Loss> losses;
  for (const uint64_t epoch : active_->epochs())
    if (std::find(kept.begin(), kept.end(), epoch) == kept.end())
      losses.push_back({epoch, "the model is being placed anew", ""});
  retire(losses);
}

void ClusterPipeline::begin_planning(Situation situation, Choice last, std::string why) {
  planning_ = std::make_unique<Planning>();
  planning_->situation = std::move(situation);
  planning_->why = std::move(why);
  hops_failed_ = false;
  planning_->thread = std::thread([this, planning = planning_.get(), last] {
    try {
      reaper_.wait_for_earlier({});
      planning->candidate = planner_.choose(planning->situation, last);
    } catch (...) {
      planning->error = std::current_exception();
    }
    planning->done = true;
    watch_->signal();
  });
}

void ClusterPipeline::finish_planning() {
  const std::unique_ptr<Planning> planning = std::move(planning_);
  planning->thread.join();
  const std::vector<uint64_t> in_use = active_ ? active_->epochs() : std::vector<uint64_t>();
  if (planning->situation.epochs != in_use || !planning->candidate.why_broken().empty()) {
    considered_ = 0;  // it was made for another situation
    next_attempt_ = Clock::now();
    return;
  }
  if (planning->error) return planning_failed(*planning);
  if (active_) return take_better(*planning, std::move(planning->candidate));
  begin_loading(std::move(planning->candidate));
}

void ClusterPipeline::planning_failed(const Planning& planning) {
  std::string reason;
  try {
    std::rethrow_exception(planning.error);
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (active_) return spdlog::warn("the plan stays as it is: {}", reason);
  next_attempt_ = Clock::now() + options_.retry_interval;
  if (Clock::now() < next_log_) return;
  spdlog::warn("no plan yet: {}", reason);
  if (const auto absent = membership_->missing(); !absent.empty())
    spdlog::warn("waiting for {} to return:{}", fmt::join(absent, ", "), membership_->reasons());
  next_log_ = Clock::now() + kStillWaitingInterval;
}

// Goes over to the planned one, unless that is the one in use.
void ClusterPipeline::take_better(const Planning& planning, Candidate candidate) {
  bool same = candidate.placement.n_replicas() == active_->replicas.size();
  for (size_t r = 0; same && r < active_->replicas.size(); ++r) same = in_use(candidate, r) != nullptr;
  if (same) return;
  spdlog::info("{}: the model is placed anew", planning.why);
  uint64_t local_bytes = 0;  // of both plans
  for (const ReplicaPart* part : parts_in_use()) local_bytes += part->member.backend ? 0 : part->held_bytes;
  for (const plan::PlacedStage& placed : candidate.placement.stages)
    local_bytes += candidate.members[placed.device].backend ? 0 : placed.need.total();
  if (local_bytes > options_.local_memory) return retire_for_another({});
  begin_loading(std::move(candidate));
}

void ClusterPipeline::begin_loading(Candidate candidate) {
  loading_ = std::make_unique<Loading>();
  loading_->candidate = std::move(candidate);
  for (size_t r = 0; r < loading_->candidate.placement.n_replicas(); ++r) {
    const bool same_cache = active_ && active_->n_blocks == loading_->candidate.placement.cache.n_blocks;
    const Replica* used = same_cache ? in_use(loading_->candidate, r) : nullptr;
    loading_->kept.push_back(used != nullptr ? used->epoch : 0);
  }
  const auto& stages = loading_->candidate.placement.stages;
  plan_is_loading_ = std::none_of(stages.begin(), stages.end(), [&](const plan::PlacedStage& placed) {
    return stalled_.contains(loading_->candidate.members[placed.device].connection);
  });
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

// Why a plan that is being loaded cannot be used any more; empty: it can.
std::string ClusterPipeline::why_useless(const Loading& loading) const {
  std::string reason = loading.candidate.why_broken();
  for (const uint64_t epoch : loading.kept)
    if (epoch != 0 && (!active_ || active_->find(epoch) == nullptr)) reason = "a replica that was to go on is lost";
  return reason;
}

void ClusterPipeline::finish_loading() {
  const std::unique_ptr<Loading> loading = std::move(loading_);
  loading->thread.join();
  plan_is_loading_ = false;
  const std::string broken = why_useless(*loading);
  if (!loading->error && broken.empty()) {
    for (const plan::PlacedStage& placed : loading->candidate.placement.stages)
      avoided_.erase(loading->candidate.offers[placed.device].name);
    n_refused_ = 0;
    activate(*loading);
    return;
  }
  dispose(std::move(loading->replicas));
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
      const auto n_kept = static_cast<size_t>(
          std::count_if(loading.kept.begin(), loading.kept.end(), [](uint64_t epoch) { return epoch != 0; }));
      spdlog::info("no room to load the next plan beside the one in use: {}", error.what());
      return n_kept == active_->replicas.size() ? avoid(loading.device) : retire_for_another(loading.kept);
    }
    spdlog::warn("{}; planning again with what is free now", error.what());
    if (++n_refused_ > kRefusalsAtOnce) next_attempt_ += random_part(options_.retry_interval);
  } catch (const std::exception& error) {
    spdlog::error("{}: {}; planning without it where that can be", loading.device, error.what());
    if (dynamic_cast<const remote::StalledError*>(&error) != nullptr)
      note_stall(loading);
    else
      avoid(loading.device);
    if (active_) considered_ = 0;  // perhaps somebody else has come, too
    next_attempt_ += options_.retry_interval;
  }
}

// The device that was being loaded stood still: the next load there is waited for, but promises nothing. Whether it is
// the first time on this connection.
bool ClusterPipeline::note_stall(const Loading& loading) {
  avoid(loading.device);
  bool first = false;
  for (size_t i = 0; i < loading.candidate.offers.size(); ++i)
    if (loading.candidate.offers[i].name == loading.device)
      first = stalled_.insert(loading.candidate.members[i].connection).second || first;
  return first;
}

// Without a plan: on what is there.
void ClusterPipeline::plan_again() {
  considered_ = membership_->generation();
  begin_planning(situation(), Choice::anybody, "");
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
  Situation now = situation();
  const std::vector<const ReplicaPart*> used = parts_in_use();
  const auto uses = [&used](const Membership::Member& member) {
    return std::any_of(used.begin(), used.end(),
                       [&](const ReplicaPart* part) { return part->member.connection == member.connection; });
  };
  std::string comes, leaves;
  for (const Membership::Member& member : now.members) {
    if (uses(member) && member.leaving()) leaves = member.name;
    if (!uses(member) && !Planner::is_avoided(now, member, Choice::reliable)) comes = member.name;
  }
  if (!leaves.empty())
    begin_planning(std::move(now), Choice::anybody, leaves + " is about to leave");
  else if (!comes.empty())
    begin_planning(std::move(now), Choice::reliable, comes + " has come");
}

}  // namespace caravan::cluster
