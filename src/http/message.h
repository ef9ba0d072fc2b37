// HTTP requests and responses as plain values.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"

namespace caravan::http {

// A request that HTTP itself (not the API behind it) refuses: status and a message for the client.
class HttpError : public Error {
 public:
  HttpError(int status, const std::string& message) : Error(message), status_(status) {}
  int status() const { return status_; }

 private:
  int status_;
};

struct Request {
  std::string method;                               // upper case
  std::string path;                                 // decoded, without the query
  std::map<std::string, std::string> query;         // decoded
  std::multimap<std::string, std::string> headers;  // names in lower case
  std::string body;
  std::string peer;  // "10.0.0.2:41712"

  // The first header of that lower-case name, or "".
  std::string_view header(std::string_view name) const;
};

struct Response {
  int status = 200;
  std::string content_type = "application/json; charset=utf-8";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

// "Not Found" for 404, and so on; "Unknown" for a number without a name.
std::string_view status_text(int status);

// %XX and '+' decoded; a broken escape is kept as it is.
std::string percent_decode(std::string_view text, bool plus_is_space);

// Splits "/a/b?x=1&y=2" into path and query of request.
void parse_target(std::string_view target, Request& request);

}  // namespace caravan::http
