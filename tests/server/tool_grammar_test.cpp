// Grammars of tool calls: the marks of each family.
#include "server/tool_grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace caravan::server {
namespace {

using ::testing::HasSubstr;

const Json kTools = Json::parse(R"([{"type": "function", "function": {"name": "f", "parameters":
  {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}}}, {"function": {"name": "g"}}])");

std::string grammar_of(const char* template_source, bool several = false, bool reasoning_open = false) {
  chat::ParseOptions options;
  options.tools = true;
  options.reasoning_open = reasoning_open;
  return tool_call_grammar(chat::detect_syntax(template_source), options, kTools, several);
}

TEST(ToolGrammar, HasTheMarksOfEachFamily) {
  EXPECT_THAT(grammar_of("<tool_call>"), HasSubstr("<tool_call>"));
  EXPECT_THAT(grammar_of("[TOOL_CALLS][ARGS]"), HasSubstr("f[ARGS]"));
  EXPECT_THAT(grammar_of("<|tool_calls_section_begin|>"), HasSubstr("functions.f:0"));
  EXPECT_THAT(grammar_of("<|START_ACTION|>"), HasSubstr("tool_name"));
  EXPECT_THAT(grammar_of("<|channel|><|message|>"), HasSubstr("to=functions.f"));
  EXPECT_THAT(grammar_of("<|python_tag|>"), HasSubstr("parameters"));
  EXPECT_THAT(grammar_of("<tool_call>", false, true), HasSubstr("</think>"));
  EXPECT_THROW(grammar_of("<function=<tool_call>"), RequestError);
}

}  // namespace
}  // namespace caravan::server
