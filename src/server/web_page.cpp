// GET / and the files it needs: the chat page of web/.
#include "server/api.h"
#include "server/web_files.h"

namespace caravan::server {
namespace {

std::string content_type(std::string_view name) {
  const std::string_view extension = name.substr(name.rfind('.') + 1);
  if (extension == "html") return "text/html; charset=utf-8";
  if (extension == "css") return "text/css; charset=utf-8";
  if (extension == "js") return "text/javascript; charset=utf-8";
  return "image/svg+xml";
}

http::Response file_response(const WebFile& file) {
  http::Response response;
  response.content_type = content_type(file.name);
  // Browsers ask again each time: an upgrade of the server shows at once.
  response.headers = {{"Cache-Control", "no-cache"},
                      {"X-Content-Type-Options", "nosniff"},
                      {"Content-Security-Policy", "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"}};
  response.body = file.bytes;
  return response;
}

}  // namespace

std::vector<std::string> web_paths() {
  std::vector<std::string> paths{"/"};
  for (const WebFile& file : web_files()) paths.push_back("/" + std::string(file.name));
  return paths;
}

void add_web_routes(http::Router& router, const std::string& prefix) {
  for (const WebFile& file : web_files()) {
    const http::Handler handler = [file](http::Exchange& exchange) -> net::awaitable<void> {
      http::Response response = file_response(file);
      co_await exchange.send(std::move(response));
    };
    router.add("GET", prefix + "/" + std::string(file.name), handler);
    if (file.name == "index.html") router.add("GET", prefix + "/", handler);
  }
}

}  // namespace caravan::server
