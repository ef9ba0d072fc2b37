#include "engine/json_schema.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/gbnf.h"
#include "engine/json_pattern.h"
#include "engine/number_range.h"
#include "engine/schema_merge.h"
#include "vocab/utf8.h"

namespace caravan::engine {

using Json = nlohmann::ordered_json;

namespace {

constexpr size_t kMaxConversions = 20'000;  // schemas met, references counted each time they are combined with others
constexpr size_t kMaxDepth = 200;
constexpr uint32_t kMaxLength = 100'000;  // of strings

// What every schema grammar builds on. Control characters and unpaired surrogates never stand in a JSON string.
constexpr std::string_view kSpace = R"(| " " | "\n"{1,2} [ \t]{0,20})";
constexpr std::string_view kPlain = R"([^"\\\x7F\x00-\x1F)";
constexpr std::string_view kEscape =
    R"(("\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})"
    R"( | [dD] [89abAB] [0-9a-fA-F]{2} "\\u" [dD] [c-fC-F] [0-9a-fA-F]{2}))))";
constexpr std::string_view kNumber = R"("-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?)";
// Days that exist: months of 31 and of 30 days, February, and its 29th in years divisible by 4 but not by 100 unless
// by 400.
constexpr std::string_view kDate =
    R"([0-9]{4} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]))"
    R"( | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])))"
    R"( | ([0-9] [0-9] ("0" [48] | [2468] [048] | [13579] [26]) | ("0" [048] | [2468] [048] | [13579] [26]) "00") "-02-29")";
constexpr std::string_view kTime = R"(([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})?)"
                                   R"( ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]))";
constexpr std::string_view kUuid = R"(hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12})";

// Validation keywords that exist and are not understood.
constexpr std::string_view kRefused[] = {"not",
                                         "if",
                                         "then",
                                         "else",
                                         "dependentSchemas",
                                         "dependentRequired",
                                         "dependencies",
                                         "contains",
                                         "minContains",
                                         "maxContains",
                                         "multipleOf",
                                         "patternProperties",
                                         "propertyNames",
                                         "unevaluatedProperties",
                                         "unevaluatedItems",
                                         "$dynamicRef",
                                         "$recursiveRef"};

// A character inside a class.
std::string in_class(char32_t c) { return fmt::format("\\U{:08X}", static_cast<uint32_t>(c)); }

std::u32string code_points(std::string_view text) {
  std::u32string points;
  for (size_t at = 0; at < text.size();) {
    const vocab::Utf8Char c = vocab::decode_utf8(text, at);
    points += c.code_point;
    at += c.length;
  }
  return points;
}

// For a text that ends with the first n characters of mark and no more of it: how many it ends with after one more
// character c (Knuth, Morris & Pratt 1977, "Fast Pattern Matching in Strings").
size_t longest_beginning(const std::u32string& mark, size_t n, char32_t c) {
  const std::u32string text = mark.substr(0, n) + c;
  size_t length = std::min(text.size(), mark.size());
  while (!text.ends_with(mark.substr(0, length))) --length;
  return length;
}

bool is_name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

}  // namespace

std::string grammar_literal(std::string_view text) {
  std::string literal = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      literal += fmt::format("\\{}", c);
    } else if (static_cast<uint8_t>(c) < 0x20 || c == 0x7F) {
      literal += fmt::format("\\x{:02X}", static_cast<uint8_t>(c));
    } else {
      literal += c;
    }
  }
  return literal + '"';
}

// Converts one document; rules go to a SchemaGrammar, which may hold those of others. A converted schema is a GBNF
// expression that can be followed by a repetition: a name, or something in parentheses.
class SchemaConverter {
 public:
  SchemaConverter(SchemaGrammar& grammar, const Json& document) : grammar_(grammar), document_(document) {}

  std::string convert(const Json& schema, const std::string& path, const std::string& name);

 private:
  [[noreturn]] void fail(const std::string& path, const std::string& what) const {
    throw RequestError(fmt::format("JSON schema, at {}: {}", path, what));
  }

