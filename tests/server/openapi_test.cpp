// docs/openapi.yaml describes the routes that there are. What it says of their requests and answers is checked by
// tests/clients against a running server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "server/api_harness.h"
#include "support/kit.h"

namespace caravan::server {
namespace {

// "GET /path" of every operation under "paths:". Paths are indented by two blanks, methods by four; a path that is the
// same as another one has a $ref there instead.
std::set<std::string> documented_routes() {
  std::ifstream file(caravan::testing::test_data_directory() / "../../docs/openapi.yaml");
  std::map<std::string, std::set<std::string>> methods;
  std::map<std::string, std::string> same_as;
  std::string path;
  bool in_paths = false;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != ' ') in_paths = line == "paths:";
    if (!in_paths) continue;
    if (line.rfind("  /", 0) == 0) path = line.substr(2, line.size() - 3);
    const std::string ref = "    $ref: '#/paths/~1";
    if (line.rfind(ref, 0) == 0) {
      std::string other = "/" + line.substr(ref.size(), line.size() - ref.size() - 1);
      for (size_t at; (at = other.find("~1")) != std::string::npos;) other.replace(at, 2, "/");
      same_as[path] = other;
    }
    if (line == "    get:") methods[path].insert("GET");
    if (line == "    post:") methods[path].insert("POST");
  }
  for (const auto& [other, original] : same_as) methods[other] = methods[original];
  std::set<std::string> routes;
  for (const auto& [where, names] : methods)
    for (const std::string& name : names) routes.insert(name + " " + where);
  return routes;
}

class OpenApi : public test::ApiTest {};

TEST_F(OpenApi, DescribesEveryRouteAndNoOther) {
  api_.settings.web_page = false;
  http::Router router;
  add_routes(router, api_);
  const std::vector<std::string> routes = router.routes();
  EXPECT_GT(routes.size(), 20u);
  EXPECT_THAT(documented_routes(), ::testing::ElementsAreArray(std::set<std::string>(routes.begin(), routes.end())));
}

}  // namespace
}  // namespace caravan::server
