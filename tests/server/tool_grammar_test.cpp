// Grammars of tool calls: what each family writes is accepted and what it must not write is refused; whatever a grammar
// accepts, the output parser reads as a call of a tool with arguments that its schema accepts.
#include "server/tool_grammar.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "chat/parameter_types.h"
#include "engine/fake_pipeline.h"
#include "engine/gbnf.h"
#include "engine/grammar.h"
#include "engine/grammar_machine.h"
#include "vocab/utf8.h"

namespace caravan::server {
namespace {

using engine::GrammarConstraint;
using ::testing::HasSubstr;

const Json kTools = Json::parse(R"([
  {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}},
  {"type": "function", "function": {"name": "now"}}])");

constexpr chat::ParseOptions kOptions{.tools = true, .reasoning = true, .reasoning_open = false};

// How a family writes a call. $NAME, $ARGS: the arguments, with separator between; $DAYS: the value of days.
struct Family {
  std::string_view template_part, whole, city, days, separator;
  bool forced = true;  // the exact form accepts this text, too
};

constexpr std::string_view kJsonCity = R"("city": "Paris")", kJsonDays = R"("days": $DAYS)";

const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"<tool_call>", "<tool_call>\n{\"name\": \"$NAME\", \"arguments\": {$ARGS}}\n</tool_call>", kJsonCity, kJsonDays,
       ", "},
      {"<tool_call>", "<tool_call>{\"arguments\":{$ARGS} ,\"name\":\"$NAME\"}</tool_call>\n", kJsonCity, kJsonDays,
       ",\n  ", false},
      {"<|python_tag|>",
       "<|python_tag|>{\"type\": \"function\", \"function\": {\"name\": \"$NAME\", \"parameters\": {$ARGS}}}",
       kJsonCity, kJsonDays, ", ", false},
      {"<|python_tag|>", "<|python_tag|>{\"type\": \"function\", \"name\": \"$NAME\", \"parameters\": {$ARGS}}",
       kJsonCity, kJsonDays, ", ", false},
      {"[TOOL_CALLS]", "[TOOL_CALLS][{\"name\": \"$NAME\", \"arguments\": {$ARGS}, \"id\": \"a12345678\"}]", kJsonCity,
       kJsonDays, ", ", false},
      {"[TOOL_CALLS]", "[TOOL_CALLS][{\"name\": \"$NAME\", \"arguments\": {$ARGS}}]", kJsonCity, kJsonDays, ", "},
      {"[TOOL_CALLS] [ARGS]", "[TOOL_CALLS]$NAME[CALL_ID]x1[ARGS]{$ARGS}", kJsonCity, kJsonDays, ", ", false},
      {"[TOOL_CALLS] [ARGS]", "[TOOL_CALLS]$NAME[ARGS]{$ARGS}", kJsonCity, kJsonDays, ", "},
      {"<｜tool▁calls▁begin｜> ```json",
       "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>$NAME\n```json\n{$ARGS}\n```<"
       "｜tool▁call▁end｜><｜tool▁calls▁end｜>",
       kJsonCity, kJsonDays, ", "},
      {"<｜tool▁calls▁begin｜>",
       "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>$NAME<｜tool▁sep｜>{$ARGS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
       kJsonCity, kJsonDays, ", "},
      {"｜DSML｜",
       "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"$NAME\">\n$ARGS\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
       "<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>",
       "<｜DSML｜parameter name=\"days\" string=\"false\">$DAYS</｜DSML｜parameter>", "\n"},
      {"｜DSML｜",
       "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"$NAME\">\n$ARGS\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
       "<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>",
       "<｜DSML｜parameter name=\"days\" string=\"false\">$DAYS</｜DSML｜parameter>", "\n"},
      {"<|START_ACTION|> <|START_THINKING|>",
       "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"$NAME\", \"parameters\": "
       "{$ARGS}}\n]<|END_ACTION|>",
       kJsonCity, kJsonDays, ", ", false},
      {"<|tool_calls_section_begin|>",
       "<|tool_calls_section_begin|><|tool_call_begin|>functions.$NAME:0<|tool_call_argument_begin|>{$ARGS}"
       "<|tool_call_end|><|tool_calls_section_end|>",
       kJsonCity, kJsonDays, ", "},
      {"<minimax:tool_call>", "<minimax:tool_call>\n<invoke name=\"$NAME\">\n$ARGS\n</invoke>\n</minimax:tool_call>",
       "<parameter name=\"city\">Paris</parameter>", "<parameter name=\"days\">$DAYS</parameter>", "\n"},
      {"<seed:tool_call> <seed:think>", "<seed:tool_call>\n<function=$NAME>\n$ARGS\n</function>\n</seed:tool_call>",
       "<parameter=city>Paris</parameter>", "<parameter=days>$DAYS</parameter>", "\n"},
      {"<arg_key> <tool_call>", "<tool_call>$NAME\n$ARGS\n</tool_call>",
       "<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>", "<arg_key>days</arg_key><arg_value>$DAYS</arg_value>",
       "\n"},
      {"<arg_key> <tool_call>", "<tool_call>$NAME$ARGS</tool_call>",
       "<arg_key>city</arg_key><arg_value>Paris</arg_value>", "<arg_key>days</arg_key><arg_value>$DAYS</arg_value>",
       ""},
      {"<function= <tool_call>", "<tool_call>\n<function=$NAME>\n$ARGS\n</function>\n</tool_call>",
       "<parameter=city>\nParis\n</parameter>", "<parameter=days>\n$DAYS\n</parameter>", "\n"},
      {"<function=", "<function=$NAME>{$ARGS}</function>", kJsonCity, kJsonDays, ", "},
      {"<|tools_prefix|> <|inner_prefix|>", "<|tools_prefix|>[{\"$NAME\": {$ARGS}}]<|tools_suffix|>", kJsonCity,
       kJsonDays, ", "},
      {"<TOOLCALL>", "<TOOLCALL>[{\"name\": \"$NAME\", \"arguments\": {$ARGS}}]</TOOLCALL>", kJsonCity, kJsonDays,
       ", "},
      {"<|tool_call_start|>", "<|tool_call_start|>[$NAME($ARGS)]<|tool_call_end|>", "city=\"Paris\"", "days=$DAYS",
       ", "},
      {"<|tool_call_start|>", "<|tool_call_start|>[$NAME($ARGS)]<|tool_call_end|>", "city='Paris'", "days=$DAYS", ", "},
      {"<tool_calls>", "<tool_calls>[{\"name\": \"$NAME\", \"arguments\": {$ARGS}, \"id\": \"7\"}]</tool_calls>",
       kJsonCity, kJsonDays, ", ", false},
      {"<function name=", "<function name=\"$NAME\">$ARGS</function>", "<param name=\"city\">Paris</param>",
       "<param name=\"days\">$DAYS</param>", ""},
      {"<function name=", "<function name=\"$NAME\">$ARGS</function>", "<param name=\"city\"><![CDATA[Paris]]></param>",
       "<param name=\"days\">$DAYS</param>", "\n"},
      {"<|tool_call|>", "<|tool_call|>[{\"name\": \"$NAME\", \"arguments\": {$ARGS}}]", kJsonCity, kJsonDays, ", ",
       false},
      {"functools[", "functools[{\"name\": \"$NAME\", \"arguments\": {$ARGS}}]", kJsonCity, kJsonDays, ", "},
      {"<|function_call|>", "<|function_call|>{\"name\": \"$NAME\", \"arguments\": {$ARGS}}", kJsonCity, kJsonDays,
       ", "},
      {"none of these", "<tool_call>\n{\"name\": \"$NAME\", \"arguments\": {$ARGS}}\n</tool_call>", kJsonCity,
       kJsonDays, ", "},
  };
  return all;
}

