#include "http/event.h"

#include <boost/asio/redirect_error.hpp>

namespace caravan::http {

net::awaitable<bool> AsyncEvent::wait(net::Duration timeout) {
  if (!notified_) {
    timer_.expires_after(timeout);
    boost::system::error_code cancelled;
    co_await timer_.async_wait(boost::asio::redirect_error(boost::asio::use_awaitable, cancelled));
  }
  const bool was_notified = notified_;
  notified_ = false;
  co_return was_notified;
}

void AsyncEvent::notify() {
  notified_ = true;
  timer_.cancel();
}

}  // namespace caravan::http