  std::string convert_object_schema(const Json& schema, const std::string& path, const std::string& name);
  void refuse_unsupported(const Json& schema, const std::string& path) const;
  Json without_combiners(const Json& schema, const std::string& path);
  const Json& target_of(const Json& ref, const std::string& path) const;
  std::string reference(const Json& ref, const std::string& path);
  std::string alternatives(const Json& schema, const char* keyword, const std::string& path, const std::string& name);
  std::string values(const Json& schema, const std::string& path);
  std::string of_type(const std::string& type, const Json& schema, const std::string& path, const std::string& name);
  std::string object(const Json& schema, const std::string& path, const std::string& name);
  std::string members(const Json& schema, const std::string& path, const std::string& name);
  std::string additional_member(const Json& schema, const std::string& path, const std::string& name);
  std::string other_key(const std::vector<std::string>& names, const std::string& name);
  std::string array(const Json& schema, const std::string& path, const std::string& name);
  std::string string(const Json& schema, const std::string& path, const std::string& name);
  std::string integer(const Json& schema, const std::string& path, const std::string& name);
  std::string number(const Json& schema, const std::string& path, const std::string& name);

  std::optional<uint32_t> count(const Json& schema, const char* keyword, const std::string& path, uint32_t most) const;
  std::optional<double> bound(const Json& schema, const char* keyword, const std::string& path) const;
  // value as it is written, as a GBNF literal.
  std::string literal(const Json& value, const std::string& path) const {
    const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    const std::string& forbidden = grammar_.notation_.forbidden;
    if (!forbidden.empty() && text.find(forbidden) != text.npos)
      fail(path, fmt::format("{} holds '{}', which cannot be written here", text, forbidden));
    return grammar_literal(text);
  }
  std::string quoted(std::string_view name, std::string_view body) {
    return grammar_.add_rule(name, fmt::format(R"("\"" ({}) "\"")", body));
  }

  SchemaGrammar& grammar_;
  const Json& document_;
  std::map<std::string, std::string> references_;  // rule by pointer
  size_t n_conversions_ = 0, depth_ = 0;
};

namespace {

std::string joined(const std::vector<std::string>& alternatives) {
  return fmt::format("({})", fmt::join(alternatives, " | "));
}

// expression, least to most times; most unset: without limit. Counts beyond what a grammar repeats are made of blocks.
std::string repeated(const std::string& expression, uint32_t least, std::optional<uint32_t> most) {
  constexpr uint32_t kBlock = 100;
  const auto exactly = [&](uint32_t n) {
    if (n <= kMaxGrammarRepetitions) return n == 1 ? expression : fmt::format("{}{{{}}}", expression, n);
    return fmt::format("({}{{{}}}){{{}}} {}{{{}}}", expression, kBlock, n / kBlock, expression, n % kBlock);
  };
  const std::string first = least == 0 ? "" : exactly(least) + " ";
  if (!most) return first + expression + "*";
  const uint32_t more = *most - least;
  if (more == 0) return least == 0 ? "\"\"" : first;
  if (more <= kMaxGrammarRepetitions) return fmt::format("{}{}{{0,{}}}", first, expression, more);
  // Fewer than all blocks and a rest shorter than a block, or all blocks and what is left.
  return fmt::format("{}(({}{{{}}}){{0,{}}} {}{{0,{}}} | ({}{{{}}}){{{}}} {}{{0,{}}})", first, expression, kBlock,
                     more / kBlock - 1, expression, kBlock - 1, expression, kBlock, more / kBlock, expression,
                     more % kBlock);
}

bool has_type(const Json& value, const std::string& type) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "null") return value.is_null();
  if (type == "number") return value.is_number();
  const bool whole = value.is_number_float() && std::trunc(value.get<double>()) == value.get<double>();
  return value.is_number_integer() || whole;
}

std::vector<std::string> types_of(const Json& schema) {
  const auto at = schema.find("type");
  if (at == schema.end()) return {};
  if (at->is_string()) return {at->get<std::string>()};
  std::vector<std::string> types;
  for (const Json& type : *at) types.push_back(type.get<std::string>());
  return types;
}

// What a schema without "type" speaks of; llama.cpp's converter reads it like that, too.
std::optional<std::string> implied_type(const Json& schema) {
  constexpr std::pair<const char*, const char*> kSigns[] = {
      {"properties", "object"},      {"additionalProperties", "object"},
      {"required", "object"},        {"minProperties", "object"},
      {"maxProperties", "object"},   {"items", "array"},
      {"prefixItems", "array"},      {"minItems", "array"},
      {"maxItems", "array"},         {"pattern", "string"},
      {"minLength", "string"},       {"maxLength", "string"},
      {"format", "string"},          {"minimum", "number"},
      {"maximum", "number"},         {"exclusiveMinimum", "number"},
      {"exclusiveMaximum", "number"}};
  for (const auto& [keyword, type] : kSigns)
    if (schema.contains(keyword)) return type;
  return std::nullopt;
}

}  // namespace

