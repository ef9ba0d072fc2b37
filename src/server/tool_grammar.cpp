#include "server/tool_grammar.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <tuple>

#include "base/log.h"
#include "chat/parameter_types.h"
#include "engine/json_schema.h"
#include "engine/schema_merge.h"

namespace caravan::server {
namespace {

using engine::grammar_literal;
using Form = chat::CallSyntax::Form;

// How close to the template's way of writing a grammar keeps.
enum class Style { exact, free };

// Families that write an array of calls behind one mark.
bool writes_arrays(const std::string& family) {
  static constexpr std::string_view kFamilies[] = {"mistral", "command-r7b", "command-r", "nemotron-v2",
                                                   "apertus", "apriel",      "granite",   "firefunction-v2"};
  return std::find(std::begin(kFamilies), std::end(kFamilies), family) != std::end(kFamilies);
}

// The way to write calls that the family's template uses.
const chat::CallSyntax& main_syntax(const chat::OutputSyntax& syntax) {
  return syntax.name == "llama3" ? syntax.calls.back() : syntax.calls.front();
}

// One after the other; empty parts are left out.
std::string sequence(std::initializer_list<std::string> parts) {
  std::string text;
  for (const std::string& part : parts)
    if (!part.empty()) text += (text.empty() ? "" : " ") + part;
  return text;
}

std::string choice(const std::vector<std::string>& ways) { return fmt::format("({})", fmt::join(ways, " | ")); }

// Names that every family writes as they are: no part of a mark, nothing that the parser would trim.
bool is_plain_name(const std::string& name) {
  return !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  });
}

// The schema of a tool's parameters, which accepts objects only.
Json parameters_of(const Json& function) {
  const Json* given = find_field(function, "parameters");
  Json schema = given != nullptr && given->is_object() ? *given : Json::object();
  const uint8_t types = chat::types_of_schema(schema, schema).bits;
  if ((types & chat::JsonTypes::kObject) == 0)
    throw RequestError(
        fmt::format("Field 'tools': the parameters of {} are not the schema of an object", function.at("name").dump()));
  if (types != chat::JsonTypes::kObject) schema["type"] = "object";
  return schema;
}

// What cannot be put into a grammar of parameters that are written without JSON.
class UnsupportedParameter : public RequestError {
 public:
  explicit UnsupportedParameter(const std::string& what) : RequestError(what, Kind::not_supported) {}
};

// The calls of one way to write them. Rules go to a grammar that may hold those of others.
class CallGrammar {
 public:
  CallGrammar(engine::SchemaGrammar& grammar, const chat::OutputSyntax& syntax, const chat::CallSyntax& calls,
              const Json& tools, bool lazy)
      : grammar_(grammar),
        syntax_(syntax),
        calls_(calls),
        tools_(tools),
        lazy_(lazy),
        style_(lazy || calls.form == Form::parameters ? Style::free : Style::exact) {
    if (style_ == Style::free) gap_ = grammar_.add_rule("gap", R"([ \t\r\n]{0,20})");
    if (calls.form == Form::parameters) text_ = add_any_text();
  }

  // One call, or several, with all marks around them.
  std::string expression(bool several) {
    switch (calls_.form) {
      case Form::json:
        return lazy_ ? free_json_calls(several) : exact_json_calls(several);
      case Form::named:
        return lazy_ ? blocks(named_call(), several) : exact_named_calls(several);
      case Form::parameters:
        return blocks(call_with_parameters(), several);
      case Form::python:
        return python_calls(several);
    }
    return "";
  }

 private:
  // ---- white space

  // What the template writes, or in the free style any white space.
  std::string gap(std::string_view exact = "") const {
    if (style_ == Style::free) return gap_;
    return exact.empty() ? "" : grammar_literal(exact);
  }
  std::string separator() const { return sequence({gap(), R"(",")", gap(" ")}); }

  // ---- tools

  template <typename F>
  std::string one_of_the_tools(F&& body_of) {
    std::vector<std::string> names;
    for (size_t i = 0; i < tools_.size(); ++i)
      names.push_back(grammar_.add_rule(fmt::format("call-{}", i), body_of(tools_[i].at("function"), i)));
    return grammar_.add_rule("call", fmt::format("{}", fmt::join(names, " | ")));
  }

