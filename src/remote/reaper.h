// A thread for what waits, in order: destructors of stages that finish a step, large unmappings; probes.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <stop_token>
#include <thread>

namespace caravan::remote {

class Reaper {
 public:
  Reaper() : thread_([this](std::stop_token stop) { work(stop); }) {}

  // Runs job on the reaper's thread, after those before.
  void post(std::function<void()> job);
  // Waits until every job posted so far has run, or stop is requested. Not from a job.
  void wait_for_earlier(std::stop_token stop);

 private:
  void work(std::stop_token stop);

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<std::function<void()>> jobs_;  // under mutex_
  uint64_t n_posted_ = 0, n_done_ = 0;      // under mutex_
  std::jthread thread_;                     // last: its destructor runs what is queued, then joins
};

}  // namespace caravan::remote
