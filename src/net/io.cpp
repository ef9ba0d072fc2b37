#include "net/io.h"

#include <exception>
#include <thread>

#include "base/error.h"
#include "base/log.h"

namespace caravan::net {

struct IoThreads::Context : asio::io_context {
  Context() : asio::io_context(1), work(asio::make_work_guard(*this)), thread([this] { run(); }) {}
  // Destroys the coroutines that wait here. Before any context is destroyed: they may hold sockets of another one.
  void destroy_handlers() { shutdown(); }

  asio::executor_work_guard<asio::io_context::executor_type> work;
  std::thread thread;
};

IoThreads::IoThreads(int n_threads) {
  CARAVAN_ASSERT(n_threads >= 1, "without threads nothing runs");
  for (int i = 0; i < n_threads; ++i) contexts_.push_back(std::make_unique<Context>());
}

IoThreads::~IoThreads() {
  stop();
  for (const auto& context : contexts_) context->destroy_handlers();
}

Executor IoThreads::next_executor() { return contexts_[next_++ % contexts_.size()]->get_executor(); }

void IoThreads::stop() {
  for (const auto& context : contexts_) context->stop();
  for (const auto& context : contexts_)
    if (context->thread.joinable()) context->thread.join();
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
