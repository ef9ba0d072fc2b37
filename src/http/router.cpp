#include "http/router.h"

#include "base/error.h"

namespace caravan::http {

void Router::add(std::string method, std::string path, Handler handler) {
  const bool added = routes_[std::move(path)].emplace(std::move(method), std::move(handler)).second;
  CARAVAN_ASSERT(added, "each route is added once");
}

std::vector<std::string> Router::routes() const {
  std::vector<std::string> routes;
  for (const auto& [path, handlers] : routes_)
    for (const auto& [method, handler] : handlers) routes.push_back(method + " " + path);
  return routes;
}

const Handler& Router::find(const std::string& method, const std::string& path) const {
  const auto methods = routes_.find(path);
  if (methods == routes_.end()) throw HttpError(404, "File Not Found");
  const auto handler = methods->second.find(method == "HEAD" ? "GET" : method);
  if (handler != methods->second.end()) return handler->second;
  std::string allowed;
  for (const auto& [name, unused] : methods->second) allowed += (allowed.empty() ? "" : ", ") + name;
  throw HttpError(405, path + " does not take " + method + "; allowed: " + allowed);
}

}  // namespace caravan::http
