// A table from method and path to handlers.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "http/exchange.h"

namespace caravan::http {

// Answers one exchange. What it throws before a response was begun becomes an error response.
using Handler = std::function<net::awaitable<void>(Exchange&)>;

class Router {
 public:
  // Adds a route for an exact path. HEAD is answered by the GET handler, without the body.
  void add(std::string method, std::string path, Handler handler);
  // Throws HttpError 404 for an unknown path and 405 (naming what is allowed) for an unknown method.
  const Handler& find(const std::string& method, const std::string& path) const;
  bool knows(const std::string& path) const { return routes_.contains(path); }
  // "GET /path" and so on, sorted by path.
  std::vector<std::string> routes() const;

 private:
  std::map<std::string, std::map<std::string, Handler>> routes_;  // path -> method -> handler
};

}  // namespace caravan::http
