#include "engine/json_schema.h"

#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>

#include "base/error.h"
#include "engine/grammar_machine.h"
#include "engine/number_range.h"
#include "vocab/utf8.h"

namespace caravan::engine {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

class SchemaMatcher {
 public:
  explicit SchemaMatcher(const Json& schema) : SchemaMatcher(grammar_for_schema(schema)) {}
  explicit SchemaMatcher(const std::string& grammar)
      : text(grammar), automaton_(parse_gbnf(grammar, {10, {}})), machine_(automaton_) {}

  bool accepts(std::string_view document) { return machine_.accepts(machine_.step(machine_.initial(), document)); }

  // A random text of the grammar; empty when it did not come to an end.
  std::string sample(std::mt19937& random) {
    std::string written;
    GrammarMachine::State state = machine_.initial();
    for (size_t i = 0; i < 4000; ++i) {
      if (machine_.accepts(state) && (random() % 4 == 0 || machine_.frames(state).size() == 1)) return written;
      std::vector<uint8_t> bytes;
      for (int byte = 0; byte < 256; ++byte)
        if (machine_.step(state, static_cast<uint8_t>(byte)) != GrammarMachine::kDead)
          bytes.push_back(static_cast<uint8_t>(byte));
      uint8_t byte = bytes[random() % bytes.size()];
      // Long ones are led to an end: close strings and brackets, write short values.
      for (const char end : {'"', '}', ']', '0'})
        if (i > 20 + random() % 100 && machine_.step(state, static_cast<uint8_t>(end)) != GrammarMachine::kDead) {
          byte = static_cast<uint8_t>(end);
          break;
        }
      written += static_cast<char>(byte);
      state = machine_.step(state, byte);
    }
    return "";
  }

  const std::string text;

 private:
  GrammarAutomaton automaton_;
  GrammarMachine machine_;
};

// An independent reading of the standard, for the keywords that are converted.
class Validator {
 public:
  explicit Validator(const Json& document) : document_(document) {}

  bool valid(const Json& value) const { return valid(document_, value); }

  bool valid(const Json& schema, const Json& value) const {
    if (schema.is_boolean()) return schema.get<bool>();
    const auto all = [&](const Json& parts) {
      return std::all_of(parts.begin(), parts.end(), [&](const Json& part) { return valid(part, value); });
    };
    const auto any = [&](const Json& parts) {
      return std::any_of(parts.begin(), parts.end(), [&](const Json& part) { return valid(part, value); });
    };
    for (const auto& [key, rule] : schema.items()) {
      if (key == "$ref") {
        std::string pointer = rule.get<std::string>().substr(1);
        if (const size_t blank = pointer.find("%20"); blank != pointer.npos) pointer.replace(blank, 3, " ");
        if (!valid(document_.at(Json::json_pointer(pointer)), value)) return false;
      }
      if (key == "allOf" && !all(rule)) return false;
      if ((key == "anyOf" || key == "oneOf") && !any(rule)) return false;
      if (key == "const" && value != rule) return false;
      if (key == "enum" && std::find(rule.begin(), rule.end(), value) == rule.end()) return false;
      if (key == "type" && !has_type(rule, value)) return false;
    }
    if (value.is_number() && !valid_number(schema, value.get<double>())) return false;
    if (value.is_string() && !valid_string(schema, value.get<std::string>())) return false;
    if (value.is_array() && !valid_array(schema, value)) return false;
    return !value.is_object() || valid_object(schema, value);
  }

 private:
  static bool has_type(const Json& type, const Json& value) {
    if (type.is_array())
      return std::any_of(type.begin(), type.end(), [&](const Json& one) { return has_type(one, value); });
    if (type == "integer") return value.is_number() && std::trunc(value.get<double>()) == value.get<double>();
    if (type == "number") return value.is_number();
    return type == value.type_name();
  }

  static bool valid_number(const Json& schema, double value) {
    return value >= schema.value("minimum", -INFINITY) && value <= schema.value("maximum", INFINITY) &&
           value > schema.value("exclusiveMinimum", -INFINITY) && value < schema.value("exclusiveMaximum", INFINITY);
  }

