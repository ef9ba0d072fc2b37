// A stage on a device of this machine: a worker thread computes queued batches in order and delivers to the sink.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "stage/loaded_slice.h"
#include "stage/stage.h"

namespace caravan::stage {

// Longer than the other stages and the server take between two tokens of most sequences.
inline constexpr std::chrono::milliseconds kDefaultPoll{50};

class LocalStage : public Stage {
 public:
  // device must outlive the stage. poll: steps that come within this after the last one are waited for with a core
  // awake.
  explicit LocalStage(device::Device& device, std::chrono::milliseconds poll = kDefaultPoll);
  // Finishes the step in progress and drops what is queued.
  ~LocalStage() override;

  void load(const LoadRequest& request, std::span<weights::WeightSource* const> sources,
            const ProgressFunction& on_progress) override;
  // Uses a slice that is loaded already, e.g. by another server's session on the same backend.
  void use(std::shared_ptr<const LoadedSlice> slice, const CacheConfig& cache);

  void open(uint64_t session, uint64_t epoch, OutputSink& sink) override;
  void enqueue(const Fence& fence, std::shared_ptr<const Batch> batch, std::vector<float> input) override;
  std::string numeric_class() const override;

  // What is loaded; null before load().
  std::shared_ptr<const LoadedSlice> slice() const;
  // Device memory held: weights (shared ones too), KV cache and scratch. Zero before load().
  MemoryNeed held() const;
  // Tickets that did not carry the current session and epoch, since the start.
  uint64_t n_dropped() const { return n_dropped_; }

 private:
  struct Step {
    Fence fence;
    std::shared_ptr<const Batch> batch;
    std::vector<float> input;
  };
  // Who may use the stage right now.
  struct Lease {
    uint64_t session = 0, epoch = 0;
    OutputSink* sink = nullptr;
    bool admits(const Fence& fence) const {
      return sink != nullptr && fence.session == session && fence.epoch == epoch;
    }
  };

  void work();
  void compute(Step step);

  device::Device& device_;
  // Held while a step computes and delivers; open() and load() wait for it, so no sink is called after it was replaced.
  mutable std::mutex compute_mutex_;
  std::unique_ptr<SliceSession> session_;  // under compute_mutex_
  Lease lease_;                            // under compute_mutex_

  const std::chrono::milliseconds poll_;
  std::mutex queue_mutex_;
  std::condition_variable queue_changed_;
  std::deque<Step> queue_;        // under queue_mutex_
  bool stopping_ = false;         // under queue_mutex_
  std::atomic<bool> due_{false};  // stopping_ or steps in queue_; written under queue_mutex_
  std::atomic<uint64_t> n_dropped_{0};
  std::thread worker_;
};

}  // namespace caravan::stage
