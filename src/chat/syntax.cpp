#include "chat/syntax.h"

#include <utility>

namespace caravan::chat {
namespace {

using Form = CallSyntax::Form;

CallSyntax json_calls(std::string begin, std::string end) {
  CallSyntax calls;
  calls.begin = std::move(begin);
  calls.end = std::move(end);
  return calls;
}

CallSyntax bare_json() {
  CallSyntax calls;
  calls.begin = "{";
  calls.bare = true;
  return calls;
}

CallSyntax named_calls(std::string begin, std::string call_begin, std::string name_end, std::string call_end,
                       std::string end) {
  CallSyntax calls = json_calls(std::move(begin), std::move(end));
  calls.form = Form::named;
  calls.call_begin = std::move(call_begin);
  calls.name_end = std::move(name_end);
  calls.call_end = std::move(call_end);
  return calls;
}

struct ParameterMarks {
  std::string begin, key_end, value_begin, end;
};

CallSyntax parameter_calls(CallSyntax calls, ParameterMarks marks) {
  calls.form = Form::parameters;
  calls.parameter_begin = std::move(marks.begin);
  calls.key_end = std::move(marks.key_end);
  calls.value_begin = std::move(marks.value_begin);
  calls.parameter_end = std::move(marks.end);
  return calls;
}

// <function=NAME><parameter=KEY>VALUE</parameter></function>
CallSyntax function_tags(std::string begin, std::string end) {
  return parameter_calls(named_calls(std::move(begin), "<function=", ">", "</function>", std::move(end)),
                         {"<parameter=", ">", "", "</parameter>"});
}

// <invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>, with something before each tag's name
CallSyntax invoke_tags(std::string begin, std::string end, const std::string& tag) {
  return parameter_calls(
      named_calls(std::move(begin), "<" + tag + "invoke name=\"", "\">", "</" + tag + "invoke>", std::move(end)),
      {"<" + tag + "parameter name=\"", ">", "", "</" + tag + "parameter>"});
}

OutputSyntax syntax_of(std::string name, CallSyntax calls) {
  OutputSyntax syntax;
  syntax.name = std::move(name);
  syntax.calls.push_back(std::move(calls));
  return syntax;
}

CallSyntax python_calls(std::string begin, std::string end) {
  CallSyntax calls = json_calls(std::move(begin), std::move(end));
  calls.form = Form::python;
  return calls;
}

OutputSyntax mistral(bool with_names) {
  if (!with_names) return syntax_of("mistral", json_calls("[TOOL_CALLS]", ""));
  CallSyntax calls = named_calls("[TOOL_CALLS]", "", "[ARGS]", "", "");
  calls.id_begin = "[CALL_ID]";
  return syntax_of("mistral-args", calls);
}

OutputSyntax command_r7b() {
  OutputSyntax syntax = syntax_of("command-r7b", json_calls("<|START_ACTION|>", "<|END_ACTION|>"));
  syntax.dropped = {"<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"};
  return syntax;
}

OutputSyntax minicpm5() {
  CallSyntax calls = parameter_calls(named_calls("<function name=\"", "", "\">", "</function>", ""),
                                     {"<param name=\"", "\">", "", "</param>"});
  calls.cdata = true;
  return syntax_of("minicpm5", calls);
}

OutputSyntax llama3() {
  OutputSyntax syntax = syntax_of("llama3", json_calls("<|python_tag|>", ""));
  syntax.calls.push_back(bare_json());
  return syntax;
}

OutputSyntax generic() {
  OutputSyntax syntax = syntax_of("generic", json_calls("<tool_call>", "</tool_call>"));
  syntax.calls.push_back(bare_json());
  return syntax;
}

// The syntax of tool calls, by what the template writes itself.
OutputSyntax detect_calls(std::string_view source) {
  const auto has = [&](std::string_view text) { return source.find(text) != std::string_view::npos; };
  if (has("<|channel|>") && has("<|message|>")) {
    OutputSyntax syntax;
    syntax.name = "gpt-oss";
    syntax.channels = true;
    return syntax;
  }
  if (has("｜DSML｜")) {
    OutputSyntax syntax =
        syntax_of("dsml", invoke_tags("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "｜DSML｜"));
    syntax.calls.push_back(invoke_tags("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "｜DSML｜"));
    return syntax;
  }
  if (has("<｜tool▁calls▁begin｜>")) {
    if (has("```json"))
      return syntax_of("deepseek-r1",
                       named_calls("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json",
                                   "```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"));
    return syntax_of("deepseek-v3.1", named_calls("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
                                                  "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"));
  }
  if (has("<|tool_calls_section_begin|>"))
    return syntax_of("kimi-k2",
                     named_calls("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
                                 "<|tool_call_end|>", "<|tool_calls_section_end|>"));
  if (has("<minimax:tool_call>"))
    return syntax_of("minimax-m2", invoke_tags("<minimax:tool_call>", "</minimax:tool_call>", ""));
  if (has("<seed:tool_call>")) return syntax_of("seed-oss", function_tags("<seed:tool_call>", "</seed:tool_call>"));
  if (has("<arg_key>"))
    return syntax_of("glm", parameter_calls(named_calls("<tool_call>", "", "\n", "", "</tool_call>"),
                                            {"<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}));
  if (has("<|START_ACTION|>")) return command_r7b();
  if (has("<|tools_prefix|>")) {
    CallSyntax calls = json_calls("<|tools_prefix|>", "<|tools_suffix|>");
    calls.name_is_key = true;
    return syntax_of("apertus", calls);
  }
  if (has("<TOOLCALL>")) return syntax_of("nemotron-v2", json_calls("<TOOLCALL>", "</TOOLCALL>"));
  if (has("[TOOL_CALLS]")) return mistral(has("[ARGS]"));
  if (has("<|tool_call_start|>") || has("<|tool_list_start|>"))
    return syntax_of("lfm2", python_calls("<|tool_call_start|>", "<|tool_call_end|>"));
  if (has("<function=") && has("<tool_call>"))
    return syntax_of("qwen3-coder", function_tags("<tool_call>", "</tool_call>"));
  if (has("<function=")) return syntax_of("functionary-v3.1", named_calls("<function=", "", ">", "</function>", ""));
  if (has("<function name=")) return minicpm5();
  if (has("<tool_calls>")) return syntax_of("apriel", json_calls("<tool_calls>", "</tool_calls>"));
  if (has("<tool_call>")) return syntax_of("hermes", json_calls("<tool_call>", "</tool_call>"));
  if (has("<|tool_call|>")) {
    OutputSyntax syntax = syntax_of("granite", json_calls("<|tool_call|>", "<|/tool_call|>"));
    syntax.dropped = {"<response>", "</response>"};
    return syntax;
  }
  if (has("functools[")) return syntax_of("firefunction-v2", json_calls("functools", ""));
  if (has("<|function_call|>")) return syntax_of("gigachat", json_calls("<|function_call|>", ""));
  if (has("<|python_tag|>") || (has("<|start_header_id|>") && has("ipython"))) return llama3();
  if (has("Action: ```json") || has("Action:```json")) return syntax_of("command-r", json_calls("Action:", ""));
  return generic();
}

}  // namespace

OutputSyntax detect_syntax(std::string_view template_source) {
  OutputSyntax syntax = detect_calls(template_source);
  if (syntax.channels) return syntax;
  static constexpr std::pair<std::string_view, std::string_view> kReasoning[] = {
      {"<|START_THINKING|>", "<|END_THINKING|>"},
      {"<seed:think>", "</seed:think>"},
      {"<|inner_prefix|>", "<|inner_suffix|>"},
      {"[THINK]", "[/THINK]"},
      {"Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"},
      {"<think>", "</think>"}};
  syntax.reasoning_begin = "<think>";
  syntax.reasoning_end = "</think>";
  for (const auto& [begin, end] : kReasoning)
    if (template_source.find(begin) != std::string_view::npos) {
      syntax.reasoning_begin = begin;
      syntax.reasoning_end = end;
      break;
    }
  if (syntax.reasoning_end == "[BEGIN FINAL RESPONSE]") syntax.dropped.emplace_back("[END FINAL RESPONSE]");
  return syntax;
}

std::vector<std::string> marks_of(const OutputSyntax& syntax) {
  std::vector<std::string> marks = syntax.dropped;
  const auto add = [&](const std::string& mark) {
    if (!mark.empty()) marks.push_back(mark);
  };
  add(syntax.reasoning_begin);
  add(syntax.reasoning_end);
  for (const CallSyntax& c : syntax.calls)
    for (const std::string* mark : {&c.begin, &c.end, &c.call_begin, &c.name_end, &c.call_end, &c.id_begin,
                                    &c.parameter_begin, &c.key_end, &c.value_begin, &c.parameter_end})
      add(*mark);
  if (syntax.channels)
    for (const char* mark :
         {"<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"})
      add(mark);
  return marks;
}

}  // namespace caravan::chat
