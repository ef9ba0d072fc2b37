// A flag that a coroutine can wait for.
#pragma once

#include <chrono>

#include "net/io.h"

namespace caravan::http {

// One coroutine waits, others notify. Everything is called on the executor given, a serial one; to notify from another
// thread, post to it. A notification before wait() is kept: the next wait() returns at once.
class AsyncEvent {
 public:
  explicit AsyncEvent(const net::Executor& executor) : timer_(executor) {}

  // Returns true after notify(), false when timeout passed first.
  net::awaitable<bool> wait(net::Duration timeout);
  void notify();

 private:
  boost::asio::basic_waitable_timer<std::chrono::steady_clock, boost::asio::wait_traits<std::chrono::steady_clock>,
                                    net::Executor>
      timer_;
  bool notified_ = false;
};

}  // namespace caravan::http