std::string replaced(std::string text, std::string_view what, std::string_view with) {
  const size_t at = text.find(what);
  return at == std::string::npos ? text : text.replace(at, what.size(), with);
}

enum class Arguments { all, no_city, no_days };

std::string call_of(const Family& family, std::string_view name, Arguments given, std::string_view days = "3") {
  std::string arguments;
  if (given != Arguments::no_city) arguments += family.city;
  if (given == Arguments::all) arguments += family.separator;
  if (given != Arguments::no_days) arguments += replaced(std::string(family.days), "$DAYS", days);
  return replaced(replaced(std::string(family.whole), "$NAME", name), "$ARGS", arguments);
}

class ToolGrammar : public ::testing::Test {
 protected:
  GrammarConstraint compile(const engine::GrammarSpec& spec) { return compiler_.compile(spec); }

  // Byte by byte, as far as the grammar allows it.
  static std::string feed(GrammarConstraint& grammar, std::string_view text) {
    std::string taken;
    for (const char c : text) {
      if (!grammar.allows(engine::test::byte_token(c))) break;
      grammar.accept(engine::test::byte_token(c));
      taken += c;
    }
    return taken;
  }
  // Whether the text is a whole answer, and reached the grammar.
  bool accepts(const engine::GrammarSpec& spec, std::string_view text) {
    GrammarConstraint grammar = compile(spec);
    return feed(grammar, text) == text && !grammar.waits_for_trigger() && grammar.allows(engine::test::kEos);
  }

