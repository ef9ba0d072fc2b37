// JSON in and out of the API: parsing with limits, typed fields with errors that name them.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "http/message.h"

namespace caravan::server {

using Json = nlohmann::ordered_json;

// The JSON object that a request body holds. Throws RequestError (400) for anything else, and beyond 64 levels of
// nesting.
Json parse_object(std::string_view body);

// As parse_object(), for a body that may hold any JSON value.
Json parse_json(std::string_view body);

// One line of JSON; invalid UTF-8 becomes U+FFFD.
std::string to_text(const Json& value);

// A 200 response with this body.
http::Response json_response(const Json& value);

// {"error": {"code", "message", "type"}} with more members beside the message.
Json error_body(int code, std::string_view type, std::string_view message);

// Fields of an object. null counts as absent; another type throws RequestError naming the field, the expected and found
// type.
std::optional<double> find_number(const Json& object, const char* field);
std::optional<int64_t> find_integer(const Json& object, const char* field);
std::optional<bool> find_bool(const Json& object, const char* field);
std::optional<std::string> find_text(const Json& object, const char* field);
// The field if it is there and not null, else nullptr.
const Json* find_field(const Json& object, const char* field);

}  // namespace caravan::server