  static bool valid_string(const Json& schema, const std::string& value) {
    size_t length = 0;
    for (size_t at = 0; at < value.size(); ++length) at += vocab::decode_utf8(value, at).length;
    if (length < schema.value("minLength", 0u) || length > schema.value("maxLength", 1'000'000u)) return false;
    if (schema.contains("pattern") && !std::regex_search(value, std::regex(schema["pattern"].get<std::string>())))
      return false;
    const std::string format = schema.value("format", "");
    const std::string date = "(\\d{4})-(\\d\\d)-(\\d\\d)",
                      time = "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d+)?(Z|[-+]\\d\\d:\\d\\d)";
    if (format == "time") return std::regex_match(value, std::regex(time));
    if (format == "uuid")
      return std::regex_match(value, std::regex("[\\da-fA-F]{8}(-[\\da-fA-F]{4}){3}-[\\da-fA-F]{12}"));
    if (format != "date" && format != "date-time") return true;
    std::smatch match;
    if (!std::regex_match(value, match, std::regex(format == "date" ? date : date + "T" + time))) return false;
    const int year = std::stoi(match[1]), month = std::stoi(match[2]), day = std::stoi(match[3]);
    const bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    const int days[] = {31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    return month >= 1 && month <= 12 && day >= 1 && day <= days[month - 1];
  }

  bool valid_array(const Json& schema, const Json& value) const {
    if (value.size() < schema.value("minItems", 0u) || value.size() > schema.value("maxItems", 1'000'000u))
      return false;
    const Json first = schema.value("prefixItems", Json::array()), rest = schema.value("items", Json(true));
    for (size_t i = 0; i < value.size(); ++i)
      if (!valid(i < first.size() ? first[i] : rest, value[i])) return false;
    return true;
  }

  bool valid_object(const Json& schema, const Json& value) const {
    if (value.size() < schema.value("minProperties", 0u) || value.size() > schema.value("maxProperties", 1'000'000u))
      return false;
    for (const Json& key : schema.value("required", Json::array()))
      if (!value.contains(key.get<std::string>())) return false;
    const Json named = schema.value("properties", Json::object());
    const Json rest = schema.value("additionalProperties", Json(true));
    for (const auto& [key, member] : value.items())
      if (!valid(named.contains(key) ? named[key] : rest, member)) return false;
    return true;
  }

  const Json& document_;
};

struct SchemaCase {
  const char* schema;
  std::vector<const char*> accepted, refused;
};

const std::vector<SchemaCase>& cases() {
  static const std::vector<SchemaCase> all = {
      {R"({})", {"1", "\"a\"", "[1, {\"a\": null}]", "{}", "true", "-0.5e3"}, {"", "{", "01", "'a'", "[1,]"}},
      {R"({"type": "object"})", {"{}", "{\"a\":1,\"b\":[]}", "{\n  \"a\": 1\n}"}, {"1", "[]", "{\"a\"}"}},
      {R"({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "null"}},
           "required": ["b"]})",
       {R"({"b": "x"})", R"({"a": 1, "b": ""})", R"({"a":1,"b":"x","c":null})", R"({"b":"x", "c": null})"},
       {"{}", R"({"a":1})", R"({"b":"x","a":1})", R"({"b":"x","d":1})", R"({"b":1})"}},
      {R"({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}})",
       {"{}", R"({"a":1})", R"({"b":2})", R"({"c":3})", R"({"a":1,"c":3})", R"({"b":2, "c":3})",
        R"({"a":1,"b":2,"c":3})"},
       {R"({,"b":2})", R"({"a":1,})", R"({"a":1 "b":2})", R"({"b":2,"a":1})"}},
      {R"({"type": "object", "properties": {"a": {"type": "integer"}, "ab": {"type": "integer"}},
           "additionalProperties": {"type": "boolean"}})",
       {"{}", R"({"a":1,"x":true})", R"({"abc":false})", R"({"aa":false,"":true})", R"({"ab":2,"b":true,"c":false})"},
       {R"({"a":true})", R"({"x":true,"ab":false})", R"({"x":1})"}},
      {R"({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2})",
       {R"({"a":1})", R"({"a":1,"b":2})"},
       {"{}", R"({"a":1,"b":2,"c":3})"}},
      {R"({"type": "object", "properties": {"q\"\\\n": {"const": 1}}, "required": ["q\"\\\n"]})",
       {R"({"q\"\\\n":1})"},
       {"{}", "{\"q\":1}"}},
      {R"({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3})",
       {"[1,2]", "[1, 2, 3]"},
       {"[]", "[1]", "[1,2,3,4]", "[1,\"a\"]"}},
      {R"({"type": "array", "items": {"type": "boolean"}})", {"[]", "[true]", "[true,false,true]"}, {"[1]", "[true,]"}},
      {R"({"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": false})",
       {"[]", "[1]", "[1,\"a\"]"},
       {"[\"a\"]", "[1,\"a\",2]"}},
      {R"({"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "null"}, "minItems": 2})",
       {"[1,\"a\"]", "[1,\"a\",null,null]"},
       {"[1]", "[1,\"a\",2]"}},
      {R"({"enum": ["a", 1, null, {"b": [true]}]})", {"\"a\"", "1", "null", R"({"b":[true]})"}, {"\"b\"", "2"}},
      {R"({"type": "string", "enum": ["a", 1]})", {"\"a\""}, {"1"}},
      {R"({"const": "it's \"q\""})", {R"("it's \"q\"")"}, {"\"\""}},
      {R"({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]})",
       {"1", "[null]"},
       {"\"a\"", "[1]"}},
      {R"({"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"],
           "oneOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                     {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]})",
       {R"({"k":"x","a":1})", R"({"k":"x","b":true})"},
       {R"({"k":"x"})", R"({"a":1})"}},
      {R"({"allOf": [{"properties": {"a": {"minimum": 1}}}, {"properties": {"a": {"type": "integer", "maximum": 3}},
           "required": ["a"]}]})",
       {R"({"a":1})", R"({"a":3})"},
       {"{}", R"({"a":0})", R"({"a":4})", R"({"a":1.5})"}},
      {R"({"type": ["string", "null"], "minLength": 1})", {"null", "\"a\""}, {"\"\"", "1"}},
      {R"({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"},
           "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"]}}})",
       {R"({"v":1,"next":null})", R"({"v":1,"next":{"v":2,"next":{"v":3,"next":null}}})"},
       {R"({"v":1})", "null"}},
      {R"({"type": "array", "items": {"$ref": "#"}})", {"[]", "[[],[[]]]"}, {"[1]"}},
      {R"({"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "boolean"}}})", {"true"}, {"1"}},
      {R"({"$ref": "#/$defs/n", "maximum": 5, "$defs": {"n": {"type": "integer", "minimum": 2}}})",
       {"2", "5"},
       {"1", "6", "3.5"}},
      {R"({"type": "string", "minLength": 2, "maxLength": 3})",
       {"\"ab\"", "\"\xC3\xA9\xC3\xA9\"", R"("\n\u00e9x")", R"("\ud83d\ude00a")"},
       {"\"a\"", "\"abcd\"", R"("\ud83d\ude00")"}},
      {R"({"type": "string", "pattern": "^[a-z]{2,3}(-[A-Z]+)?$"})",
       {"\"ab\"", "\"abc-X\""},
       {"\"a\"", "\"abc-\"", "\"xabcd\""}},
      {R"({"type": "string", "pattern": "b\\d|^c"})", {"\"ab1x\"", "\"cab\"", "\"b0\""}, {"\"bx\"", "\"dc\""}},
      {R"({"type": "string", "pattern": "^[\"\\\\\\n]+$"})", {R"("\"\\\n")"}, {"\"a\"", "\"\\t\""}},
      {R"({"type": "string", "format": "date"})",
       {"\"2024-02-29\"", "\"1999-12-31\""},
       {"\"2023-02-29\"", "\"2023-13-01\"", "\"2023-04-31\""}},
      {R"({"type": "string", "format": "time"})",
       {"\"23:59:59Z\"", "\"01:02:03.5+02:00\""},
       {"\"24:00:00Z\"", "\"01:02:03\""}},
      {R"({"type": "string", "format": "date-time"})", {"\"2024-02-29T01:02:03Z\""}, {"\"2024-02-29 01:02:03Z\""}},
      {R"({"type": "string", "format": "uuid"})", {"\"123e4567-e89b-12d3-a456-426614174000\""}, {"\"123e4567\""}},
      {R"({"type": "string", "format": "hostname"})", {"\"anything\""}, {"1"}},
      {R"({"type": "integer"})", {"0", "12", "-9999999999999999"}, {"01", "1.5", "-"}},
      {R"({"type": "integer", "minimum": -12, "maximum": 345})",
       {"-12", "-1", "0", "99", "345"},
       {"-13", "346", "1000", "-0"}},
      {R"({"type": "integer", "exclusiveMinimum": 0})", {"1", "10", "123456"}, {"0", "-1"}},
      {R"({"type": "integer", "maximum": -5})", {"-5", "-10", "-123"}, {"-4", "0", "5"}},
      {R"({"type": "number"})", {"1", "-2.50", "1e5", "0.1E-10"}, {".5", "1.", "+1"}},
      {R"({"type": "number", "minimum": 0, "maximum": 1})", {"0", "0.5", "1", "1.0"}, {"-0.1", "1.01", "2"}},
      {R"({"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25})",
       {"-1.4", "-1", "0", "2.2", "2.249", "-0.75"},
       {"-1.5", "2.25", "3", "-1.50", "2.3"}},
      {R"({"type": "boolean", "title": "t", "description": "d", "default": true, "x-own": 1})",
       {"true", "false"},
       {"null"}},
  };
  return all;
}

