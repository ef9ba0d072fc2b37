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
  // Adds a route for an exact path, or, when path ends in a name in braces ("/items/{id}"), for every path with one
  // segment in its place; an exact one goes first. HEAD is answered by the GET handler, without the body.
  void add(std::string method, std::string path, Handler handler);
  // Throws HttpError 404 for an unknown path and 405 (naming what is allowed) for an unknown method.
  const Handler& find(const std::string& method, const std::string& path) const;
  bool knows(const std::string& path) const { return methods(path) != nullptr; }
  // "GET /path" and so on, sorted by path.
  std::vector<std::string> routes() const;

 private:
  using Methods = std::map<std::string, Handler>;
  const Methods* methods(const std::string& path) const;
  std::map<std::string, Methods> routes_;            // by path
  std::map<std::string, std::string> placeholders_;  // "/items/" -> "/items/{id}"
};

}  // namespace caravan::http