  const std::unique_ptr<const vocab::Vocabulary> vocabulary_ = engine::test::make_vocabulary();
  engine::GrammarCompiler compiler_{*vocabulary_};
};

engine::GrammarSpec lazy(std::string_view template_source, CallCount count = CallCount::one, const Json& tools = kTools,
                         chat::ParseOptions options = kOptions) {
  const auto spec = lazy_call_grammar(chat::detect_syntax(template_source), options, tools, count);
  EXPECT_TRUE(spec.has_value()) << template_source;
  return spec.value_or(engine::GrammarSpec{});
}

engine::GrammarSpec forced(std::string_view template_source, CallCount count = CallCount::one,
                           const Json& tools = kTools, chat::ParseOptions options = kOptions) {
  return forced_call_grammar(chat::detect_syntax(template_source), options, tools, count);
}

TEST_F(ToolGrammar, AcceptsWhatEveryFamilyWritesAndNothingElse) {
  for (const Family& family : families()) {
    SCOPED_TRACE(family.whole);
    std::vector<engine::GrammarSpec> specs = {lazy(family.template_part)};
    const bool bare = family.template_part == "<|python_tag|>";  // forced without the mark
    if (family.forced && !bare) specs.push_back(forced(family.template_part));
    for (const engine::GrammarSpec& spec : specs) {
      SCOPED_TRACE(spec.lazy ? "lazy" : "forced");
      EXPECT_TRUE(accepts(spec, call_of(family, "get_weather", Arguments::all)));
      EXPECT_TRUE(accepts(spec, call_of(family, "get_weather", Arguments::no_days)));
      EXPECT_FALSE(accepts(spec, call_of(family, "get_whether", Arguments::all))) << "another name";
      EXPECT_FALSE(accepts(spec, call_of(family, "get_weather", Arguments::all, "true"))) << "another type";
      EXPECT_FALSE(accepts(spec, call_of(family, "get_weather", Arguments::all, "\"three\""))) << "another type";
      EXPECT_FALSE(accepts(spec, call_of(family, "get_weather", Arguments::no_city))) << "city is required";
      const std::string call = call_of(family, "get_weather", Arguments::all);
      EXPECT_FALSE(accepts(spec, call + "x"));
      EXPECT_FALSE(accepts(spec, call + call)) << "one call is wanted";
    }
  }
}

