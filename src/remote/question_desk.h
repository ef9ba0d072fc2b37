// Answers questions of connections that take a while, on threads of its own, so that no connection waits for another
// one's questions longer than it must.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

#include "remote/channel.h"

namespace caravan::remote {

// The questions of a connection are answered one after the other, in their order; the connections take turns.
class QuestionDesk {
 public:
  // Sends the answer to a question. stop: requested when nobody waits for it any more. Does not throw.
  using Answer = std::function<void(const std::stop_token& stop)>;

  // Answers at most max_threads questions at a time; of one connection at most max_waiting wait, the one that is being
  // answered included.
  QuestionDesk(uint32_t max_threads, uint32_t max_waiting) : max_threads_(max_threads), max_waiting_(max_waiting) {}
  // Stops.
  ~QuestionDesk() { stop(); }
  QuestionDesk(const QuestionDesk&) = delete;
  QuestionDesk& operator=(const QuestionDesk&) = delete;

  // Calls answer later, on a thread. False, and nothing will be called, when as many of this connection wait as may, or
  // after stop(). From any thread.
  [[nodiscard]] bool post(const std::shared_ptr<Channel>& channel, Answer answer);
  // The connection has ended: its questions are forgotten, the one that is being answered is told to stop. From any
  // thread; does not wait.
  void leave(const std::shared_ptr<Channel>& channel);
  // Forgets all questions and waits for those that are being answered, which are told to stop. Idempotent.
  void stop();

 private:
  struct Asker {
    std::shared_ptr<Channel> channel;  // shared with those who serve the connection, which may end first
    std::deque<Answer> waiting;
    std::stop_source stop;
    bool is_answered = false;  // a thread is at it
  };

  bool is_ready(const Asker& asker) const { return !asker.is_answered && !asker.waiting.empty(); }
  void work();

  const uint32_t max_threads_, max_waiting_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Asker> askers_;            // under mutex_; those with questions, whose turn it is first
  bool stopped_ = false;               // under mutex_
  std::vector<std::jthread> threads_;  // under mutex_; as many as were needed at a time
};

}  // namespace caravan::remote