TEST(JsonSchema, AcceptsAndRefusesDocuments) {
  for (const SchemaCase& c : cases()) {
    const Json schema = Json::parse(c.schema);
    SchemaMatcher matcher(schema);
    for (const char* document : c.accepted) {
      EXPECT_TRUE(matcher.accepts(document)) << document << "\n" << c.schema << "\n" << matcher.text;
      EXPECT_TRUE(Validator(schema).valid(Json::parse(document))) << document << "\n" << c.schema;
    }
    for (const char* document : c.refused)
      EXPECT_FALSE(matcher.accepts(document)) << document << "\n" << c.schema << "\n" << matcher.text;
  }
}

TEST(JsonSchema, WritesOnlyDocumentsThatTheSchemaAccepts) {
  std::mt19937 random(7);
  for (const SchemaCase& c : cases()) {
    const Json schema = Json::parse(c.schema);
    SchemaMatcher matcher(schema);
    const Validator validator(schema);
    int n_complete = 0;
    for (int i = 0; i < 60; ++i) {
      const std::string document = matcher.sample(random);
      if (document.empty()) continue;
      ++n_complete;
      const Json value = Json::parse(document, nullptr, false);
      ASSERT_FALSE(value.is_discarded()) << "not JSON: " << document << "\n" << matcher.text;
      EXPECT_TRUE(validator.valid(value)) << document << "\n" << c.schema << "\n" << matcher.text;
    }
    EXPECT_GT(n_complete, 2) << c.schema;
  }
}