TEST_F(ToolGrammar, AllowsSeveralCallsWhereTheyAreWanted) {
  for (const Family& family : families()) {
    SCOPED_TRACE(family.whole);
    const engine::GrammarSpec spec = lazy(family.template_part, CallCount::several);
    const std::string call = call_of(family, "get_weather", Arguments::all);
    EXPECT_TRUE(accepts(spec, "Two of them: " + call + "\n" + call));
  }
  EXPECT_TRUE(accepts(lazy("[TOOL_CALLS]", CallCount::several),
                      R"([TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}])"));
  EXPECT_TRUE(accepts(lazy("<|tool_call_start|>", CallCount::several),
                      R"(<|tool_call_start|>[now(), get_weather(city="x")]<|tool_call_end|>)"));
  EXPECT_TRUE(accepts(lazy("<minimax:tool_call>", CallCount::several),
                      "<minimax:tool_call><invoke name=\"now\"></invoke><invoke name=\"now\">\n</invoke>\n"
                      "</minimax:tool_call>"));
}

TEST_F(ToolGrammar, LeavesTextAndReasoningAlone) {
  const engine::GrammarSpec spec = lazy("<tool_call>");
  const std::string call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
  const std::string thought = "<think>A <tool_call>x, or <tool_call>{} in < / think></think>";
  GrammarConstraint grammar = compile(spec);
  const std::string text = thought + "I look <tool_cal and <tool _call>: ";
  EXPECT_EQ(feed(grammar, text), text);
  EXPECT_TRUE(grammar.waits_for_trigger());
  EXPECT_TRUE(grammar.allows(engine::test::kEos));
  EXPECT_EQ(feed(grammar, call), call);
  EXPECT_FALSE(grammar.waits_for_trigger());
  EXPECT_EQ(feed(grammar, "more"), "") << "nothing follows";
  EXPECT_TRUE(grammar.allows(engine::test::kEos));

  chat::ParseOptions open = kOptions;
  open.reasoning_open = true;
  EXPECT_TRUE(accepts(lazy("<tool_call>", CallCount::one, kTools, open), "say <tool_call>!</think>\n\n" + call));
  GrammarConstraint started = compile(spec);
  EXPECT_EQ(feed(started, "<tool_call>{\"nam_"), "<tool_call>{\"nam");
  EXPECT_FALSE(started.allows(engine::test::kEos)) << "a call that began is completed";
}

TEST_F(ToolGrammar, HasNoLazyFormWithoutASafeMark) {
  for (const char* part : {"<|channel|><|message|>", "Action: ```json"})
    EXPECT_FALSE(lazy_call_grammar(chat::detect_syntax(part), kOptions, kTools, CallCount::one)) << part;
  const Json odd = Json::parse(R"([{"type": "function", "function": {"name": "a \"name\""}}])");
  EXPECT_FALSE(lazy_call_grammar(chat::detect_syntax("<function="), kOptions, odd, CallCount::one));
  EXPECT_TRUE(accepts(lazy("<tool_call>", CallCount::one, odd),
                      R"(<tool_call>{"name": "a \"name\"", "arguments": {"x": 1}}</tool_call>)"));
  EXPECT_THROW(forced("<function=", CallCount::one, odd), RequestError);
}

Json tool_with(const char* properties, const char* more = "") {
  return Json::parse(fmt::format(
      R"([{{"type": "function", "function": {{"name": "f", "parameters": {{"type": "object", "properties": {}{}}}}}}}])",
      properties, more));
}

TEST_F(ToolGrammar, LeavesArgumentsFreeWhoseSchemaIsNotSupported) {
  const Json tools = tool_with(R"({"a": {"type": "integer", "multipleOf": 3}})");
  EXPECT_THROW(forced("<tool_call>", CallCount::one, tools), RequestError);
  const engine::GrammarSpec spec = lazy("<tool_call>", CallCount::one, tools);
  EXPECT_TRUE(accepts(spec, R"(<tool_call>{"name": "f", "arguments": {"b": [1]}}</tool_call>)"));
  EXPECT_FALSE(accepts(spec, R"(<tool_call>{"name": "f", "arguments": 5}</tool_call>)"));
  EXPECT_TRUE(accepts(lazy("<function= <tool_call>", CallCount::one, tools),
                      "<tool_call><function=f><parameter=a>4</parameter></function></tool_call>"));
  const Json named = tool_with(R"({"a": {"type": "string", "pattern": "^x"}})");
  EXPECT_TRUE(accepts(lazy("<function= <tool_call>", CallCount::one, named),
                      "<tool_call><function=f><parameter=a>y</parameter></function></tool_call>"));
  try {
    forced("<function= <tool_call>", CallCount::one, named);
    FAIL() << "a pattern cannot be demanded";
  } catch (const RequestError& error) {
    EXPECT_EQ(error.kind(), RequestError::Kind::not_supported);
    EXPECT_THAT(error.what(), HasSubstr("'pattern'"));
    EXPECT_THAT(error.what(), HasSubstr("qwen3-coder"));
  }
}

