// The shared middle of a TokenStream: a bounded queue that the engine thread fills and the consumer empties.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

#include "engine/pipeline.h"
#include "engine/request.h"

namespace caravan::engine {

// Lets streams wake the engine's thread, also after the engine is gone.
class Waker {
 public:
  explicit Waker(Pipeline& pipeline) : pipeline_(&pipeline) {}
  void wake() {
    std::lock_guard lock(mutex_);
    if (pipeline_) pipeline_->wake();
  }
  // From here on wake() does nothing; called before the pipeline may end.
  void disarm() {
    std::lock_guard lock(mutex_);
    pipeline_ = nullptr;
  }

 private:
  std::mutex mutex_;
  Pipeline* pipeline_;
};

class StreamState {
 public:
  StreamState(std::shared_ptr<Waker> waker, uint32_t seed, uint32_t max_events, uint64_t max_bytes)
      : waker_(std::move(waker)), seed_(seed), max_events_(max_events), max_bytes_(max_bytes) {}

  // The engine's end. Never blocks on the consumer. When the queue is over its bounds it is replaced by an ErrorEvent
  // and the stream counts as cancelled.
  void push(Event event);
  // True when the consumer left or was too slow: the request is to be dropped.
  bool cancelled() const;

  // The consumer's end, see TokenStream.
  std::optional<Event> take(std::chrono::milliseconds timeout);
  bool finished() const;
  void set_notify(std::function<void()> hook);
  void cancel();
  uint32_t seed() const { return seed_; }

 private:
  const std::shared_ptr<Waker> waker_;  // shared by all streams of an engine and the engine
  const uint32_t seed_;
  const uint32_t max_events_;
  const uint64_t max_bytes_;

  mutable std::mutex mutex_;
  std::condition_variable pushed_;
  std::deque<Event> events_;
  uint64_t bytes_ = 0;      // of the events in the queue
  bool cancelled_ = false;  // the engine is to drop the request
  bool closed_ = false;     // nothing is pushed any more

  std::mutex notify_mutex_;  // held while the hook runs; taken before mutex_, never the other way
  std::function<void()> notify_;
};

}  // namespace caravan::engine