std::string SchemaConverter::convert(const Json& schema, const std::string& path, const std::string& name) {
  if (++n_conversions_ > kMaxConversions || depth_ > kMaxDepth)
    fail(path, "the schema is too large, or combines references without end");
  if (schema.is_boolean()) {
    if (!schema.get<bool>()) fail(path, "false accepts no value");
    return "value";
  }
  if (!schema.is_object()) fail(path, fmt::format("expected an object or a boolean, found {}", schema.type_name()));
  ++depth_;
  std::string expression = convert_object_schema(schema, path, name);
  --depth_;
  return expression;
}

std::string SchemaConverter::convert_object_schema(const Json& schema, const std::string& path,
                                                   const std::string& name) {
  refuse_unsupported(schema, path);
  if (schema.contains("$ref") && !constrains_beside(schema, "$ref")) return reference(schema["$ref"], path + "/$ref");
  if (schema.contains("$ref") || schema.contains("allOf")) {
    ++depth_;
    std::string expression = convert(without_combiners(schema, path), path, name);
    --depth_;
    return expression;
  }
  for (const char* keyword : {"anyOf", "oneOf"})
    if (schema.contains(keyword)) return alternatives(schema, keyword, path, name);
  if (schema.contains("enum") || schema.contains("const")) return values(schema, path);
  std::vector<std::string> types = types_of(schema);
  if (types.empty()) {
    const std::optional<std::string> implied = implied_type(schema);
    if (!implied) return "value";
    types = {*implied};
  }
  if (types.size() == 1) return of_type(types.front(), schema, path, name);
  std::vector<std::string> expressions;
  for (const std::string& type : types) expressions.push_back(of_type(type, schema, path, name + "-" + type));
  return joined(expressions);
}

void SchemaConverter::refuse_unsupported(const Json& schema, const std::string& path) const {
  for (const std::string_view keyword : kRefused)
    if (schema.contains(keyword)) fail(fmt::format("{}/{}", path, keyword), "this keyword is not supported");
  const auto unique = schema.find("uniqueItems");
  if (unique != schema.end() && *unique != Json(false)) fail(path + "/uniqueItems", "this keyword is not supported");
  const auto type = schema.find("type");
  if (type == schema.end()) return;
  const auto known = [](const Json& value) {
    static const std::set<std::string> kTypes = {"object", "array", "string", "integer", "number", "boolean", "null"};
    return value.is_string() && kTypes.count(value.get<std::string>()) > 0;
  };
  const bool valid = type->is_array() ? !type->empty() && std::all_of(type->begin(), type->end(), known) : known(*type);
  if (!valid)
    fail(path + "/type",
         fmt::format("expected object, array, string, integer, number, boolean, null or a list of them, "
                     "found {}",
                     type->dump(-1, ' ', false, Json::error_handler_t::replace)));
}

// The schema with what its $ref and allOf demand put into it.
Json SchemaConverter::without_combiners(const Json& schema, const std::string& path) {
  if (!schema.is_object()) return schema;
  Json merged = schema;
  merged.erase("$ref");
  merged.erase("allOf");
  const auto add = [&](const Json& part, const std::string& part_path) {
    if (++n_conversions_ > kMaxConversions || depth_ > kMaxDepth)
      fail(path, "the schema is too large, or combines references without end");
    if (part.is_object()) refuse_unsupported(part, part_path);
    ++depth_;
    merged = merge_schemas(merged, without_combiners(part, part_path), part_path);
    --depth_;
  };
  if (schema.contains("$ref")) add(target_of(schema["$ref"], path + "/$ref"), path + "/$ref");
  if (schema.contains("allOf")) {
    const Json& parts = schema["allOf"];
    if (!parts.is_array() || parts.empty()) fail(path + "/allOf", "expected an array of schemas");
    for (size_t i = 0; i < parts.size(); ++i) add(parts[i], fmt::format("{}/allOf/{}", path, i));
  }
  return merged;
}