TEST_F(ToolGrammar, HoldsStringsWithoutQuotesToTheirSchema) {
  const Json tools = tool_with(R"({"unit": {"enum": ["C", "F"]}, "on": {"type": "string", "format": "date"},
      "note": {"type": "string", "minLength": 2, "maxLength": 4}, "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
      "list": {"type": "array", "items": {"$ref": "#/$defs/word"}}})",
                               R"(, "$defs": {"word": {"type": "string", "maxLength": 3}})");
  const engine::GrammarSpec spec = forced("<function= <tool_call>", CallCount::one, tools);
  const auto takes = [&](const std::string& name, const std::string& value) {
    return accepts(spec,
                   "<tool_call><function=f><parameter=" + name + ">" + value + "</parameter></function></tool_call>");
  };
  EXPECT_TRUE(takes("unit", "C"));
  EXPECT_TRUE(takes("unit", "\nF\n"));
  EXPECT_FALSE(takes("unit", "K"));
  EXPECT_TRUE(takes("on", "2026-11-23"));
  EXPECT_FALSE(takes("on", "2026-13-23"));
  EXPECT_TRUE(takes("note", "abcd"));
  EXPECT_FALSE(takes("note", "a"));
  EXPECT_FALSE(takes("note", "abcde"));
  EXPECT_TRUE(takes("any", "null"));
  EXPECT_TRUE(takes("any", "any < text </parameter at all\n"));
  EXPECT_TRUE(takes("list", R"(["abc", "d"])"));
  EXPECT_FALSE(takes("list", R"(["abcd"])"));
  EXPECT_FALSE(takes("other", "1"));
}