TEST(JsonSchema, TakesExactlyTheNumbersWithinRandomBounds) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    const auto bound = [&]() -> std::optional<double> {
      if (random() % 4 == 0) return std::nullopt;
      return static_cast<double>(static_cast<int>(random() % 4001) - 2000) / std::array{1, 1, 10, 100}[random() % 4];
    };
    const NumberBounds bounds{bound(), random() % 3 == 0 ? bound() : std::nullopt, bound(),
                              random() % 3 == 0 ? bound() : std::nullopt};
    const auto within = [&](double value) {
      return value >= bounds.minimum.value_or(-INFINITY) && value > bounds.exclusive_minimum.value_or(-INFINITY) &&
             value <= bounds.maximum.value_or(INFINITY) && value < bounds.exclusive_maximum.value_or(INFINITY);
    };
    for (const bool whole : {true, false}) {
      std::string grammar;
      try {
        grammar = "root ::= " + (whole ? grammar_for_integers(bounds) : grammar_for_numbers(bounds));
      } catch (const RequestError&) {
        for (int i = -20'000; i <= 20'000; ++i) EXPECT_FALSE(within(i / (whole ? 1.0 : 10.0)));
        continue;
      }
      SchemaMatcher matcher(grammar);
      for (int i = 0; i < 400; ++i) {
        const int n = static_cast<int>(random() % 5001) - 2500;
        const double value = whole ? n : n / std::array{1.0, 10.0, 100.0, 1000.0}[random() % 4];
        if (value == 0) continue;  // -0 is left out where only negative numbers are allowed
        const std::string text = Json(whole ? Json(n) : Json(value)).dump();
        EXPECT_EQ(matcher.accepts(text), within(value)) << text << " in " << grammar;
      }
      for (int i = 0; i < 20; ++i) {
        const std::string text = matcher.sample(random);
        EXPECT_TRUE(text.empty() || within(std::stod(text))) << text << " in " << grammar;
      }
    }
    if (HasFailure()) return;
  }
}