// A JSON pointer (RFC 6901) in a URI fragment.
const Json& SchemaConverter::target_of(const Json& ref, const std::string& path) const {
  if (!ref.is_string()) fail(path, "expected a string");
  const std::string text = ref.get<std::string>();
  if (text.empty() || text[0] != '#')
    fail(path, fmt::format("only references into the schema itself (#/...) are supported, found '{}'", text));
  std::string pointer;
  for (size_t i = 1; i < text.size(); ++i) {
    if (text[i] != '%') {
      pointer += text[i];
      continue;
    }
    const auto hex = [&](size_t at) {
      return at < text.size() ? std::string_view("0123456789abcdef")
                                    .find(static_cast<char>(std::tolower(static_cast<unsigned char>(text[at]))))
                              : std::string_view::npos;
    };
    const size_t high = hex(i + 1), low = hex(i + 2);
    if (high == std::string_view::npos || low == std::string_view::npos) fail(path, "'%' without two digits");
    pointer += static_cast<char>(high * 16 + low);
    i += 2;
  }
  if (!pointer.empty() && pointer[0] != '/')
    fail(path, fmt::format("'{}' is an anchor; only #/... is supported", text));
  const Json* target = &document_;
  for (size_t begin = 1; begin <= pointer.size();) {
    const size_t end = std::min(pointer.find('/', begin), pointer.size());
    std::string key;
    for (size_t i = begin; i < end; ++i) {
      const bool escaped = pointer[i] == '~' && i + 1 < end && (pointer[i + 1] == '0' || pointer[i + 1] == '1');
      key += escaped ? (pointer[++i] == '0' ? '~' : '/') : pointer[i];
    }
    const Json* next = nullptr;
    if (target->is_object() && target->contains(key)) {
      next = &(*target)[key];
    } else if (target->is_array() && !key.empty() && key.size() < 7 &&
               std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; }) &&
               static_cast<size_t>(std::stoul(key)) < target->size()) {
      next = &(*target)[static_cast<size_t>(std::stoul(key))];
    }
    if (next == nullptr) fail(path, fmt::format("there is no '{}' in the schema", text));
    target = next;
    begin = end + 1;
  }
  return *target;
}

std::string SchemaConverter::reference(const Json& ref, const std::string& path) {
  const Json& target = target_of(ref, path);
  const std::string pointer = ref.get<std::string>();
  const auto known = references_.find(pointer);
  if (known != references_.end()) return known->second;
  const size_t slash = pointer.find_last_of('/');
  const std::string name = grammar_.reserve(slash == pointer.npos ? "document" : pointer.substr(slash + 1));
  references_[pointer] = name;
  std::string body = convert(target, pointer, name);
  grammar_.rules_[name] = std::move(body);
  return name;
}

// anyOf, and oneOf as if it were anyOf, each together with what stands beside it. Alternatives that contradict the rest
// vanish.
std::string SchemaConverter::alternatives(const Json& schema, const char* keyword, const std::string& path,
                                          const std::string& name) {
  const Json& parts = schema[keyword];
  const std::string parts_path = fmt::format("{}/{}", path, keyword);
  if (!parts.is_array() || parts.empty()) fail(parts_path, "expected an array of schemas");
  Json base = schema;
  base.erase(keyword);
  const bool alone = !constrains_beside(schema, keyword);
  std::vector<std::string> expressions;
  std::string contradiction;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string part_path = fmt::format("{}/{}", parts_path, i);
    const std::string part_name = fmt::format("{}-{}", name, i);
    if (alone) {
      expressions.push_back(convert(parts[i], part_path, part_name));
      continue;
    }
    Json merged;
    try {
      if (parts[i].is_object()) refuse_unsupported(parts[i], part_path);
      merged = merge_schemas(base, without_combiners(parts[i], part_path), part_path);
    } catch (const ContradictionError& error) {
      contradiction = error.what();
      continue;
    }
    expressions.push_back(convert(merged, part_path, part_name));
  }
  if (expressions.empty()) throw RequestError(contradiction);
  return joined(expressions);
}

std::string SchemaConverter::values(const Json& schema, const std::string& path) {
  for (const auto& [keyword, value] : schema.items()) {
    if (keyword != "type" && keyword != "enum" && keyword != "const" && is_constraint(keyword))
      fail(path + "/" + keyword, "this keyword is not supported beside enum or const");
  }
  Json all = Json::array();
  if (schema.contains("enum")) {
    if (!schema["enum"].is_array() || schema["enum"].empty()) fail(path + "/enum", "expected an array of values");
    all = schema["enum"];
  } else {
    all.push_back(schema["const"]);
  }
  const std::vector<std::string> types = types_of(schema);
  std::vector<std::string> literals;
  for (const Json& value : all) {
    const bool fits = types.empty() || std::any_of(types.begin(), types.end(),
                                                   [&](const std::string& type) { return has_type(value, type); });
    if (!fits || (schema.contains("const") && value != schema["const"])) continue;
    literals.push_back(literal(value, path));
  }
  if (literals.empty()) fail(path, "no value of enum or const fits the rest of the schema");
  return joined(literals);
}