  // The name where it stands without quotes.
  std::string plain_name(const Json& function) const {
    const auto name = function.at("name").get<std::string>();
    if (!is_plain_name(name) || name.starts_with("functions."))
      throw UnsupportedParameter(
          fmt::format("Field 'tools': models of the family '{}' write names of letters, digits, '_', '-' and '.'; "
                      "found '{}'",
                      syntax_.name, name));
    return name;
  }

  // The rule that make() adds, or where it fails for a lazy grammar, fallback instead.
  template <typename F>
  std::string or_else(const std::string& fallback, const Json& function, F&& make) {
    if (!lazy_) return make();
    const size_t n_rules = grammar_.n_rules();
    try {
      return make();
    } catch (const RequestError& error) {
      grammar_.remove_rules_from(n_rules);
      spdlog::debug("the arguments of the tool {} are not constrained: {}", function.at("name").dump(), error.what());
      return fallback;
    }
  }

  std::string json_arguments(const Json& function, size_t i) {
    return or_else("object", function,
                   [&] { return grammar_.add_schema(fmt::format("arguments-{}", i), parameters_of(function)); });
  }

  // ---- calls as JSON

  std::string exact_json_calls(bool several) {
    const bool is_command_r = syntax_.name.starts_with("command-r");
    const char* name_key = is_command_r ? "tool_name" : "name";
    const char* arguments_key = is_command_r || syntax_.name == "llama3" ? "parameters" : "arguments";
    const std::string call = one_of_the_tools([&](const Json& function, size_t i) {
      const std::string quoted = function.at("name").dump(), arguments = json_arguments(function, i);
      const std::string before = calls_.name_is_key
                                     ? "{" + quoted + ": "
                                     : fmt::format("{{\"{}\": {}, \"{}\": ", name_key, quoted, arguments_key);
      return sequence({grammar_literal(before), arguments, R"("}")"});
    });
    const std::string begin = calls_.bare ? "" : grammar_literal(calls_.begin);
    const std::string end = calls_.end.empty() ? "" : grammar_literal(calls_.end);
    if (writes_arrays(syntax_.name))
      return sequence({begin, R"("[")", call, several ? R"q((", " )q" + call + ")*" : "", R"("]")", end});
    const std::string line = !calls_.bare && !calls_.end.empty() ? R"("\n")" : "";
    const std::string one = sequence({begin, line, call, line, end});
    return several && !calls_.bare ? fmt::format("{} ({} {})*", one, line.empty() ? R"("")" : line, one) : one;
  }

  // The members in the order in which models write them, further ones that some add, an object or an array of them.
  std::string free_json_calls(bool several) {
    const std::string colon = sequence({gap_, R"(":")", gap_}), comma = separator();
    const std::string id =
        grammar_.add_rule("call-id", sequence({R"q(("\"id\"" | "\"tool_call_id\""))q", colon, "(string | number)"}));
    const std::string name_key = syntax_.name.starts_with("command-r") ? R"("\"tool_name\"")" : R"("\"name\"")";
    const std::string call = one_of_the_tools([&](const Json& function, size_t i) {
      const std::string name = grammar_literal(function.at("name").dump()), arguments = json_arguments(function, i);
      if (calls_.name_is_key) return sequence({R"("{")", gap_, name, colon, arguments, gap_, R"("}")"});
      const std::string first = sequence({name_key, colon, name});
      const std::string second = sequence({R"q(("\"arguments\"" | "\"parameters\""))q", colon, arguments});
      const std::string members = choice({sequence({first, comma, second}), sequence({second, comma, first})});
      const std::string optional_id = fmt::format("({} {})?", id, comma);
      return sequence({R"("{")", gap_, syntax_.name == "llama3" ? type_member(comma, colon) : "", optional_id, members,
                       fmt::format("({} {})?", comma, id), gap_, R"("}")"});
    });
    const std::string object = syntax_.name == "llama3" ? choice({call, wrapped(call, comma, colon)}) : call;
    const std::string more = several ? fmt::format("({} {})*", comma, object) : "";
    const std::string one = choice({object, sequence({R"("[")", gap_, object, more, gap_, R"("]")"})});
    return blocks(one, several);
  }

  static std::string type_member(const std::string& comma, const std::string& colon) {
    return fmt::format(R"q(("\"type\"" {} "\"function\"" {})?)q", colon, comma);
  }
  // {"type": "function", "function": {...}}
  std::string wrapped(const std::string& call, const std::string& comma, const std::string& colon) const {
    return sequence({R"("{")", gap_, type_member(comma, colon), R"("\"function\"")", colon, call, gap_, R"("}")"});
  }

  // ---- calls by name

  std::string exact_named_calls(bool several) {
    const bool is_kimi = syntax_.name == "kimi-k2";
    const std::string call = one_of_the_tools([&](const Json& function, size_t i) {
      const std::string name = plain_name(function);
      const std::string written = is_kimi ? "functions." + name + ":0" : name;
      const bool fenced = calls_.name_end.ends_with("json");
      const std::string head = calls_.call_begin + written + calls_.name_end + (fenced ? "\n" : "");
      const std::string end = (fenced && !calls_.call_end.empty() ? "\n" : "") + calls_.call_end;
      return sequence({grammar_literal(head), json_arguments(function, i), end.empty() ? "" : grammar_literal(end)});
    });
    const std::string begin = grammar_literal(calls_.begin);
    const bool repeats_mark = calls_.end.empty();  // each call has the mark before it
    if (repeats_mark) return several ? fmt::format("({} {})+", begin, call) : sequence({begin, call});
    return sequence({begin, call + (several ? "+" : ""), grammar_literal(calls_.end)});
  }

  std::string named_call() {
    const bool is_kimi = syntax_.name == "kimi-k2";
    const std::string id =
        calls_.id_begin.empty() ? "" : fmt::format("({} [a-zA-Z0-9_-]{{1,40}})?", grammar_literal(calls_.id_begin));
    return one_of_the_tools([&](const Json& function, size_t i) {
      std::string name = grammar_literal(plain_name(function));
      if (is_kimi) name = fmt::format(R"q("functions." {} ":" [0-9]{{1,4}})q", name);
      return sequence({literal(calls_.call_begin), name, id, literal(calls_.name_end), gap_,
                       json_arguments(function, i), gap_, literal(calls_.call_end)});
    });
  }

  static std::string literal(const std::string& text) { return text.empty() ? "" : grammar_literal(text); }

  // Calls with the marks before and after them: several stand between the same marks where each has a mark of its own.
  std::string blocks(const std::string& call, bool several) {
    const bool has_own_mark = calls_.form != Form::json && !calls_.call_begin.empty();
    const std::string more = several && has_own_mark ? fmt::format("({} {})*", gap_, call) : "";
    const bool may_lack_end = syntax_.name == "granite";
    // the mark that begins a call may be the beginning of it: no white space then
    const std::string before = calls_.begin.ends_with('"') || calls_.begin.ends_with('=') ? "" : gap_;
    std::string end = calls_.end.empty() ? "" : sequence({gap_, grammar_literal(calls_.end)});
    if (may_lack_end) end = "(" + end + ")?";
    const std::string block =
        grammar_.add_rule("calls", sequence({grammar_literal(calls_.begin), before, call, more, end}));
    return several ? fmt::format("{} ({} {})*", block, gap_, block) : block;
  }

  // ---- parameters

  struct Parameter {
    std::string expression;
    bool required;
  };

  // Parameters in the order of the schema: all that are required, others or not.
  std::string list_of(const std::string& name, const std::vector<Parameter>& all, const std::string& between) {
    std::string first, after;  // what may be written from parameter i on: as the beginning, and after others
    for (size_t i = all.size(); i-- > 0;) {
      const std::string here = grammar_.add_rule(fmt::format("{}-{}", name, i), all[i].expression);
      const std::string with = sequence({here, after}), next = sequence({between, here});
      if (all[i].required) {
        first = with;
      } else {
        first = first.empty() ? fmt::format("({})?", with) : fmt::format("({} | {})", with, first);
      }
      const std::string rest = all[i].required ? sequence({next, after}) : sequence({"(" + next + ")?", after});
      // they stand twice in what comes before
      after = grammar_.add_rule(fmt::format("{}-after-{}", name, i), rest);
      if (i > 0) first = grammar_.add_rule(fmt::format("{}-from-{}", name, i), first);
    }
    return first;
  }

  // The schemas of the parameters by name; throws where an object's schema says more than that.
  struct ParameterSchemas {
    std::vector<std::tuple<std::string, Json, bool>> all;  // name, schema, required
    std::optional<Json> others;                            // the schema of any parameters, where no name is given
    Json document;
  };
  ParameterSchemas parameter_schemas(const Json& function) const {
    ParameterSchemas result;
    result.document = parameters_of(function);
    const Json schema = chat::resolve_references(result.document, result.document);
    const auto refuse = [&](const std::string& what) {
      throw UnsupportedParameter(
          fmt::format("Field 'tools': the parameters of {} cannot be demanded of models of the "
                      "family '{}': {} is not supported there",
                      function.at("name").dump(), syntax_.name, what));
    };
    if (!schema.is_object()) refuse("a schema that is no object");
    for (const auto& [keyword, value] : schema.items()) {
      const bool known =
          keyword == "type" || keyword == "properties" || keyword == "required" || keyword == "additionalProperties";
      if (!known && engine::is_constraint(keyword)) refuse("'" + keyword + "'");
    }
    const Json properties = schema.value("properties", Json::object()),
               required = schema.value("required", Json::array());
    if (!properties.is_object() || !required.is_array()) refuse("this form of 'properties' or 'required'");
    const Json additional = schema.value("additionalProperties", Json(true));
    const auto is_required = [&](const std::string& name) {
      return std::find(required.begin(), required.end(), Json(name)) != required.end();
    };
    for (const auto& [name, value] : properties.items()) result.all.emplace_back(name, value, is_required(name));
    for (const Json& name : required) {
      if (!name.is_string()) refuse("this form of 'required'");
      if (properties.contains(name.get<std::string>())) continue;
      if (additional == Json(false)) refuse("a required parameter that is not allowed");
      result.all.emplace_back(name.get<std::string>(), additional, true);
    }
    for (const auto& [name, value, needed] : result.all)
      if (!is_plain_name(name)) refuse(fmt::format("the name '{}'", name));
    const bool names_none =
        schema.contains("additionalProperties") || !(schema.contains("properties") || schema.contains("required"));
    if (result.all.empty() && names_none && additional != Json(false)) result.others = additional;
    return result;
  }

  std::string call_with_parameters() {
    return one_of_the_tools([&](const Json& function, size_t i) {
      const std::string name = plain_name(function), prefix = fmt::format("arguments-{}", i);
      const std::string parameters =
          or_else(any_parameters(), function, [&] { return parameter_list(function, prefix); });
      // white space is a name's end where that is a line
      const std::string head = calls_.name_end == "\n" ? name : name + calls_.name_end;
      return sequence({grammar_literal(calls_.call_begin + head), gap_, parameters, gap_, literal(calls_.call_end)});
    });
  }

  std::string parameter_list(const Json& function, const std::string& prefix) {
    const ParameterSchemas schemas = parameter_schemas(function);
    if (schemas.others) {
      const std::string any = parameter(prefix + "-other", any_name(), *schemas.others, schemas.document, function);
      return fmt::format("({} ({} {})*)?", any, gap_, any);
    }
    std::vector<Parameter> list;
    for (const auto& [name, schema, required] : schemas.all)
      list.push_back(
          {parameter(prefix + "-" + name, grammar_literal(name), schema, schemas.document, function), required});
    return list_of(prefix + "-list", list, gap_);
  }

  std::string any_name() { return grammar_.add_rule("parameter-name", "[a-zA-Z_] [a-zA-Z0-9_.-]{0,63}"); }

  std::string any_parameters() {
    const std::string any = grammar_.add_rule("any-parameter", written(any_name(), text_, "value"));
    return fmt::format("({} ({} {})*)?", any, gap_, any);
  }

  // A parameter whose name and value match. text: as it stands, up to the closing mark, with it; json: a JSON value.
  // One of both may be empty.
  std::string written(const std::string& name, const std::string& text, const std::string& json) {
    const std::string end = grammar_literal(calls_.parameter_end);
    const std::string json_value = json.empty() ? "" : sequence({gap_, json, gap_, end});
    const std::string begin = sequence({grammar_literal(calls_.parameter_begin), name});
    if (syntax_.name == "dsml") {  // the tag says what the value is
      std::vector<std::string> ways;
      if (!text.empty()) ways.push_back(sequence({R"q("\" string=\"true\">")q", text}));
      if (!json.empty()) ways.push_back(sequence({R"q("\" string=\"false\">")q", json_value}));
      return sequence({begin, choice(ways)});
    }
    const bool quoted = calls_.parameter_begin.ends_with('"') && !calls_.key_end.starts_with('"');
    const std::string key_end = grammar_literal((quoted ? "\"" : "") + calls_.key_end);
    const std::string value_begin = calls_.value_begin.empty() ? "" : sequence({gap_, literal(calls_.value_begin)});
    std::vector<std::string> ways;
    if (!text.empty()) ways.push_back(text);
    if (!json.empty()) ways.push_back(json_value);
    return sequence({begin, key_end, value_begin, choice(ways)});
  }

  std::string parameter(const std::string& rule, const std::string& name, const Json& schema, const Json& document,
                        const Json& function) {
    const chat::JsonTypes types = chat::types_of_schema(schema, document);
    std::string text, json;
    if (types.has_strings()) text = or_else(text_, function, [&] { return text_value(schema, document, function); });
    if (types.only_strings()) return written(name, text, "");
    const std::string fallback = syntax_.name == "dsml" ? "value" : "";
    json = or_else(fallback, function, [&] { return grammar_.add_schema(rule, schema, document); });
    return written(name, json.empty() ? text_ : text, json);
  }

  // ---- strings as they stand

  std::string mark_class() const { return calls_.parameter_end.substr(0, 1); }

  // Any text up to the closing mark, with it.
  std::string add_any_text() {
    if (!calls_.cdata) return grammar_.add_text_through("text", calls_.parameter_end);
    const std::string marked = grammar_.add_text_through("marked-text", "]]>" + calls_.parameter_end);
    return fmt::format(R"q(("<![CDATA[" {} | [^{}]* {}))q", marked, mark_class(),
                       grammar_literal(calls_.parameter_end));
  }

  // The strings that a schema accepts, with the closing mark. One line break before and after a value
  // does not belong to it.
  std::string text_value(const Json& given, const Json& document, const Json& function, int depth = 0) {
    const Json& schema = chat::resolve_references(given, document);
    if (!schema.is_object()) return text_;
    if (depth > kMaxTextDepth || (depth > 0 && ++n_inner_texts_ > kMaxInnerTexts)) refuse_circle(function);
    const bool combined = given.is_object() && given.contains("$ref") && engine::constrains_beside(given, "$ref");
    const auto refuse = [&](const std::string& what) {
      throw UnsupportedParameter(
          fmt::format("Field 'tools': a parameter of {} cannot be demanded of models of the "
                      "family '{}': {} is not supported there",
                      function.at("name").dump(), syntax_.name, what));
    };
    if (combined) refuse("'$ref' beside other keywords");
    for (const char* keyword : {"anyOf", "oneOf"})
      if (schema.contains(keyword)) {
        if (engine::constrains_beside(schema, keyword)) refuse(fmt::format("'{}' beside other keywords", keyword));
        std::vector<std::string> ways;
        for (const Json& part : schema[keyword])
          if (chat::types_of_schema(part, document).has_strings())
            ways.push_back(text_value(part, document, function, depth + 1));
        return choice(ways);
      }
    const auto framed = [&](const std::string& text) {
      return sequence({R"("\n"?)", text, R"("\n"?)", grammar_literal(calls_.parameter_end)});
    };
    if (schema.contains("enum") || schema.contains("const")) {
      const Json values = schema.contains("enum") ? schema["enum"] : Json::array({schema["const"]});
      std::vector<std::string> ways;
      for (const Json& value : values) {
        if (!value.is_string()) continue;
        const auto text = value.get<std::string>();
        if (text.find(calls_.parameter_end) != text.npos || text.starts_with('\n') || text.ends_with('\n') ||
            (calls_.cdata && text.starts_with("<![CDATA[")))
          refuse(fmt::format("the value {}", value.dump()));
        ways.push_back(grammar_literal(text));
      }
      if (ways.empty()) refuse("an empty 'enum'");
      return framed(choice(ways));
    }
    for (const char* keyword : {"pattern", "allOf", "not", "if"})
      if (schema.contains(keyword)) refuse(fmt::format("'{}'", keyword));
    const Json format = schema.value("format", Json());
    if (format == "date" || format == "time") return framed(format.get<std::string>());
    if (format == "date-time") return framed(R"(date "T" time)");
    if (format == "uuid") return framed(R"(hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12})");
    return text_of_length(schema, refuse);
  }

  [[noreturn]] void refuse_circle(const Json& function) const {
    throw UnsupportedParameter(
        fmt::format("Field 'tools': the schemas of the parameters of {} are too many, or refer to "
                    "each other in a circle",
                    function.at("name").dump()));
  }

  template <typename F>
  std::string text_of_length(const Json& schema, const F& refuse) {
    constexpr uint64_t kMost = 2000;
    const auto length = [&](const char* keyword, uint64_t otherwise) {
      const Json value = schema.value(keyword, Json(otherwise));
      if (!value.is_number_unsigned() || value.get<uint64_t>() > kMost)
        refuse(fmt::format("'{}' but for whole numbers up to {}", keyword, kMost));
      return value.get<uint64_t>();
    };
    const uint64_t least = length("minLength", 0);
    const std::string end = grammar_literal(calls_.parameter_end), first = fmt::format("[^\\n{}]", mark_class());
    // A model may need the character that begins the mark more than the limit is worth.
    if (!schema.contains("maxLength") || lazy_) {
      if (least == 0) return text_;
      if (calls_.cdata) {
        const std::string marked = grammar_.add_text_through("marked-text", "]]>" + calls_.parameter_end);
        return fmt::format(R"q(("<![CDATA[" [^\]]{{{}}} {} | "\n"? {}{{{}}} [^{}]* {}))q", least, marked, first, least,
                           mark_class(), end);
      }
      return fmt::format(R"("\n"? {}{{{}}} {})", first, least, text_);
    }
    const uint64_t most = length("maxLength", 0);
    if (most < least) refuse("a 'maxLength' below 'minLength'");
    return fmt::format(R"("\n"? {}{{{}}} [^{}]{{0,{}}} "\n"? {})", first, least, mark_class(), most - least, end);
  }

  // ---- calls as Python

  std::string python_calls(bool several) {
    const std::string call = one_of_the_tools([&](const Json& function, size_t i) {
      const std::string any = grammar_.add_rule("any-keyword", sequence({any_name(), gap(), R"("=")", gap(), "value"}));
      const std::string fallback = fmt::format("({} ({} {})*)?", any, separator(), any);
      const std::string prefix = fmt::format("arguments-{}", i);
      const std::string keywords = or_else(fallback, function, [&] { return keyword_list(function, prefix); });
      return sequence({grammar_literal(plain_name(function) + "("), gap(), keywords, gap(), R"q(")")q"});
    });
    const std::string more = several ? fmt::format("({} {})*", separator(), call) : "";
    const std::string block =
        grammar_.add_rule("calls", sequence({grammar_literal(calls_.begin), gap(), R"("[")", gap(), call, more, gap(),
                                             R"("]")", gap(), grammar_literal(calls_.end)}));
    return several && lazy_ ? fmt::format("{} ({} {})*", block, gap_, block) : block;
  }

  std::string keyword_list(const Json& function, const std::string& prefix) {
    const ParameterSchemas schemas = parameter_schemas(function);
    const auto keyword = [&](const std::string& name, const std::string& rule, const Json& schema) {
      return sequence({name, gap(), R"("=")", gap(), grammar_.add_schema(rule, schema, schemas.document)});
    };
    if (schemas.others) {
      const std::string any =
          grammar_.add_rule(prefix + "-keyword", keyword(any_name(), prefix + "-other", *schemas.others));
      return fmt::format("({} ({} {})*)?", any, separator(), any);
    }
    std::vector<Parameter> list;
    for (const auto& [name, schema, required] : schemas.all)
      list.push_back({keyword(grammar_literal(name), prefix + "-" + name, schema), required});
    return list_of(prefix + "-list", list, separator());
  }

  engine::SchemaGrammar& grammar_;
  const chat::OutputSyntax& syntax_;
  const chat::CallSyntax& calls_;
  const Json& tools_;
  const bool lazy_;
  const Style style_;
  std::string gap_;
  std::string text_;  // any value of a parameter as it stands
  // Parts of combined schemas, which may refer to each other.
  static constexpr int kMaxTextDepth = 16;
  static constexpr size_t kMaxInnerTexts = 2000;  // of all tools together
  size_t n_inner_texts_ = 0;
};

engine::SchemaGrammar grammar_for(const chat::CallSyntax& calls) {
  if (calls.form == Form::parameters) return engine::SchemaGrammar({.forbidden = calls.parameter_end});
  if (calls.form == Form::python) return engine::SchemaGrammar({.python = true, .forbidden = calls.end});
  return engine::SchemaGrammar();
}

// gpt-oss: a thought in its channel, then a call in another.
std::string channel_call(engine::SchemaGrammar& grammar, const Json& tools) {
  std::vector<std::string> ways;
  for (size_t i = 0; i < tools.size(); ++i) {
    const Json& function = tools[i].at("function");
    const auto name = function.at("name").get<std::string>();
    const std::string arguments = grammar.add_schema(fmt::format("arguments-{}", i), parameters_of(function));
    ways.push_back(sequence(
        {grammar_literal("<|channel|>commentary to=functions." + name + " <|constrain|>json<|message|>"), arguments}));
  }
  const std::string thought = grammar.add_text_through("thought", "<|end|>");
  return sequence(
      {fmt::format(R"q(("<|channel|>analysis<|message|>" {} "<|start|>assistant")?)q", thought), choice(ways)});
}

// The texts that begin calls and nothing else; empty where the family has none.
std::vector<std::string> call_beginnings(const chat::OutputSyntax& syntax) {
  std::vector<std::string> words;
  if (syntax.channels || syntax.name == "command-r") return words;  // "Action:" is a word of many texts
  for (const chat::CallSyntax& calls : syntax.calls)
    if (!calls.bare) words.push_back(syntax.name == "firefunction-v2" ? calls.begin + "[" : calls.begin);
  return words;
}

}  // namespace

engine::GrammarSpec forced_call_grammar(const chat::OutputSyntax& syntax, const chat::ParseOptions& options,
                                        const Json& tools, CallCount count) {
  engine::SchemaGrammar grammar;
  std::string body;
  if (syntax.channels) {
    body = channel_call(grammar, tools);
  } else {
    const bool each = syntax.name == "dsml";  // its templates do not agree
    std::vector<std::string> ways;
    if (!each) grammar = grammar_for(main_syntax(syntax));
    if (each) grammar = grammar_for(syntax.calls.front());
    for (const chat::CallSyntax& calls : syntax.calls)
      if (each || &calls == &main_syntax(syntax))
        ways.push_back(CallGrammar(grammar, syntax, calls, tools, false).expression(count == CallCount::several));
    body = choice(ways);
    if (options.reasoning_open && !syntax.reasoning_end.empty())
      body = sequence({grammar.add_text_through("thought", syntax.reasoning_end), "space", body});
  }
  grammar.add_rule("root", body);
  return {.text = grammar.text()};
}

std::optional<engine::GrammarSpec> lazy_call_grammar(const chat::OutputSyntax& syntax,
                                                     const chat::ParseOptions& options, const Json& tools,
                                                     CallCount count) {
  const std::vector<std::string> words = call_beginnings(syntax);
  if (words.empty()) return std::nullopt;
  engine::SchemaGrammar grammar = grammar_for(syntax.calls.front());
  std::vector<std::string> ways;
  try {
    for (const chat::CallSyntax& calls : syntax.calls)
      if (!calls.bare)
        ways.push_back(CallGrammar(grammar, syntax, calls, tools, true).expression(count == CallCount::several));
  } catch (const UnsupportedParameter& error) {  // a name
    spdlog::debug("calls of tools are not constrained: {}", error.what());
    return std::nullopt;
  }
  grammar.add_rule("root", choice(ways) + " gap");
  engine::GrammarSpec spec{.text = grammar.text(), .lazy = true};
  for (const std::string& word : words)
    spec.triggers.push_back({.kind = engine::GrammarTrigger::Kind::word, .text = word});
  spec.thought = {syntax.reasoning_begin, syntax.reasoning_end, options.reasoning_open};
  return spec;
}

}  // namespace caravan::server
