// I/O threads, the executor every coroutine of this program runs on, and small helpers around them.
#pragma once

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <future>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "base/error.h"

namespace caravan::net {

namespace asio = boost::asio;
template <typename T>
using awaitable = asio::awaitable<T>;
using Executor = asio::any_io_executor;
using Duration = std::chrono::steady_clock::duration;

// Threads that each run an io_context of their own: what belongs to one connection stays on one thread, and nothing is
// handed from one to another. Whatever uses them is destroyed before this, or told to stop.
class IoThreads {
 public:
  // n_threads >= 1.
  explicit IoThreads(int n_threads);
  // Stops.
  ~IoThreads();
  IoThreads(const IoThreads&) = delete;
  IoThreads& operator=(const IoThreads&) = delete;

  // The executor of one of the threads, of each in turn. What runs on it never runs at the same time as something else
  // on it; what takes long there holds up the other connections of that thread. Thread-safe.
  Executor next_executor();
  // Ends the threads; coroutines that wait are destroyed with the context. Idempotent; not from an I/O thread.
  void stop();

 private:
  struct Context;
  std::vector<std::unique_ptr<Context>> contexts_;
  std::atomic<size_t> next_{0};
};

// Runs a coroutine on executor in the background. An exception that leaves it is logged with name.
void spawn(const Executor& executor, std::string name, awaitable<void> coroutine);

// Runs a coroutine on executor and waits for its result, or rethrows its exception. Not from an I/O thread.
template <typename T>
T run_blocking(const Executor& executor, awaitable<T> coroutine) {
  return asio::co_spawn(executor, std::move(coroutine), asio::use_future).get();
}

// As run_blocking() until stop is requested: then throws Error soon. The coroutine goes on by itself, and so must own
// what it uses.
template <typename T>
T run_blocking(const Executor& executor, awaitable<T> coroutine, const std::stop_token& stop) {
  constexpr auto kLookInterval = std::chrono::milliseconds(20);
  std::future<T> result = asio::co_spawn(executor, std::move(coroutine), asio::use_future);
  while (stop.stop_possible() && result.wait_for(kLookInterval) != std::future_status::ready)
    if (stop.stop_requested()) throw Error("given up");
  return result.get();
}

// Waits. Throws boost::system::system_error when the timer's executor goes away.
awaitable<void> sleep_for(Duration duration);

}  // namespace caravan::net
