#include "net/io.h"

#include <exception>

#include "base/error.h"
#include "base/log.h"

namespace caravan::net {

IoThreads::IoThreads(int n_threads) : context_(n_threads), work_(asio::make_work_guard(context_)) {
  CARAVAN_ASSERT(n_threads >= 1, "an io_context without threads runs nothing");
  for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { context_.run(); });
}

IoThreads::~IoThreads() { stop(); }

void IoThreads::stop() {
  work_.reset();
  context_.stop();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void spawn(const Executor& executor, std::string name, awaitable<void> coroutine) {
  asio::co_spawn(executor, std::move(coroutine), [name = std::move(name)](std::exception_ptr failure) {
    if (!failure) return;
    try {
      std::rethrow_exception(failure);
    } catch (const std::exception& error) {
      spdlog::error("{}: {}", name, error.what());
    }
  });
}

awaitable<void> sleep_for(Duration duration) {
  asio::steady_timer timer(co_await asio::this_coro::executor, duration);
  co_await timer.async_wait(asio::use_awaitable);
}

}  // namespace caravan::net
