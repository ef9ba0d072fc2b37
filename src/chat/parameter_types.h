// What JSON schemas of tools' parameters say of types: whether a text without quotes is a string or JSON.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>

namespace caravan::chat {

// A set of JSON types. A number without a fraction is integer and number.
struct JsonTypes {
  static constexpr uint8_t kString = 1, kInteger = 2, kNumber = 4, kBoolean = 8, kNull = 16, kObject = 32, kArray = 64;
  static constexpr uint8_t kAll = 127;
  uint8_t bits = 0;

  bool has_strings() const { return (bits & kString) != 0; }
  bool only_strings() const { return bits == kString; }
};

// The schema that a chain of references to places in document ("#/...") leads to; schema itself where it is none, or
// where it leads nowhere.
const nlohmann::ordered_json& resolve_references(const nlohmann::ordered_json& schema,
                                                 const nlohmann::ordered_json& document);

// The types of the values that schema, a part of document, accepts; some more where it is not understood.
JsonTypes types_of_schema(const nlohmann::ordered_json& schema, const nlohmann::ordered_json& document);

JsonTypes types_of_value(const nlohmann::ordered_json& value);

}  // namespace caravan::chat
