#include "remote/question_desk.h"

#include <algorithm>
#include <utility>

namespace caravan::remote {

bool QuestionDesk::post(const std::shared_ptr<Channel>& channel, Answer answer) {
  {
    const std::lock_guard lock(mutex_);
    if (stopped_) return false;
    auto asker = std::ranges::find(askers_, channel, &Asker::channel);
    if (asker == askers_.end()) asker = askers_.insert(askers_.end(), Asker{channel, {}, {}, false});
    if (asker->waiting.size() + (asker->is_answered ? 1 : 0) >= max_waiting_) return false;
    asker->waiting.push_back(std::move(answer));
    if (askers_.size() > threads_.size() && threads_.size() < max_threads_) threads_.emplace_back([this] { work(); });
  }
  changed_.notify_one();
  return true;
}

void QuestionDesk::leave(const std::shared_ptr<Channel>& channel) {
  std::stop_source stop(std::nostopstate);
  {
    const std::lock_guard lock(mutex_);
    const auto asker = std::ranges::find(askers_, channel, &Asker::channel);
    if (asker == askers_.end()) return;
    asker->waiting.clear();
    stop = asker->stop;
    if (!asker->is_answered) askers_.erase(asker);
  }
  stop.request_stop();  // what it calls may take locks
}

void QuestionDesk::stop() {
  std::vector<std::stop_source> stops;
  std::vector<std::jthread> threads;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    for (Asker& asker : askers_) {
      asker.waiting.clear();
      stops.push_back(asker.stop);
    }
    threads = std::exchange(threads_, {});
  }
  changed_.notify_all();
  for (std::stop_source& stop : stops) stop.request_stop();
  for (std::jthread& thread : threads) thread.join();
}

void QuestionDesk::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    std::list<Asker>::iterator asker;
    changed_.wait(lock, [&] {
      asker = std::ranges::find_if(askers_, [this](const Asker& a) { return is_ready(a); });
      return stopped_ || asker != askers_.end();
    });
    if (stopped_) return;
    Answer answer = std::move(asker->waiting.front());
    asker->waiting.pop_front();
    asker->is_answered = true;
    const std::stop_token stop = asker->stop.get_token();
    lock.unlock();
    answer(stop);
    answer = nullptr;  // what it holds goes now, too
    lock.lock();
    asker->is_answered = false;
    if (asker->waiting.empty())
      askers_.erase(asker);
    else
      askers_.splice(askers_.end(), askers_, asker);  // the others come first now
  }
}

}  // namespace caravan::remote
