// Events of one or several token streams, awaited by a handler.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/request.h"
#include "http/event.h"
#include "http/exchange.h"

namespace caravan::server {

// Waits on all streams of a request at once. When the client leaves, all streams are cancelled and next() throws
// net::ConnectionError. Created and used on the exchange's executor.
class StreamReader {
 public:
  StreamReader(http::Exchange& exchange, std::vector<std::shared_ptr<engine::TokenStream>> streams);
  ~StreamReader();
  StreamReader(const StreamReader&) = delete;
  StreamReader& operator=(const StreamReader&) = delete;

  struct Item {
    size_t index;  // which stream
    engine::Event event;
  };
  // The next event of any stream; nullopt when `timeout` passed without one. Not to be called when finished().
  net::awaitable<std::optional<Item>> next(net::Duration timeout);
  // True when every stream has ended.
  bool finished() const { return n_open_ == 0; }

 private:
  http::Exchange& exchange_;
  std::vector<std::shared_ptr<engine::TokenStream>> streams_;
  std::shared_ptr<http::AsyncEvent> arrived_;  // shared with hooks that are posted and may run late
  size_t n_open_;
  size_t turn_ = 0;  // streams are asked in turn
  bool client_gone_ = false;
};

}  // namespace caravan::server
