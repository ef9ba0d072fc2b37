#include "stage/local_stage.h"

#include <spdlog/spdlog.h>

#include "base/error.h"
#include "base/poller.h"

namespace caravan::stage {

LocalStage::LocalStage(device::Device& device, std::chrono::milliseconds poll)
    : device_(device), poll_(poll), worker_([this] { work(); }) {}

LocalStage::~LocalStage() {
  {
    const std::lock_guard lock(queue_mutex_);
    stopping_ = true;
    due_ = true;
  }
  queue_changed_.notify_all();
  worker_.join();
}

void LocalStage::load(const LoadRequest& request, std::span<weights::WeightSource* const> sources,
                      const ProgressFunction& on_progress) {
  {
    const std::lock_guard lock(compute_mutex_);
    session_.reset();  // what is held makes room for what comes
  }
  use(LoadedSlice::load(device_, request, sources, on_progress), request.cache);
}

void LocalStage::use(std::shared_ptr<const LoadedSlice> slice, const CacheConfig& cache) {
  const std::lock_guard lock(compute_mutex_);
  session_.reset();  // its cache must go before the next one is reserved
  session_ = std::make_unique<SliceSession>(std::move(slice), cache);
}

void LocalStage::open(uint64_t session, uint64_t epoch, OutputSink& sink) {
  const std::lock_guard lock(compute_mutex_);
  lease_ = {session, epoch, &sink};
  if (session_) session_->reset();
}

void LocalStage::enqueue(const Fence& fence, std::shared_ptr<const Batch> batch, std::vector<float> input) {
  {
    const std::lock_guard lock(queue_mutex_);
    queue_.push_back({fence, std::move(batch), std::move(input)});
    due_ = true;
  }
  queue_changed_.notify_one();
}

std::string LocalStage::numeric_class() const { return device_.info().numeric_class; }

std::shared_ptr<const LoadedSlice> LocalStage::slice() const {
  const std::lock_guard lock(compute_mutex_);
  return session_ ? session_->shared_slice() : nullptr;
}

MemoryNeed LocalStage::held() const {
  const std::lock_guard lock(compute_mutex_);
  MemoryNeed held;
  if (session_) {
    held = {session_->slice().bytes(), session_->kv_cache_bytes(), session_->scratch_bytes()};
  }
  return held;
}

void LocalStage::work() {
  Poller poller(poll_);
  for (;;) {
    poller.wait([&] { return due_.load(std::memory_order_relaxed); });
    std::unique_lock lock(queue_mutex_);
    queue_changed_.wait(lock, [&] { return due_.load(std::memory_order_relaxed); });
    poller.arrived();
    if (stopping_) return;
    Step step = std::move(queue_.front());
    queue_.pop_front();
    due_ = !queue_.empty();
    lock.unlock();
    compute(std::move(step));
  }
}

void LocalStage::compute(Step step) {
  const std::lock_guard lock(compute_mutex_);
  if (!lease_.admits(step.fence)) {
    n_dropped_.fetch_add(1, std::memory_order_relaxed);
    spdlog::debug("dropped ticket {} of session {} epoch {}: the stage is at session {} epoch {}", step.fence.ticket,
                  step.fence.session, step.fence.epoch, lease_.session, lease_.epoch);
    return;
  }
  StageOutput output;
  try {
    if (!session_) throw ProtocolError("the stage has not been loaded");
    output = session_->compute(*step.batch, step.input);
  } catch (const std::exception& error) {
    output = {};
    output.error = error.what();
  }
  output.fence = step.fence;
  lease_.sink->deliver(std::move(output));
}

}  // namespace caravan::stage
