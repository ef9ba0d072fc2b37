#include "http/router.h"

#include "base/error.h"

namespace caravan::http {

void Router::add(std::string method, std::string path, Handler handler) {
  if (path.ends_with('}')) placeholders_[path.substr(0, path.rfind('/') + 1)] = path;
  const bool added = routes_[std::move(path)].emplace(std::move(method), std::move(handler)).second;
  CARAVAN_ASSERT(added, "each route is added once");
}

std::vector<std::string> Router::routes() const {
  std::vector<std::string> routes;
  for (const auto& [path, handlers] : routes_)
    for (const auto& [method, handler] : handlers) routes.push_back(method + " " + path);
  return routes;
}

const Router::Methods* Router::methods(const std::string& path) const {
  auto found = routes_.find(path);
  const size_t end = path.rfind('/') + 1;
  if (found == routes_.end() && end < path.size())
    if (const auto place = placeholders_.find(path.substr(0, end)); place != placeholders_.end())
      found = routes_.find(place->second);
  return found == routes_.end() ? nullptr : &found->second;
}

const Handler& Router::find(const std::string& method, const std::string& path) const {
  const Methods* known = methods(path);
  if (known == nullptr) throw HttpError(404, "File Not Found");
  const auto handler = known->find(method == "HEAD" ? "GET" : method);
  if (handler != known->end()) return handler->second;
  std::string allowed;
  for (const auto& [name, unused] : *known) allowed += (allowed.empty() ? "" : ", ") + name;
  throw HttpError(405, path + " does not take " + method + "; allowed: " + allowed);
}

}  // namespace caravan::http