// Whatever a schema is: a lazy grammar is made, a forced one or a RequestError; nothing else is thrown.
TEST_F(ToolGrammar, CopesWithSchemasOfAnyKind) {
  const char* const schemas[] = {
      R"(5)",
      R"({"properties": 5})",
      R"({"properties": {"a": 5}})",
      R"({"properties": {"a": true}})",
      R"({"properties": {"a": {"type": 5}}})",
      R"({"$ref": "#/x"})",
      R"({"$ref": 5})",
      R"({"required": "a"})",
      R"({"properties": {"a": {"$ref": "#/properties/a"}}})",
      R"({"required": [1]})",
      R"({"enum": [1]})",
      R"({"type": "string"})",
      R"({"properties": {"a": {"enum": []}}})",
      R"({"allOf": [{}]})",
      R"({"properties": {"a": {"type": "string", "enum": "x"}}})",
      R"({"type": ["object", "null"]})",
      R"({"properties": {"a": {"type": "string", "minLength": -1}}})",
      R"({"additionalProperties": 5})",
      R"({"properties": {"a": {"type": "string", "maxLength": 1e9}}})",
      R"({"properties": {"a": {"anyOf": []}}})",
      R"({"properties": {"a": {"anyOf": 5, "type": "string"}}})",
      R"({"required": ["a"]})",
      R"({"properties": {"a b\n": {}}, "required": ["a b\n"]})",
      R"({"properties": {"a": {"type": "string", "format": 5}}})",
      R"({"properties": {"a": {"$ref": "#/%zz~2"}}})",
      R"({"properties": {"a": {"type": "string", "const": "</parameter>"}}})",
      R"({"properties": {"a": false}, "required": ["a"]})",
      R"({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, {"$ref": "#/properties/a"}, {"type": "string"}]}}})"};
  for (const char* schema : schemas) {
    Json tools = Json::parse(R"([{"type": "function", "function": {"name": "f"}}])");
    tools[0]["function"]["parameters"] = Json::parse(schema);
    for (const Family& family : families()) {
      SCOPED_TRACE(std::string(schema) + " " + std::string(family.template_part));
      EXPECT_NO_THROW(engine::parse_gbnf(lazy(family.template_part, CallCount::several, tools).text, {}));
      try {
        engine::parse_gbnf(forced(family.template_part, CallCount::several, tools).text, {});
      } catch (const RequestError&) {
      }
    }
  }
}

// ---- whatever is accepted is read

// Random texts of a grammar. Beyond a depth it takes the shortest way to the end.
class RandomText {
 public:
  RandomText(const engine::GrammarRules& rules, uint32_t seed) : rules_(rules), random_(seed) {
    heights_.assign(rules.rules.size(), kEndless);
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < rules.rules.size(); ++i) {
        const size_t height = height_of(rules.rules[i].body);
        if (height < heights_[i]) heights_[i] = height, changed = true;
      }
    }
  }
  std::string make() {
    text_.clear();
    n_rules_ = 0;
    limit_ = random_() % 60;
    append(rules_.rules[rules_.root].body);
    return text_;
  }

 private:
  using Kind = engine::GrammarExpression::Kind;
  static constexpr size_t kEndless = 1'000'000;

  size_t height_of(const engine::GrammarExpression& e) const {
    if (e.kind == Kind::rule) return std::min(kEndless, heights_[e.rule] + 1);
    if (e.kind == Kind::repeat) return e.at_least == 0 ? 0 : height_of(e.children.front());
    size_t height = e.kind == Kind::choice ? kEndless : 0;
    for (const auto& child : e.children)
      height = e.kind == Kind::choice ? std::min(height, height_of(child)) : std::max(height, height_of(child));
    return height;
  }
  void append(const engine::GrammarExpression& e) {
    const bool hurry = n_rules_ > limit_;
    switch (e.kind) {
      case Kind::text:
        text_ += e.text;
        return;
      case Kind::character: {
        const engine::CodeRange range = e.ranges[random_() % e.ranges.size()];
        vocab::append_utf8(text_, range.first + static_cast<char32_t>(random_() % (range.last - range.first + 1)));
        return;
      }
      case Kind::rule:
        ++n_rules_;
        append(rules_.rules[e.rule].body);
        return;
      case Kind::token:
        FAIL() << "no token is named";
      case Kind::sequence:
        for (const auto& child : e.children) append(child);
        return;
      case Kind::choice: {
        const engine::GrammarExpression* taken = &e.children[random_() % e.children.size()];
        if (hurry)
          for (const auto& child : e.children)
            if (height_of(child) < height_of(*taken)) taken = &child;
        append(*taken);
        return;
      }
      case Kind::repeat: {
        const uint32_t most = e.at_most.value_or(e.at_least + 3);
        uint32_t n = e.at_least;
        while (!hurry && n < most && random_() % 2 == 0) ++n;
        for (uint32_t i = 0; i < n; ++i) append(e.children.front());
        return;
      }
    }
  }

  const engine::GrammarRules& rules_;
  std::mt19937 random_;
  std::vector<size_t> heights_;
  std::string text_;
  size_t n_rules_ = 0, limit_ = 0;
};

const Json kManyTools = Json::parse(R"([
  {"type": "function", "function": {"name": "edit-file", "parameters": {"type": "object", "properties": {
    "path": {"type": "string"}, "mode": {"enum": ["a", "w", "12"], "type": "string"}, "line": {"type": "integer"},
    "ratio": {"type": "number"}, "force": {"type": "boolean"}, "when": {"type": "string", "format": "date"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "tags": {"type": "array", "items": {"type": "string"}},
    "at": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"$ref": "#/$defs/unit"}}, "required": ["y"]},
    "kind": {"$ref": "#/$defs/unit"}, "title": {"type": "string", "minLength": 1}, "level": {"enum": [1, 2, "three"]}},
    "$defs": {"unit": {"enum": ["C", "F"]}}, "required": ["path", "line", "kind"]}}},
  {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
  {"type": "function", "function": {"name": "note", "parameters": {"type": "object"}}},
  {"type": "function", "function": {"name": "set.all", "parameters": {"type": "object",
    "additionalProperties": {"type": "integer"}}}}])");

