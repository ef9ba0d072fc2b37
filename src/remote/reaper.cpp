#include "remote/reaper.h"

namespace caravan::remote {

void Reaper::post(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    ++n_posted_;
  }
  changed_.notify_all();
}

void Reaper::wait_for_earlier(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  const uint64_t target = n_posted_;
  changed_.wait(lock, stop, [&] { return n_done_ >= target; });
}

void Reaper::work(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, stop, [&] { return !jobs_.empty(); });
    if (jobs_.empty()) return;  // stopped, and nothing is left
    std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job();
    job = nullptr;  // what it holds goes now, too
    lock.lock();
    ++n_done_;
    changed_.notify_all();
  }
}

}  // namespace caravan::remote
