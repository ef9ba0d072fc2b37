#include "engine/schema_merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>
#include <vector>

namespace caravan::engine {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 39> kConstraints = {"$ref",
                                                           "$dynamicRef",
                                                           "$recursiveRef",
                                                           "additionalItems",
                                                           "additionalProperties",
                                                           "allOf",
                                                           "anyOf",
                                                           "const",
                                                           "contains",
                                                           "dependencies",
                                                           "dependentRequired",
                                                           "dependentSchemas",
                                                           "else",
                                                           "enum",
                                                           "exclusiveMaximum",
                                                           "exclusiveMinimum",
                                                           "format",
                                                           "if",
                                                           "items",
                                                           "maxContains",
                                                           "maxItems",
                                                           "maxLength",
                                                           "maxProperties",
                                                           "maximum",
                                                           "minContains",
                                                           "minItems",
                                                           "minLength",
                                                           "minProperties",
                                                           "minimum",
                                                           "multipleOf",
                                                           "not",
                                                           "oneOf",
                                                           "pattern",
                                                           "patternProperties",
                                                           "prefixItems",
                                                           "properties",
                                                           "required",
                                                           "type",
                                                           "uniqueItems"};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw RequestError(fmt::format("JSON schema, at {}: {}", path, what));
}

[[noreturn]] void contradict(const std::string& path, const std::string& what) {
  throw ContradictionError(fmt::format("JSON schema, at {}: {}", path, what));
}

Json both(const Json& a, const Json& b) {
  if (a == b || b == Json(true)) return a;
  if (a == Json(true)) return b;
  if (a == Json(false) || b == Json(false)) return false;
  return {{"allOf", {a, b}}};
}

Json merged_types(const Json& a, const Json& b, const std::string& path) {
  const auto list = [&](const Json& type) {
    std::vector<std::string> names;
    for (const Json& name : type.is_array() ? type : Json::array({type})) {
      if (!name.is_string()) fail(path + "/type", "expected a name or a list of names");
      names.push_back(name.get<std::string>());
    }
    return names;
  };
  const std::vector<std::string> first = list(a), second = list(b);
  const auto in = [](const std::vector<std::string>& names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  Json types = Json::array();
  for (const std::string& name : first) {
    if (in(second, name) || (name == "integer" && in(second, "number"))) {
      types.push_back(name);
    } else if (name == "number" && in(second, "integer")) {
      types.push_back("integer");
    }
  }
  if (types.empty()) contradict(path + "/type", "no type is allowed by all parts");
  return types.size() == 1 ? types[0] : types;
}

// A value of enum that both have; const counts as an enum of one.
void merge_values(Json& merged, const Json& b, const std::string& path) {
  const auto values = [](const Json& schema) {
    return schema.contains("const") ? Json::array({schema["const"]}) : schema["enum"];
  };
  if (!merged.contains("enum") && !merged.contains("const")) {
    merged["enum"] = values(b);
    return;
  }
  const Json first = values(merged), second = values(b);
  if (!first.is_array() || !second.is_array()) fail(path + "/enum", "expected an array of values");
  Json common = Json::array();
  for (const Json& value : first)
    if (std::find(second.begin(), second.end(), value) != second.end()) common.push_back(value);
  if (common.empty()) contradict(path + "/enum", "no value is allowed by all parts");
  merged.erase("const");
  merged["enum"] = std::move(common);
}

// a's properties and b's; one that only one side names must fit the other's additionalProperties.
Json merged_properties(const Json& a, const Json& b, const std::string& path) {
  const auto properties = [&](const Json& schema) {
    Json value = schema.value("properties", Json::object());
    if (!value.is_object()) fail(path + "/properties", "expected an object");
    return value;
  };
  const Json first = properties(a), second = properties(b);
  const Json first_rest = a.value("additionalProperties", Json(true));
  const Json second_rest = b.value("additionalProperties", Json(true));
  Json merged = Json::object();
  for (const auto& [key, value] : first.items())
    merged[key] = both(value, second.contains(key) ? second[key] : second_rest);
  for (const auto& [key, value] : second.items())
    if (!first.contains(key)) merged[key] = both(first_rest, value);
  return merged;
}

void merge_keyword(Json& merged, const std::string& key, const Json& value, const std::string& path) {
  static const std::set<std::string> kMost = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"};
  static const std::set<std::string> kLeast = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"};
  Json& old = merged[key];
  if (old == value) return;
  if (key == "type") {
    old = merged_types(old, value, path);
  } else if (key == "required") {
    if (!old.is_array() || !value.is_array()) fail(path + "/required", "expected an array of names");
    for (const Json& name : value)
      if (std::find(old.begin(), old.end(), name) == old.end()) old.push_back(name);
  } else if (kMost.count(key) > 0 || kLeast.count(key) > 0) {
    if (!old.is_number() || !value.is_number()) fail(path + "/" + key, "expected a number");
    const bool larger = value.get<double>() > old.get<double>();
    if (larger == (kMost.count(key) > 0)) old = value;
  } else if (key == "additionalProperties" || key == "items") {
    if (old.is_array() || value.is_array()) fail(path + "/" + key, "two lists of items cannot be combined");
    old = both(old, value);
  } else {
    fail(path + "/" + key, "this keyword stands in two parts that hold together, which is not supported");
  }
}

}  // namespace

bool is_constraint(std::string_view keyword) {
  return std::find(kConstraints.begin(), kConstraints.end(), keyword) != kConstraints.end();
}

bool constrains_beside(const Json& schema, std::string_view keyword) {
  for (const auto& [key, value] : schema.items())
    if (key != keyword && is_constraint(key)) return true;
  return false;
}

Json merge_schemas(const Json& a, const Json& b, const std::string& path) {
  for (const Json* schema : {&a, &b}) {
    if (*schema == Json(false)) contradict(path, "false accepts no value");
    if (!schema->is_object() && *schema != Json(true)) fail(path, "expected an object or a boolean");
  }
  if (a == Json(true)) return b;
  if (b == Json(true)) return a;
  Json merged = a;
  if (a.contains("properties") || b.contains("properties")) merged["properties"] = merged_properties(a, b, path);
  if (b.contains("enum") || b.contains("const")) merge_values(merged, b, path);
  for (const auto& [key, value] : b.items()) {
    if (key == "properties" || key == "enum" || key == "const") continue;
    if (!merged.contains(key)) {
      merged[key] = value;
    } else if (is_constraint(key)) {
      merge_keyword(merged, key, value, path);
    }
  }
  return merged;
}

}  // namespace caravan::engine