std::string SchemaConverter::of_type(const std::string& type, const Json& schema, const std::string& path,
                                     const std::string& name) {
  if (type == "object") return object(schema, path, name);
  if (type == "array") return array(schema, path, name);
  if (type == "string") return string(schema, path, name);
  if (type == "integer") return integer(schema, path, name);
  if (type == "number") return number(schema, path, name);
  return type;  // boolean and null are rules of every grammar
}

std::string SchemaConverter::object(const Json& schema, const std::string& path, const std::string& name) {
  const bool has_members = schema.contains("properties") || schema.contains("required");
  if (!has_members && !schema.contains("additionalProperties") && !schema.contains("minProperties") &&
      !schema.contains("maxProperties")) {
    return "object";
  }
  const std::string inside = members(schema, path, name);
  return grammar_.add_rule(name,
                           inside.empty() ? R"("{" space "}")" : fmt::format(R"("{{" space {} space "}}")", inside));
}

// `"key": value` of a member that is not in properties; empty when there may be none.
std::string SchemaConverter::additional_member(const Json& schema, const std::string& path, const std::string& name) {
  const auto additional = schema.find("additionalProperties");
  if (additional == schema.end()) {
    if (schema.contains("properties") || schema.contains("required")) return "";  // as llama.cpp has it
  } else if (*additional == Json(false)) {
    return "";
  }
  const std::string value = additional == schema.end() || *additional == Json(true)
                                ? "value"
                                : convert(*additional, path + "/additionalProperties", name + "-value");
  std::vector<std::string> names;
  if (schema.contains("properties"))
    for (const auto& [key, unused] : schema["properties"].items()) names.push_back(key);
  if (schema.contains("required"))
    for (const Json& key : schema["required"]) names.push_back(key.get<std::string>());
  return grammar_.add_rule(name + "-other", fmt::format(R"({} ":" space {})", other_key(names, name), value));
}

// The members between the braces, in the order of properties: what is required must come, the rest may.
std::string SchemaConverter::members(const Json& schema, const std::string& path, const std::string& name) {
  std::set<std::string> required;
  if (schema.contains("required")) {
    const Json& names = schema["required"];
    if (!names.is_array() || !std::all_of(names.begin(), names.end(), [](const Json& n) { return n.is_string(); }))
      fail(path + "/required", "expected an array of names");
    for (const Json& key : names) required.insert(key.get<std::string>());
  }
  const Json properties = schema.value("properties", Json::object());
  if (!properties.is_object()) fail(path + "/properties", "expected an object");

  struct Member {
    std::string text;
    bool required;
  };
  std::vector<Member> all;
  const auto add_member = [&](const std::string& key, const Json& value, const std::string& value_path) {
    const bool needed = required.erase(key) > 0;
    if (value == Json(false) && !needed) return;
    const std::string member_name = name + "-" + key;
    const std::string key_text = literal(Json(key), value_path);
    all.push_back({fmt::format("{} \":\" space {}", key_text, convert(value, value_path, member_name)), needed});
  };
  for (const auto& [key, value] : properties.items()) add_member(key, value, path + "/properties/" + key);
  const Json rest = schema.value("additionalProperties", Json(true));
  const std::set<std::string> undeclared = required;
  for (const std::string& key : undeclared) {
    if (rest == Json(false)) fail(path + "/required", fmt::format("'{}' is required, but not allowed", key));
    add_member(key, rest, path + "/additionalProperties");
  }

  const std::string other = additional_member(schema, path, name);
  const auto least = count(schema, "minProperties", path, kMaxGrammarRepetitions);
  const auto most = count(schema, "maxProperties", path, kMaxGrammarRepetitions);
  if (least || most) {
    if (!all.empty()) fail(path, "minProperties and maxProperties are supported only without named properties");
    if (other.empty() || most == 0u) {
      if (least.value_or(0) > 0) fail(path + "/minProperties", "no property is allowed");
      return "";
    }
    if (most && *most < least.value_or(0)) fail(path + "/maxProperties", "it is below minProperties");
    const std::string next = fmt::format(R"(("," space {}))", other);
    const std::string some =
        other + " " +
        repeated(next, std::max(least.value_or(0), 1u) - 1, most ? std::optional(*most - 1) : std::nullopt);
    return least.value_or(0) > 0 ? some : fmt::format("({})?", some);
  }

  // after: what may follow once a member was written. first: the members, none written yet.
  std::string after = other.empty() ? "" : fmt::format(R"(("," space {})*)", other);
  std::string first = other.empty() ? "" : fmt::format("({} {})?", other, after);
  for (size_t i = all.size(); i-- > 0;) {
    const Member& member = all[i];
    if (member.required) {
      first = member.text + " " + after;
    } else {
      // The part after a member stands in the text twice from here on.
      if (i > 0 && !after.empty()) after = grammar_.add_rule(fmt::format("{}-after-{}", name, i), after);
      const std::string with = member.text + " " + after;
      first = first.empty()
                  ? fmt::format("({})?", with)
                  : grammar_.add_rule(fmt::format("{}-from-{}", name, i), fmt::format("{} | {}", with, first));
    }
    after = member.required ? fmt::format(R"("," space {} {})", member.text, after)
                            : fmt::format(R"(("," space {})? {})", member.text, after);
  }
  return first;
}

