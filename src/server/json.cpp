#include "server/json.h"

#include <fmt/format.h>

#include <cmath>

namespace caravan::server {
namespace {

constexpr int kMaxDepth = 64;

[[noreturn]] void wrong_type(const char* field, const char* expected, const Json& found) {
  throw RequestError(fmt::format("Field '{}': expected {}, found {}", field, expected, found.type_name()));
}

}  // namespace

Json parse_json(std::string_view body) {
  bool too_deep = false;
  const auto limit_depth = [&](int depth, nlohmann::detail::parse_event_t, Json&) {
    too_deep = too_deep || depth > kMaxDepth;
    return !too_deep;
  };
  Json value;
  try {
    value = Json::parse(body, limit_depth);
  } catch (const nlohmann::json::exception& error) {
    throw RequestError(std::string("the request body is not valid JSON: ") + error.what());
  }
  if (too_deep) throw RequestError(fmt::format("the request body is nested deeper than {} levels", kMaxDepth));
  return value;
}

Json parse_object(std::string_view body) {
  Json value = parse_json(body);
  if (!value.is_object())
    throw RequestError(fmt::format("the request body must be a JSON object, found {}", value.type_name()));
  return value;
}

std::string to_text(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

http::Response json_response(const Json& value) {
  http::Response response;
  response.body = to_text(value);
  return response;
}

Json error_body(int code, std::string_view type, std::string_view message) {
  return {{"error", {{"code", code}, {"message", message}, {"type", type}}}};
}

const Json* find_field(const Json& object, const char* field) {
  const auto found = object.find(field);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::optional<double> find_number(const Json& object, const char* field) {
  const Json* value = find_field(object, field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) wrong_type(field, "a number", *value);
  return value->get<double>();
}

std::optional<int64_t> find_integer(const Json& object, const char* field) {
  const auto number = find_number(object, field);
  if (!number) return std::nullopt;
  constexpr double kExact = 9007199254740992.0;  // 2^53: every integer up to it is a double
  if (std::floor(*number) != *number || std::abs(*number) > kExact)
    throw RequestError(fmt::format("Field '{}': expected an integer, found {}", field, *number));
  return static_cast<int64_t>(*number);
}

std::optional<bool> find_bool(const Json& object, const char* field) {
  const Json* value = find_field(object, field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) wrong_type(field, "true or false", *value);
  return value->get<bool>();
}

std::optional<std::string> find_text(const Json& object, const char* field) {
  const Json* value = find_field(object, field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) wrong_type(field, "a string", *value);
  return value->get<std::string>();
}

}  // namespace caravan::server
