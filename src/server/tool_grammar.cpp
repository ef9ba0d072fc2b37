#include "server/tool_grammar.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/json_schema.h"

namespace caravan::server {
namespace {

using engine::grammar_literal;
using Form = chat::CallSyntax::Form;

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

class CallGrammar {
 public:
  CallGrammar(const chat::OutputSyntax& syntax, const Json& tools) : syntax_(syntax), tools_(tools) {}

  std::string text(bool several, bool reasoning_open) {
    std::string body = syntax_.channels ? channel_call() : calls(several);
    if (reasoning_open && !syntax_.reasoning_end.empty()) body = thought() + " space " + body;
    grammar_.add_rule("root", body);
    return grammar_.text();
  }

 private:
  // The rest of a thought: no '<' but before its end mark, whose first character it is.
  std::string thought() {
    const std::string first = syntax_.reasoning_end.substr(0, 1), rest = syntax_.reasoning_end.substr(1);
    const std::string open = first == "[" ? "\\[" : first, next = rest.substr(0, 1) == "[" ? "\\[" : rest.substr(0, 1);
    grammar_.add_rule("thought", fmt::format("([^{}] | {} [^{}])*", open, grammar_literal(first), next));
    return "thought " + grammar_literal(syntax_.reasoning_end);
  }

  // A choice of one rule per tool.
  template <typename F>
  std::string one_of_the_tools(F&& body_of) {
    std::string choice;
    for (size_t i = 0; i < tools_.size(); ++i) {
      const Json& function = tools_[i].at("function");
      const Json* given = find_field(function, "parameters");
      const Json schema = given != nullptr && given->is_object() && !given->empty() ? *given : Json{{"type", "object"}};
      const std::string arguments = grammar_.add_schema(fmt::format("arguments-{}", i), schema);
      choice += (i > 0 ? " | " : "") + grammar_.add_rule(fmt::format("call-{}", i),
                                                         body_of(function.at("name").get<std::string>(), arguments));
    }
    return grammar_.add_rule("call", choice);
  }

  std::string calls(bool several) {
    const chat::CallSyntax& calls = main_syntax(syntax_);
    if (calls.form == Form::json) return json_calls(calls, several);
    if (calls.form == Form::named) return named_calls(calls, several);
    throw RequestError(
        fmt::format("Field 'tool_choice': a call cannot be forced for models of the family '{}'; auto and "
                    "none are supported",
                    syntax_.name),
        RequestError::Kind::not_supported);
  }

  std::string json_calls(const chat::CallSyntax& calls, bool several) {
    const bool is_command_r = syntax_.name.starts_with("command-r");
    const char* name_key = is_command_r ? "tool_name" : "name";
    const char* arguments_key = is_command_r || syntax_.name == "llama3" ? "parameters" : "arguments";
    const std::string call = one_of_the_tools([&](const std::string& name, const std::string& arguments) {
      const std::string quoted = Json(name).dump();
      if (calls.name_is_key) return grammar_literal("{" + quoted + ": ") + " " + arguments + " \"}\"";
      return grammar_literal(fmt::format("{{\"{}\": {}, \"{}\": ", name_key, quoted, arguments_key)) + " " + arguments +
             " \"}\"";
    });
    const std::string begin = calls.bare ? "" : grammar_literal(calls.begin) + " ";
    const std::string end = calls.end.empty() ? "" : " " + grammar_literal(calls.end);
    if (writes_arrays(syntax_.name))
      return begin + "\"[\" " + call + (several ? " (\", \" " + call + ")*" : "") + " \"]\"" + end;
    const bool has_lines = !calls.bare && !calls.end.empty();
    const std::string line = has_lines ? " \"\\n\" " : " ";
    const std::string one = begin + line + call + line + end;
    return several && !calls.bare ? "(" + one + ")+" : one;
  }

  std::string named_calls(const chat::CallSyntax& calls, bool several) {
    const bool is_kimi = syntax_.name == "kimi-k2";
    const std::string call = one_of_the_tools([&](const std::string& name, const std::string& arguments) {
      const std::string written = is_kimi ? "functions." + name + ":0" : name;
      const bool fenced = calls.name_end.ends_with("json");
      std::string body =
          grammar_literal(calls.call_begin + written + calls.name_end + (fenced ? "\n" : "")) + " " + arguments;
      if (!calls.call_end.empty()) body += " " + grammar_literal((fenced ? "\n" : "") + calls.call_end);
      return body;
    });
    const bool repeats_mark = calls.end.empty();  // each call has the mark before it
    const std::string begin = grammar_literal(calls.begin), end = repeats_mark ? "" : " " + grammar_literal(calls.end);
    if (repeats_mark) return several ? "(" + begin + " " + call + ")+" : begin + " " + call;
    return begin + " " + call + (several ? "+" : "") + end;
  }

  std::string channel_call() {
    grammar_.add_rule("thought", "([^<] | \"<\" [^|])*");
    const std::string call = one_of_the_tools([&](const std::string& name, const std::string& arguments) {
      return grammar_literal("<|channel|>commentary to=functions." + name + " <|constrain|>json<|message|>") + " " +
             arguments;
    });
    return "(\"<|channel|>analysis<|message|>\" thought \"<|end|><|start|>assistant\")? " + call;
  }

  const chat::OutputSyntax& syntax_;
  const Json& tools_;
  engine::SchemaGrammar grammar_;
};

}  // namespace

std::string tool_call_grammar(const chat::OutputSyntax& syntax, const chat::ParseOptions& options, const Json& tools,
                              bool several) {
  return CallGrammar(syntax, tools).text(several, options.reasoning_open);
}

}  // namespace caravan::server