// What is wrong with the arguments of a call; empty: nothing. Only what kManyTools needs.
std::string fault_of(const chat::ToolCall& call) {
  const Json arguments = Json::parse(call.arguments, nullptr, false);
  if (!arguments.is_object()) return "no object: " + call.arguments;
  for (const Json& tool : kManyTools) {
    if (tool["function"]["name"] != call.name) continue;
    const Json& schema = tool["function"]["parameters"];
    for (const Json& name : schema.value("required", Json::array()))
      if (!arguments.contains(name.get<std::string>())) return "lacks " + name.dump();
    const Json properties = schema.value("properties", Json::object());
    for (const auto& [name, value] : arguments.items()) {
      if (!properties.contains(name)) {
        if (schema.contains("properties")) return "unknown: " + name;
        if (schema.contains("additionalProperties") && !value.is_number_integer()) return "no integer: " + value.dump();
        continue;
      }
      const Json& wanted = chat::resolve_references(properties[name], schema);
      if ((chat::types_of_schema(wanted, schema).bits & chat::types_of_value(value).bits) == 0)
        return "another type: " + value.dump();
      if (wanted.contains("enum") &&
          std::find(wanted["enum"].begin(), wanted["enum"].end(), value) == wanted["enum"].end())
        return "not listed: " + value.dump();
      if (wanted.contains("minLength") && value == "") return "too short";
      if (name == "at" && (!value.contains("y") || (value["y"] != "C" && value["y"] != "F"))) return value.dump();
    }
    return "";
  }
  return "unknown tool " + call.name;
}

TEST_F(ToolGrammar, WhatIsAcceptedIsReadAsACallWithItsArguments) {
  std::vector<std::string_view> parts = {"<|channel|><|message|>", "Action: ```json"};
  for (const Family& family : families()) parts.push_back(family.template_part);
  std::map<std::string, int> n_calls;
  for (const std::string_view part : parts) {
    const chat::OutputSyntax syntax = chat::detect_syntax(part);
    std::vector<engine::GrammarSpec> specs = {forced_call_grammar(syntax, kOptions, kManyTools, CallCount::several)};
    if (auto spec = lazy_call_grammar(syntax, kOptions, kManyTools, CallCount::several)) specs.push_back(*spec);
    for (const engine::GrammarSpec& spec : specs) {
      const engine::GrammarRules rules = engine::parse_gbnf(spec.text, {});
      const engine::GrammarAutomaton automaton(rules);
      engine::GrammarMachine machine(automaton);
      RandomText random(rules, 7);
      for (int i = 0; i < 60; ++i) {
        const std::string text = random.make();
        ASSERT_TRUE(machine.accepts(machine.step(machine.initial(), text))) << text;
        chat::OutputParser parser(syntax, kOptions, kManyTools);
        chat::ParsedMessage message;
        for (const chat::Delta& delta : parser.push(text)) message.add(delta);
        for (const chat::Delta& delta : parser.finish()) message.add(delta);
        EXPECT_EQ(message.content, "") << syntax.name << (spec.lazy ? " lazy: " : ": ") << text;
        EXPECT_FALSE(message.calls.empty()) << syntax.name << (spec.lazy ? " lazy: " : ": ") << text;
        for (const chat::ToolCall& call : message.calls)
          EXPECT_EQ(fault_of(call), "") << syntax.name << (spec.lazy ? " lazy: " : ": ") << text << "\n"
                                        << call.name << " " << call.arguments;
        n_calls[syntax.name] += static_cast<int>(message.calls.size());
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
  EXPECT_GT(n_calls.size(), 20u);
}

}  // namespace
}  // namespace caravan::server
