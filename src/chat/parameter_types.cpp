#include "chat/parameter_types.h"

#include <cmath>
#include <string>
#include <utility>

namespace caravan::chat {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxReferences = 16;  // one after the other
constexpr int kMaxSchemas = 500;    // looked at for one answer: references may lead in circles

uint8_t named_type(const Json& name) {
  static constexpr std::pair<const char*, uint8_t> kNames[] = {{"string", JsonTypes::kString},
                                                               {"integer", JsonTypes::kInteger},
                                                               {"number", JsonTypes::kNumber | JsonTypes::kInteger},
                                                               {"boolean", JsonTypes::kBoolean},
                                                               {"null", JsonTypes::kNull},
                                                               {"object", JsonTypes::kObject},
                                                               {"array", JsonTypes::kArray}};
  for (const auto& [known, bits] : kNames)
    if (name == known) return bits;
  return 0;
}

// Without "type": what other keywords speak of.
uint8_t implied_types(const Json& schema) {
  static constexpr std::pair<const char*, uint8_t> kSigns[] = {{"properties", JsonTypes::kObject},
                                                               {"required", JsonTypes::kObject},
                                                               {"additionalProperties", JsonTypes::kObject},
                                                               {"items", JsonTypes::kArray},
                                                               {"prefixItems", JsonTypes::kArray},
                                                               {"minItems", JsonTypes::kArray},
                                                               {"maxItems", JsonTypes::kArray},
                                                               {"pattern", JsonTypes::kString},
                                                               {"minLength", JsonTypes::kString},
                                                               {"maxLength", JsonTypes::kString},
                                                               {"format", JsonTypes::kString},
                                                               {"minimum", JsonTypes::kNumber | JsonTypes::kInteger},
                                                               {"maximum", JsonTypes::kNumber | JsonTypes::kInteger}};
  for (const auto& [keyword, bits] : kSigns)
    if (schema.contains(keyword)) return bits;
  return JsonTypes::kAll;
}

uint8_t types_of(const Json& given, const Json& document, int& n_left) {
  const Json& schema = resolve_references(given, document);
  if (!schema.is_object() || --n_left < 0) return JsonTypes::kAll;
  const auto type = schema.find("type");
  const bool combined = schema.contains("anyOf") || schema.contains("oneOf") || schema.contains("allOf");
  const bool listed = schema.contains("enum") || schema.contains("const");
  uint8_t bits = combined || listed ? uint8_t{JsonTypes::kAll} : implied_types(schema);
  if (type != schema.end()) {
    bits = 0;
    if (type->is_array()) {
      for (const Json& name : *type) bits |= named_type(name);
    } else {
      bits = named_type(*type);
    }
    if (bits == 0) bits = JsonTypes::kAll;
  }
  for (const char* keyword : {"anyOf", "oneOf", "allOf"}) {
    if (!schema.contains(keyword) || !schema[keyword].is_array() || schema[keyword].empty()) continue;
    const bool all = std::string(keyword) == "allOf";
    uint8_t parts = all ? uint8_t{JsonTypes::kAll} : uint8_t{0};
    for (const Json& part : schema[keyword]) {
      const uint8_t types = types_of(part, document, n_left);
      parts = all ? parts & types : parts | types;
    }
    bits &= parts;
  }
  uint8_t values = 0;
  if (schema.contains("const")) values = types_of_value(schema["const"]).bits;
  if (schema.contains("enum") && schema["enum"].is_array())
    for (const Json& value : schema["enum"]) values |= types_of_value(value).bits;
  return values != 0 ? bits & values : bits;
}

}  // namespace

const Json& resolve_references(const Json& schema, const Json& document) {
  const Json* at = &schema;
  for (int i = 0; i < kMaxReferences && at->is_object() && at->contains("$ref"); ++i) {
    const Json& reference = (*at)["$ref"];
    const std::string text = reference.is_string() ? reference.get<std::string>() : "";
    if (!text.starts_with("#/")) break;
    try {
      at = &document.at(Json::json_pointer(text.substr(1)));
    } catch (const Json::exception&) {  // who makes a grammar of the schema says what is wrong
      break;
    }
  }
  return *at;
}

JsonTypes types_of_schema(const Json& schema, const Json& document) {
  int n_left = kMaxSchemas;
  return {types_of(schema, document, n_left)};
}

JsonTypes types_of_value(const Json& value) {
  if (value.is_string()) return {JsonTypes::kString};
  if (value.is_boolean()) return {JsonTypes::kBoolean};
  if (value.is_null()) return {JsonTypes::kNull};
  if (value.is_object()) return {JsonTypes::kObject};
  if (value.is_array()) return {JsonTypes::kArray};
  const bool whole =
      value.is_number_integer() || (value.is_number_float() && std::trunc(value.get<double>()) == value.get<double>());
  return {static_cast<uint8_t>(whole ? JsonTypes::kNumber | JsonTypes::kInteger : JsonTypes::kNumber)};
}

}  // namespace caravan::chat