// A key other than names, without escapes: along the tree of names, somewhere it must part from it.
std::string SchemaConverter::other_key(const std::vector<std::string>& names, const std::string& name) {
  if (names.empty()) return "string";
  struct Node {
    std::map<char32_t, Node> next;
    bool is_name = false;
  };
  Node tree;
  for (const std::string& key : names) {
    Node* node = &tree;
    for (size_t at = 0; at < key.size();) {
      const vocab::Utf8Char c = vocab::decode_utf8(key, at);
      node = &node->next[c.code_point];
      at += c.length;
    }
    node->is_name = true;
  }
  const std::string plain = grammar_.add_rule("key-char", grammar_.plain_class() + "]");
  // Deep names would nest deeply: one rule per node.
  size_t n_rules = 0;
  const auto rest_of = [&](const auto& self, const Node& node) -> std::string {
    std::vector<std::string> ways;
    std::string taken;
    for (const auto& [c, child] : node.next) {
      taken += in_class(c);
      ways.push_back(fmt::format("[{}] {}", in_class(c), self(self, child)));
    }
    ways.push_back(fmt::format("{}{}] {}*", grammar_.plain_class(), taken, plain));
    if (!node.is_name) ways.push_back("\"\"");
    return grammar_.add_rule(fmt::format("{}-key-{}", name, ++n_rules), joined(ways));
  };
  const std::string body = rest_of(rest_of, tree);
  return quoted(name + "-key", body);
}

std::string SchemaConverter::array(const Json& schema, const std::string& path, const std::string& name) {
  const bool tuple = schema.contains("items") && schema["items"].is_array();
  const char* first_keyword = tuple ? "items" : "prefixItems";
  const char* rest_keyword = tuple ? "additionalItems" : "items";
  const Json first = schema.value(first_keyword, Json::array());
  if (!first.is_array()) fail(path + "/prefixItems", "expected an array of schemas");
  constexpr size_t kMaxTuple = 60;  // each element nests one group deeper
  if (first.size() > kMaxTuple) fail(path + "/" + first_keyword, fmt::format("more than {} elements", kMaxTuple));
  const Json rest = schema.value(rest_keyword, Json(true));
  const auto n_first = static_cast<uint32_t>(first.size());
  const uint32_t least = count(schema, "minItems", path, kMaxGrammarRepetitions).value_or(0);
  std::optional<uint32_t> most = count(schema, "maxItems", path, kMaxGrammarRepetitions);
  if (rest == Json(false)) most = std::min(most.value_or(n_first), n_first);
  if (most && *most < least)
    fail(path, fmt::format("at least {} elements are wanted, at most {} allowed", least, *most));

  std::string elements;
  if (!most || *most > n_first) {
    const std::string element = convert(rest, path + "/" + rest_keyword, name + "-item");
    const uint32_t more = least > n_first ? least - n_first : 0;
    const std::optional<uint32_t> most_more = most ? std::optional(*most - n_first) : std::nullopt;
    const std::string next = fmt::format(R"(("," space {}))", element);
    if (n_first > 0) {
      elements = repeated(next, more, most_more);
    } else {
      elements = element + " " +
                 repeated(next, std::max(more, 1u) - 1, most_more ? std::optional(*most_more - 1) : std::nullopt);
      if (least == 0) elements = fmt::format("({})?", elements);
    }
  }
  for (uint32_t i = n_first; i-- > 0;) {
    if (most && i >= *most) continue;
    const std::string element =
        convert(first[i], fmt::format("{}/{}/{}", path, first_keyword, i), fmt::format("{}-{}", name, i));
    const std::string comma = i > 0 ? R"("," space )" : "";
    elements = fmt::format("{}{} {}", comma, element, elements);
    if (i >= least) elements = fmt::format("({})?", elements);
  }
  return grammar_.add_rule(name, fmt::format(R"("[" space {} space "]")", elements));
}

