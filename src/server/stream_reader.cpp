#include "server/stream_reader.h"

#include <boost/asio/post.hpp>

#include "net/connection.h"

namespace caravan::server {

StreamReader::StreamReader(http::Exchange& exchange, std::vector<std::shared_ptr<engine::TokenStream>> streams)
    : exchange_(exchange),
      streams_(std::move(streams)),
      arrived_(std::make_shared<http::AsyncEvent>(exchange.executor())),
      n_open_(streams_.size()) {
  exchange_.on_client_gone([this] {
    client_gone_ = true;
    for (const auto& stream : streams_) stream->cancel();
    arrived_->notify();
  });
  for (const auto& stream : streams_)
    stream->set_notify([executor = exchange_.executor(), event = arrived_] {
      boost::asio::post(executor, [event] { event->notify(); });
    });
}

StreamReader::~StreamReader() {
  exchange_.on_client_gone({});
  for (const auto& stream : streams_) {
    stream->set_notify({});
    stream->cancel();
  }
}

net::awaitable<std::optional<StreamReader::Item>> StreamReader::next(net::Duration timeout) {
  for (;;) {
    if (client_gone_) throw net::ConnectionError(net::ConnectionError::Kind::lost, "the client has left");
    for (size_t i = 0; i < streams_.size(); ++i) {
      const size_t index = (turn_ + i) % streams_.size();
      std::optional<engine::Event> event = streams_[index]->try_next();
      if (!event) continue;
      if (engine::ends_stream(*event)) --n_open_;
      turn_ = index + 1;
      std::optional<Item> item(Item{index, std::move(*event)});
      co_return item;
    }
    const bool notified = co_await arrived_->wait(timeout);
    if (!notified) co_return std::nullopt;
  }
}

}  // namespace caravan::server