TEST(JsonSchema, NamesThePlaceOfWhatIsNotSupported) {
  for (const auto& [schema, message] : std::vector<std::pair<const char*, const char*>>{
           {R"({"properties": {"a": {"not": {}}}})", "at #/properties/a/not: this keyword is not supported"},
           {R"({"type": "array", "uniqueItems": true})", "at #/uniqueItems"},
           {R"({"type": "object", "patternProperties": {"a": {}}})", "at #/patternProperties"},
           {R"({"type": "thing"})", "at #/type: expected object, array"},
           {R"({"type": []})", "at #/type"},
           {R"({"properties": 1})", "at #/properties: expected an object"},
           {R"({"required": [1]})", "at #/required: expected an array of names"},
           {R"({"required": ["a"], "additionalProperties": false})", "'a' is required, but not allowed"},
           {R"({"$ref": "http://x/y"})", "at #/$ref: only references into the schema itself"},
           {R"({"$ref": "#/$defs/x"})", "there is no '#/$defs/x'"},
           {R"({"allOf": [{"type": "string"}, {"type": "null"}]})",
            "at #/allOf/1/type: no type is allowed by all parts"},
           {R"({"allOf": [{"enum": [1, 2]}, {"enum": [3]}]})", "no value is allowed by all parts"},
           {R"({"minLength": 3, "maxLength": 2})", "at #/maxLength: it is below minLength"},
           {R"({"minItems": 3, "maxItems": 2})", "at least 3 elements are wanted, at most 2 allowed"},
           {R"({"type": "integer", "minimum": 3, "maximum": 2})", "at #: no number lies within"},
           {R"~({"type": "string", "pattern": "(?=a)"})~", "at #/pattern: pattern '(?=a)', at byte 2: look-around"},
           {R"({"type": "string", "pattern": "a\\b"})", "this escape is not supported"},
           {R"~({"type": "string", "pattern": "(a"})~", "the group has no ')'"},
           {R"({"enum": []})", "at #/enum: expected an array of values"},
           {R"({"type": "string", "enum": [1]})", "no value of enum or const fits"},
           {R"({"items": 5})", "at #/items: expected an object or a boolean, found number"},
           {R"(false)", "at #: false accepts no value"},
           {R"({"$ref": "#", "type": "object"})", "too large, or combines references without end"},
           {R"({"minItems": -1})", "at #/minItems: expected a whole number"},
       }) {
    try {
      grammar_for_schema(Json::parse(schema));
      ADD_FAILURE() << "accepted: " << schema;
    } catch (const RequestError& error) {
      EXPECT_THAT(error.what(), HasSubstr(message)) << schema;
    }
  }
}

TEST(JsonSchema, TakesLongStringsInFewRules) {
  SchemaMatcher matcher(Json::parse(R"({"type": "string", "minLength": 2500, "maxLength": 7001})"));
  for (const auto& [length, wanted] :
       {std::pair{2499, false}, {2500, true}, {4999, true}, {7000, true}, {7001, true}, {7002, false}})
    EXPECT_EQ(matcher.accepts("\"" + std::string(static_cast<size_t>(length), 'x') + "\""), wanted) << length;
}

// What a naive search says of every short text over the letters of a mark, which overlaps itself.
TEST(JsonSchema, EndsATextWithTheFirstPlaceOfAMark) {
  for (const std::string mark : {"aab", "abab", "a", "b\xC3\xA9", "aaba"}) {
    SchemaGrammar grammar;
    grammar.add_rule("root", grammar.add_text_through("text", mark));
    SchemaMatcher matcher(grammar.text());
    const std::vector<std::string> letters = {"a", "b", "\xC3\xA9"};
    for (int i = 0; i < 3 * 3 * 3 * 3 * 3 * 3 * 3; ++i) {
      std::string text;
      for (int j = 0, rest = i; j < 7; ++j, rest /= 3) {
        const size_t at = text.find(mark);
        EXPECT_EQ(matcher.accepts(text), at != text.npos && at + mark.size() == text.size()) << mark << ": " << text;
        text += letters[static_cast<size_t>(rest % 3)];
      }
    }
  }
}

TEST(JsonSchema, WritesNoStringThatHoldsAForbiddenText) {
  SchemaGrammar grammar({.forbidden = "</p>"});
  grammar.add_rule("root", grammar.add_schema("x", Json::object()));
  SchemaMatcher matcher(grammar.text());
  EXPECT_TRUE(matcher.accepts(R"(["a < b <</p <p>", {"</": "\n<\u003c/p>"}])"));
  EXPECT_FALSE(matcher.accepts(R"(["a</p>"])"));
  EXPECT_FALSE(matcher.accepts(R"({"<</p>": 1})"));
  std::mt19937 random(2);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(matcher.sample(random).find("</p>"), std::string::npos);
  EXPECT_THROW(grammar.add_schema("y", Json::parse(R"({"enum": ["x</p>"]})")), RequestError);
  SchemaGrammar other({.forbidden = "</p>"});
  other.add_rule("root", other.add_schema("z", Json::parse(R"({"properties": {"a": {"maxLength": 9}},
                                                               "additionalProperties": {"type": "integer"}})")));
  SchemaMatcher bounded(other.text());
  EXPECT_TRUE(bounded.accepts(R"({"a": "b", "c": 1})"));
  EXPECT_FALSE(bounded.accepts(R"({"a": "</p>"})"));
  EXPECT_FALSE(bounded.accepts(R"({"</p>": 1})"));
}

TEST(JsonSchema, WritesLiteralsOfPython) {
  SchemaGrammar grammar({.python = true, .forbidden = "<|end|>"});
  grammar.add_rule("root", grammar.add_schema("x", Json::object()));
  SchemaMatcher matcher(grammar.text());
  EXPECT_TRUE(matcher.accepts(R"([True, false, None, 'it\'s "x"', "it's", 1.5])"));
  EXPECT_FALSE(matcher.accepts(R"(["<|end|>"])"));
  EXPECT_FALSE(matcher.accepts(R"(['<|end|>'])"));
  EXPECT_FALSE(SchemaMatcher(Json::object()).accepts("True"));
}

TEST(JsonSchema, ForgetsRulesThatAreTakenBack) {
  SchemaGrammar grammar;
  grammar.add_rule("root", "\"a\"");
  const std::string before = grammar.text();
  const size_t n_rules = grammar.n_rules();
  grammar.add_rule("b", "\"b\"");
  EXPECT_THROW(grammar.add_schema("x", Json::parse(R"({"properties": {"a": {"not": {}}}})")), RequestError);
  grammar.remove_rules_from(n_rules);
  EXPECT_EQ(grammar.text(), before);
}

TEST(JsonSchema, ServesAsPartOfAGrammar) {
  SchemaGrammar grammar;
  const std::string first = grammar.add_schema("value", Json::parse(R"({"type": "integer"})"));
  const std::string second =
      grammar.add_schema("arguments", Json::parse(R"({"properties": {"x": {"$ref": "#/$defs/value"}},
      "required": ["x"], "$defs": {"value": {"type": "array", "items": {"type": "string"}}}})"));
  EXPECT_NE(first, "value") << "the rule of any JSON value has this name";
  grammar.add_rule("root", grammar_literal("<call \"f\">\n") + " " + first + " \" \" " + second);
  SchemaMatcher matcher(grammar.text());
  EXPECT_TRUE(matcher.accepts("<call \"f\">\n12 {\"x\": [\"a\"]}"));
  EXPECT_FALSE(matcher.accepts("<call \"f\">\n12 {\"x\": 1}"));
}

}  // namespace
}  // namespace caravan::engine