std::string SchemaConverter::string(const Json& schema, const std::string& path, const std::string& name) {
  const auto least = count(schema, "minLength", path, kMaxLength);
  const auto most = count(schema, "maxLength", path, kMaxLength);
  const bool lengths = least.value_or(0) > 0 || most;
  if (schema.contains("pattern")) {
    if (!schema["pattern"].is_string()) fail(path + "/pattern", "expected a string");
    if (lengths) fail(path + "/pattern", "minLength and maxLength are not supported beside pattern");
    try {
      return quoted(name, grammar_for_pattern(schema["pattern"].get<std::string>(), "char"));
    } catch (const RequestError& error) {
      fail(path + "/pattern", error.what());
    }
  }
  const Json format = schema.value("format", Json());
  if (!format.is_null() && !format.is_string()) fail(path + "/format", "expected a string");
  if (format == "date" || format == "time" || format == "date-time" || format == "uuid") {
    if (lengths) fail(path + "/format", "minLength and maxLength are not supported beside this format");
    if (format == "uuid") return quoted("uuid-string", kUuid);
    if (format == "date-time") return quoted("date-time-string", R"(date "T" time)");
    return quoted(format.get<std::string>() + "-string", format.get<std::string>());
  }
  if (!lengths) return "string";
  if (most && *most < least.value_or(0)) fail(path + "/maxLength", "it is below minLength");
  return quoted(name, repeated("char", least.value_or(0), most));
}

std::string SchemaConverter::integer(const Json& schema, const std::string& path, const std::string& name) {
  const NumberBounds bounds{bound(schema, "minimum", path), bound(schema, "exclusiveMinimum", path),
                            bound(schema, "maximum", path), bound(schema, "exclusiveMaximum", path)};
  try {
    const std::string body = grammar_for_integers(bounds);
    return grammar_.add_rule(bounds.empty() ? "integer" : name, body);
  } catch (const RequestError& error) {
    fail(path, error.what());
  }
}

std::string SchemaConverter::number(const Json& schema, const std::string& path, const std::string& name) {
  const NumberBounds bounds{bound(schema, "minimum", path), bound(schema, "exclusiveMinimum", path),
                            bound(schema, "maximum", path), bound(schema, "exclusiveMaximum", path)};
  if (bounds.empty()) return "number";
  try {
    return grammar_.add_rule(name, grammar_for_numbers(bounds));
  } catch (const RequestError& error) {
    fail(path, error.what());
  }
}

std::optional<uint32_t> SchemaConverter::count(const Json& schema, const char* keyword, const std::string& path,
                                               uint32_t most) const {
  const auto at = schema.find(keyword);
  if (at == schema.end()) return std::nullopt;
  const bool whole = at->is_number() && at->get<double>() >= 0 && std::trunc(at->get<double>()) == at->get<double>();
  if (!whole) fail(fmt::format("{}/{}", path, keyword), "expected a whole number that is not negative");
  if (at->get<double>() > most) fail(fmt::format("{}/{}", path, keyword), fmt::format("at most {} is supported", most));
  return static_cast<uint32_t>(at->get<double>());
}

std::optional<double> SchemaConverter::bound(const Json& schema, const char* keyword, const std::string& path) const {
  const auto at = schema.find(keyword);
  if (at == schema.end()) return std::nullopt;
  if (!at->is_number()) fail(fmt::format("{}/{}", path, keyword), "expected a number");
  return at->get<double>();
}

