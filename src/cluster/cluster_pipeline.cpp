#include "cluster/cluster_pipeline.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <random>

#include "base/log.h"
#include "base/progress.h"
#include "models/registry.h"
#include "stage/local_stage.h"
#include "weights/source.h"

namespace caravan::cluster {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kConnectTimeout = std::chrono::seconds(5);
constexpr auto kStillWaitingInterval = std::chrono::seconds(10);

uint64_t random_session() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

// True for failures that trying again cannot mend: another token, another protocol version.
bool is_permanent(const std::exception& error) {
  return dynamic_cast<const NotSupportedError*>(&error) != nullptr ||
         dynamic_cast<const RequestError*>(&error) != nullptr;
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

}  // namespace

// The stages in use and the batches under way. Stages are destroyed first to last: one that still delivers finds the
// next alive.
struct ClusterPipeline::ActivePlan {
  struct Part {
    std::string device;
    stage::Slice slice;
    std::unique_ptr<Hop> hop;
    std::unique_ptr<stage::Stage> stage;
  };
  ~ActivePlan() {
    for (Part& part : parts) part.stage.reset();
  }

  uint64_t epoch = 0;
  std::vector<Part> parts;
  std::mutex mutex;
  std::map<uint64_t, std::shared_ptr<const stage::Batch>> in_flight;  // under mutex
  bool retired = false;  // under events_mutex_: its results no longer count
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

// A configured backend and its connection, if there is one.
struct ClusterPipeline::Seat {
  std::string name;
  std::unique_ptr<Backend> backend;
  uint64_t connection = 0;  // counts connections: a late report about an old one is ignored
  bool lost = false;        // the connection has ended
  std::string last_error;   // why it is not connected
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
      session_(random_session()),
      hashes_(model, weights::HashMemory(options_.hash_folder)) {
  CARAVAN_ASSERT(connector_ != nullptr || options_.backends.empty(), "backends need a connector");
  // Before anything is waited for, and while all backends count: later only those that are there do.
  if (!options_.tensor_split.empty() && options_.tensor_split.size() != options_.backends.size())
    throw RequestError(fmt::format("--tensor-split has {} shares for {} backends; give one number for each",
                                   options_.tensor_split.size(), options_.backends.size()));
  models::check_model(arch_, hp_, models::tensor_map(model));
  for (const std::string& name : options_.backends) seats_.push_back({name, nullptr, 0, false, ""});
}

ClusterPipeline::~ClusterPipeline() {
  stopping_.store(true);
  {
    const std::lock_guard lock(watch_->mutex);
    watch_->changed.notify_all();
  }
  if (watcher_.joinable()) watcher_.join();
  active_.reset();
  seats_.clear();
}

void ClusterPipeline::start() {
  if (!seats_.empty()) {
    spdlog::info("waiting up to {} s for backends {}", options_.rpc_wait.count(), fmt::join(options_.backends, ", "));
    connect_missing(Clock::now() + options_.rpc_wait, Refusal::fails);
    if (const auto absent = missing(); !absent.empty()) {
      std::string reasons;
      for (const Seat& seat : seats_)
        if (!seat.backend) reasons += fmt::format("\n  {}: {}", seat.name, seat.last_error);
      if (absent.size() == seats_.size())
        throw Error(fmt::format("no backend answered within {} s:{}", options_.rpc_wait.count(), reasons));
      spdlog::warn("backends that did not answer within {} s:{}\ngoing on without them if the model fits",
                   options_.rpc_wait.count(), reasons);
    }
  }
  try {
    push(engine::PlanReady{make_plan()});
  } catch (const ResourceError& error) {
    if (const auto absent = missing(); !absent.empty())
      throw ResourceError(fmt::format("without the missing backends {}: {}", fmt::join(absent, ", "), error.what()));
    throw;
  }
  if (!seats_.empty()) watcher_ = std::thread([this] { watch(); });
}

std::vector<std::string> ClusterPipeline::missing() const {
  std::vector<std::string> names;
  for (const Seat& seat : seats_)
    if (!seat.backend) names.push_back(seat.name);
  return names;
}

// Tries all unconnected seats, again and again until all are connected or the deadline has passed. No stage exists.
void ClusterPipeline::connect_missing(Clock::time_point deadline, Refusal refusal) {
  while (!stopping()) {
    drop_lost_connections();  // one may end while others are waited for
    bool all = true;
    for (size_t i = 0; i < seats_.size() && !stopping(); ++i)
      if (!seats_[i].backend) all = connect(i, refusal) && all;
    if (all || Clock::now() >= deadline) return;
    std::unique_lock lock(watch_->mutex);
    watch_->changed.wait_for(lock, options_.retry_interval, [this] { return stopping(); });
  }
}

// Tries one seat. A failure is logged unless it is the same as last time.
bool ClusterPipeline::connect(size_t index, Refusal refusal) {
  Seat& seat = seats_[index];
  const uint64_t connection = ++seat.connection;
  try {
    auto backend = connector_->connect(
        seat.name, kConnectTimeout,
        [watch = watch_, index, connection](const std::string& reason) { watch->report({index, connection, reason}); });
    spdlog::info("backend {}: connected, {} free", seat.name, format_bytes(backend->memory_free()));
    seat.backend = std::move(backend);
    seat.last_error.clear();
    return true;
  } catch (const Error& error) {
    if (seat.last_error != error.what()) spdlog::warn("backend {}: {}", seat.name, error.what());
    seat.last_error = error.what();
    if (refusal == Refusal::fails && is_permanent(error)) throw;
    return false;
  }
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

void ClusterPipeline::load_stage(const plan::PlacedStage& placed, const plan::Placement& placement, stage::Stage& stage,
                                 const std::string& name) {
  stage::LoadRequest request;
  request.hyperparameters = hyperparameter_metadata_;
  request.manifest = manifest_of(placed.slice, name != "local");
  request.slice = placed.slice;
  request.cache = placement.cache;
  weights::ModelSource source(model_);
  weights::WeightSource* const sources[] = {&source};
  Progress progress(
      fmt::format("loading layers {}-{} on {}", placed.slice.layer_begin, placed.slice.layer_end - 1, name),
      request.manifest.size_bytes());
  const auto on_progress = [&](uint64_t done) { progress.update(done); };
  try {
    stage.load(request, sources, on_progress);
  } catch (const weights::SourceError& error) {
    if (!hashes_.recalled()) throw;
    // The file may have changed though its size and time have not.
    spdlog::warn("{}; the hashes that were remembered of {} are computed again", error.what(), model_.path());
    hashes_.forget();
    request.manifest = manifest_of(placed.slice, name != "local");
    stage.load(request, sources, on_progress);
  }
}

// Places, loads and opens a plan on what is connected; it becomes the active one.
engine::PlanSummary ClusterPipeline::make_plan() {
  std::vector<plan::DeviceOffer> offers;
  std::vector<Backend*> backends;  // parallel to offers, null for the local device
  if (options_.local_memory > 0 || seats_.empty()) {
    offers.push_back({"local", options_.local_memory, true});
    backends.push_back(nullptr);
  }
  auto request = placement_request();
  std::vector<double> shares;
  for (size_t i = 0; i < seats_.size(); ++i) {
    if (!seats_[i].backend) continue;
    if (!request.tensor_split.empty()) {
      if (request.tensor_split[i] == 0) continue;  // the user gives it nothing, whoever else is missing
      shares.push_back(request.tensor_split[i]);
    }
    offers.push_back({seats_[i].name, seats_[i].backend->memory_free(), false});
    backends.push_back(seats_[i].backend.get());
  }
  request.tensor_split = shares;  // those of the connected ones
  if (offers.empty()) throw ResourceError("no backend is there to which --tensor-split gives layers");
  const plan::Placement placement = plan::place(request, offers);
  spdlog::info("plan:\n{}", plan::describe(placement, offers));

  auto next = std::make_unique<ActivePlan>();
  next->epoch = ++epoch_;
  engine::PlanSummary summary;
  for (size_t i = 0; i < placement.stages.size(); ++i) {
    const plan::PlacedStage& placed = placement.stages[i];
    ActivePlan::Part part;
    part.device = offers[placed.device].name;
    part.slice = placed.slice;
    part.hop = std::make_unique<Hop>(*this, *next, i);
    Backend* const backend = backends[placed.device];
    part.stage = backend != nullptr ? backend->make_stage() : std::make_unique<stage::LocalStage>(device_);
    load_stage(placed, placement, *part.stage, part.device);
    next->parts.push_back(std::move(part));
    summary.stages.push_back({offers[placed.device].name, placed.slice.layer_begin, placed.slice.layer_end,
                              placed.slice.embeds, placed.slice.outputs, placed.need.weights, placed.need.kv_cache,
                              placed.need.scratch});
  }
  for (auto& part : next->parts) part.stage->open(session_, next->epoch, *part.hop);

  summary.epoch = next->epoch;
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
  summary.numeric_class = next->parts.front().stage->numeric_class();
  for (const auto& part : next->parts)
    if (part.stage->numeric_class() != summary.numeric_class)
      spdlog::warn("{} computes in class {}, the first stage in {}: results depend on where layers are", part.device,
                   part.stage->numeric_class(), summary.numeric_class);
  spdlog::info("ready: {} layers on {} device(s), context {} tokens, {} sequences at a time", hp_.n_layer,
               next->parts.size(), summary.n_ctx, summary.max_slots);
  const std::lock_guard lock(plan_mutex_);
  active_ = std::move(next);
  return summary;
}

uint64_t ClusterPipeline::submit(stage::Batch batch) {
  const uint64_t ticket = next_ticket_.fetch_add(1);
  const std::lock_guard lock(plan_mutex_);
  // PlanLost is in the queue already, perhaps the next PlanReady too: the ticket is lost with the plan it was made for.
  if (!active_ || active_->epoch != polled_epoch_) return ticket;
  auto shared = std::make_shared<const stage::Batch>(std::move(batch));
  {
    const std::lock_guard in_flight_lock(active_->mutex);
    active_->in_flight[ticket] = shared;
  }
  active_->parts.front().stage->enqueue({session_, active_->epoch, ticket}, std::move(shared), {});
  return ticket;
}

void ClusterPipeline::stage_delivered(ActivePlan& plan, size_t stage, stage::StageOutput output) noexcept {
  const uint64_t ticket = output.fence.ticket;
  const bool last = stage + 1 == plan.parts.size();
  std::shared_ptr<const stage::Batch> batch;
  {
    const std::lock_guard lock(plan.mutex);
    const auto found = plan.in_flight.find(ticket);
    if (output.fence.epoch != plan.epoch || found == plan.in_flight.end()) {
      n_stale_.fetch_add(1);
      return;
    }
    batch = found->second;
    if (last || !output.error.empty()) plan.in_flight.erase(found);
  }
  if (!output.error.empty()) {
    push_from(plan, engine::TicketFailed{ticket, fmt::format("{}: {}", plan.parts[stage].device, output.error)});
  } else if (last) {
    push_from(plan, engine::Completion{ticket, std::move(output.outputs)});
  } else {
    plan.parts[stage + 1].stage->enqueue(output.fence, std::move(batch), std::move(output.hidden));
  }
}

void ClusterPipeline::push(engine::PipelineEvent event) {
  const std::lock_guard lock(events_mutex_);
  events_.push_back(std::move(event));
  events_changed_.notify_one();
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

void ClusterPipeline::wake() {
  const std::lock_guard lock(events_mutex_);
  woken_ = true;
  events_changed_.notify_one();
}

void ClusterPipeline::Watch::report(Loss loss) {
  const std::lock_guard lock(mutex);
  lost.push_back(std::move(loss));
  changed.notify_all();
}

void ClusterPipeline::watch() {
  while (!stopping()) {
    std::string reason;
    {
      std::unique_lock lock(watch_->mutex);
      watch_->changed.wait(lock, [this] { return stopping() || !watch_->lost.empty(); });
      if (stopping()) return;
      while (!watch_->lost.empty()) {
        Loss loss = std::move(watch_->lost.front());
        watch_->lost.pop_front();
        Seat& seat = seats_[loss.seat];
        if (loss.connection != seat.connection) continue;  // an earlier connection, replaced since
        seat.lost = true;
        reason = seat.last_error = std::move(loss.reason);
      }
    }
    if (!reason.empty()) recover(reason);
  }
}

// Closes connections that were reported lost since; stages made from them must be gone.
void ClusterPipeline::drop_lost_connections() {
  {
    const std::lock_guard lock(watch_->mutex);
    for (const Loss& loss : watch_->lost)
      if (loss.connection == seats_[loss.seat].connection) {
        seats_[loss.seat].lost = true;
        seats_[loss.seat].last_error = loss.reason;
      }
    watch_->lost.clear();
  }
  for (Seat& seat : seats_)
    if (seat.lost) {
      seat.backend.reset();
      seat.lost = false;
    }
}

// Ends the lost plan, then plans again: with the backend when it returns, or without it when the model fits the others.
void ClusterPipeline::recover(const std::string& reason) {
  spdlog::error("{}; requests in progress end with an error, new ones wait for a plan", reason);
  std::unique_ptr<ActivePlan> retired;
  {
    const std::scoped_lock lock(plan_mutex_, events_mutex_);
    retired = std::move(active_);
    if (retired) retired->retired = true;
    events_.emplace_back(engine::PlanLost{reason});
    events_changed_.notify_one();
  }
  retired.reset();
  drop_lost_connections();
  const auto give_up_waiting = Clock::now() + options_.return_wait;
  auto next_log = Clock::now();
  while (!stopping()) {
    try {
      connect_missing(Clock::now(), Refusal::waits);
      if (stopping()) return;
      const auto absent = missing();
      if (absent.empty() || Clock::now() >= give_up_waiting) {
        push(engine::PlanReady{make_plan()});
        if (!absent.empty()) spdlog::warn("serving without {}", fmt::join(absent, ", "));
        return;
      }
      if (Clock::now() >= next_log) {
        spdlog::warn("waiting for {} to return", fmt::join(absent, ", "));
        next_log = Clock::now() + kStillWaitingInterval;
      }
    } catch (const Error& error) {
      if (Clock::now() >= next_log) {
        spdlog::error("no plan yet: {}", error.what());
        next_log = Clock::now() + kStillWaitingInterval;
      }
    }
    std::unique_lock lock(watch_->mutex);
    watch_->changed.wait_for(lock, options_.retry_interval, [this] { return stopping(); });
  }
}

}  // namespace caravan::cluster