SchemaGrammar::SchemaGrammar(JsonNotation notation)
    : notation_(std::move(notation)),
      rules_{{"space", std::string(kSpace)},
             {"escape", std::string(kEscape)},
             {"string", R"("\"" char* "\"")"},
             {"number", std::string(kNumber)},
             {"boolean", R"("true" | "false")"},
             {"null", R"("null")"},
             {"value", "object | array | string | number | boolean | null"},
             {"object", R"~("{" space (string ":" space value ("," space string ":" space value)*)? space "}")~"},
             {"array", R"~("[" space (value ("," space value)*)? space "]")~"},
             {"hex", "[0-9a-fA-F]"},
             {"date", std::string(kDate)},
             {"time", std::string(kTime)}} {
  rules_["char"] = plain_class() + "] | escape";
  if (!notation_.forbidden.empty()) {
    const std::string rest =
        add_text_rules("string-rest", notation_.forbidden, plain_class(), R"( | "\"" | escape {})");
    rules_["string"] = R"("\"" )" + rest;
  }
  if (notation_.python) {
    std::string plain = plain_class();
    plain.replace(plain.find('"'), 1, "'");
    rules_["string"] += fmt::format(R"( | "'" ({}] | "\\" ["'\\nrt])* "'")", plain);
    rules_["boolean"] += R"( | "True" | "False")";
    rules_["null"] += R"( | "None")";
  }
}

std::string SchemaGrammar::plain_class() const {
  std::string text(kPlain);
  if (!notation_.forbidden.empty()) text += in_class(code_points(notation_.forbidden).front());
  return text;
}

// A rule for each number of characters of mark that the text ends with. others: the class of the characters that may
// stand in it, open; ways: further ways to go on, {} being the first rule. Without ways the text ends with the mark,
// else it ends with what they take, without it.
std::string SchemaGrammar::add_text_rules(std::string_view name, std::string_view mark, std::string_view others,
                                          const std::string& ways) {
  const std::u32string points = code_points(mark);
  std::vector<std::string> names;
  for (size_t i = 0; i < points.size(); ++i) names.push_back(reserve(fmt::format("{}-{}", name, i)));
  for (size_t i = 0; i < points.size(); ++i) {
    std::string body, taken;
    for (const char32_t c : std::set<char32_t>(points.begin(), points.end())) {
      taken += in_class(c);
      const size_t next = longest_beginning(points, i, c);
      if (next < points.size()) {
        body += fmt::format("[{}] {} | ", in_class(c), names[next]);
      } else if (ways.empty()) {
        body += fmt::format("[{}] | ", in_class(c));
      }
    }
    body += fmt::format("{}{}] {}", others, taken, names.front());
    rules_[names[i]] = body + fmt::format(fmt::runtime(ways), names.front());
  }
  return names.front();
}

std::string SchemaGrammar::add_text_through(std::string_view name, std::string_view mark) {
  return add_text_rules(name, mark, "[^", "");
}

std::string SchemaGrammar::reserve(std::string_view name) {
  std::string clean;
  for (const char c : name) clean += is_name_char(c) ? c : '-';
  if (clean.empty()) clean = "rule";
  std::string candidate = clean;
  for (int i = 1; rules_.count(candidate) > 0; ++i) candidate = fmt::format("{}-{}", clean, i);
  rules_.emplace(candidate, "");
  order_.push_back(candidate);
  return candidate;
}

std::string SchemaGrammar::add_rule(std::string_view name, std::string_view body) {
  std::string clean;
  for (const char c : name) clean += is_name_char(c) ? c : '-';
  if (clean.empty()) clean = "rule";
  std::string candidate = clean;
  for (int i = 1;; ++i) {
    const auto [at, added] = rules_.emplace(candidate, body);
    if (added) order_.push_back(candidate);
    if (added || at->second == body) return candidate;
    candidate = fmt::format("{}-{}", clean, i);
  }
}

std::string SchemaGrammar::add_schema(std::string_view name, const Json& schema) {
  return add_schema(name, schema, schema);
}

std::string SchemaGrammar::add_schema(std::string_view name, const Json& schema, const Json& document) {
  const std::string rule = reserve(name);
  std::string body = SchemaConverter(*this, document).convert(schema, "#", rule + "-value");
  rules_[rule] = std::move(body);
  return rule;
}

void SchemaGrammar::remove_rules_from(size_t n) {
  for (size_t i = n; i < order_.size(); ++i) rules_.erase(order_[i]);
  order_.resize(std::min(n, order_.size()));
}

std::string SchemaGrammar::text() const {
  std::string text;
  for (const auto& [name, body] : rules_) text += fmt::format("{} ::= {}\n", name, body);
  return text;
}

std::string grammar_for_schema(const Json& schema) {
  SchemaGrammar grammar;
  grammar.add_schema("root", schema);
  return grammar.text();
}

}  // namespace caravan::engine
