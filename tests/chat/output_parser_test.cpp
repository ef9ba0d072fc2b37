// Answers of every family of models, whole and cut at every place.
#include "chat/output_parser.h"

#include <gtest/gtest.h>

#include "chat/named_templates.h"
#include "chat/template.h"

namespace caravan::chat {
namespace {

const Json& weather_tools() {
  static const Json tools = Json::parse(R"([
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
      "city": {"type": "string"}, "days": {"type": "integer"}, "at": {"type": "object"}}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}])");
  return tools;
}

ParsedMessage parse(const OutputSyntax& syntax, ParseOptions options, const std::vector<std::string_view>& pieces) {
  OutputParser parser(syntax, options, weather_tools());
  ParsedMessage message;
  for (const std::string_view piece : pieces)
    for (const Delta& delta : parser.push(piece)) message.add(delta);
  for (const Delta& delta : parser.finish()) message.add(delta);
  return message;
}

std::string describe(const ParsedMessage& message) {
  std::string text = "content: '" + message.content + "' reasoning: '" + message.reasoning + "'";
  for (const ToolCall& call : message.calls) text += "\n  " + call.name + " [" + call.id + "] " + call.arguments;
  return text;
}

// The parse of the whole text, after checking that every way to cut it in two, and byte by byte, gives the same.
ParsedMessage parse_everywhere(const OutputSyntax& syntax, ParseOptions options, std::string_view text) {
  const ParsedMessage whole = parse(syntax, options, {text});
  std::vector<std::string_view> bytes;
  for (size_t i = 0; i < text.size(); ++i) {
    bytes.push_back(text.substr(i, 1));
    const ParsedMessage cut = parse(syntax, options, {text.substr(0, i), text.substr(i)});
    EXPECT_EQ(cut, whole) << "cut at " << i << " of " << text << "\n" << describe(cut) << "\n" << describe(whole);
  }
  const ParsedMessage slowly = parse(syntax, options, bytes);
  EXPECT_EQ(slowly, whole) << text << "\n" << describe(slowly) << "\n" << describe(whole);
  return whole;
}

struct Example {
  std::string_view template_part, text;
  ParsedMessage expected;
};

constexpr ParseOptions kTools{.tools = true, .reasoning = true, .reasoning_open = false};
const ToolCall kParis{"", "get_weather", R"({"city": "Paris"})"};

TEST(OutputParser, ReadsTheCallsOfEveryFamily) {
  const Example examples[] = {
      {"<tool_call>",
       "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": "
       "\"Paris\"}}\n</tool_call>",
       {"I look.", "Hm.", {kParis}}},
      {"<tool_call>",
       "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\n<tool_call>\n{\"arguments\": {\"city\": "
       "\"Paris\"}, \"name\": \"get_weather\"}</tool_call>\n",
       {"", "", {{"", "now", "{}"}, kParis}}},
      {"<tool_call>",
       "<tool_call>{\"name\": \"get_weather\", \"arguments\": \"{\\\"city\\\": \\\"Paris\\\"}\"}",
       {"", "", {kParis}}},
      {"<|python_tag|>", "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}", {"", "", {kParis}}},
      {"<|python_tag|>",
       "<|python_tag|>{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"parameters\": {\"city\": "
       "\"Paris\"}}}",
       {"", "", {kParis}}},
      {"[TOOL_CALLS]",
       "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"a12345678\"}]",
       {"", "", {kParis}}},
      {"[TOOL_CALLS] [ARGS]",
       "Sure.[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]now[ARGS]{}",
       {"Sure.", "", {{"x1", "get_weather", kParis.arguments}, {"", "now", "{}"}}}},
      {"<｜tool▁calls▁begin｜> ```json",
       "a</think>b<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": "
       "\"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<"
       "｜tool▁call▁end｜><｜tool▁calls▁end｜>",
       {"a</think>b", "", {kParis, {"", "now", "{}"}}}},
      {"<｜tool▁calls▁begin｜>",
       "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": "
       "\"Paris\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
       {"", "", {kParis}}},
      {"｜DSML｜",
       "Ok\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" "
       "string=\"true\">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" "
       "string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
       {"Ok", "", {{"", "get_weather", R"({"city": "Paris", "days": 3})"}}}},
      {"<|START_ACTION|> <|START_THINKING|>",
       "<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": "
       "\"get_weather\", \"parameters\": {\"city\": \"Paris\"}}\n]<|END_ACTION|>",
       {"", "Hm.", {{"0", "get_weather", kParis.arguments}}}},
      {"<|START_ACTION|> <|START_THINKING|>",
       "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Hello<|END_RESPONSE|>",
       {"Hello", "Hm.", {}}},
      {"<|channel|> <|message|>",
       "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
       "<|constrain|>json<|message|>{\"city\": \"Paris\"}<|call|>",
       {"", "Hm.", {kParis}}},
      {"<|channel|> <|message|>",
       " to=functions.get_weather<|channel|>commentary json<|message|>{\"city\": \"Paris\"}",
       {"", "", {kParis}}},
      {"<|channel|> <|message|>",
       "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello",
       {"Hello", "Hm.", {}}},
      {"<|tool_calls_section_begin|>",
       "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": "
       "\"Paris\"}<|tool_call_end|><|tool_calls_section_end|>",
       {"", "", {{"functions.get_weather:0", "get_weather", kParis.arguments}}}},
      {"<minimax:tool_call>",
       "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter "
       "name=\"city\">Paris</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
       {"", "", {kParis, {"", "now", "{}"}}}},
      {"<seed:tool_call> <seed:think>",
       "<seed:think>Hm.</seed:think><seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</"
       "function>\n</seed:tool_call>",
       {"", "Hm.", {kParis}}},
      {"<arg_key> <tool_call>",
       "<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>at</"
       "arg_key><arg_value>{\"h\": [1]}</arg_value></tool_call>\n<tool_call>now</tool_call>",
       {"", "", {{"", "get_weather", R"({"city": "Paris", "at": {"h": [1]}})"}, {"", "now", "{}"}}}},
      {"<function= <tool_call>",
       "Let "
       "me.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n12\n</"
       "parameter>\n</function>\n</tool_call>",
       {"Let me.", "", {{"", "get_weather", R"({"city": "12", "days": 12})"}}}},
      {"<function=",
       "<function=get_weather>{\"city\": \"Paris\"}</function><function=now>{}</function>",
       {"", "", {kParis, {"", "now", "{}"}}}},
      {"<|tools_prefix|> <|inner_prefix|>",
       "<|inner_prefix|>Hm.<|inner_suffix|><|tools_prefix|>[{\"get_weather\": {\"city\": \"Paris\"}}, {\"now\": "
       "{}}]<|tools_suffix|>",
       {"", "Hm.", {kParis, {"", "now", "{}"}}}},
      {"<TOOLCALL>",
       "<TOOLCALL>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]</TOOLCALL>",
       {"", "", {kParis}}},
      {"<|tool_call_start|>",
       "<|tool_call_start|>[get_weather(city=\"Paris\"), now()]<|tool_call_end|>Wait.",
       {"Wait.", "", {{"", "get_weather", R"({"city":"Paris"})"}, {"", "now", "{}"}}}},
      {"<tool_calls>",
       "<tool_calls>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"7\"}]</tool_calls>",
       {"", "", {kParis}}},
      {"<function name=",
       "<function name=\"get_weather\"><param name=\"city\">Paris</param></function>",
       {"", "", {kParis}}},
      {"<function name=",
       "<function name=\"get_weather\"><param name=\"city\"><![CDATA[\nA </param> <b>]]></param></function>",
       {"", "", {{"", "get_weather", R"({"city": "\nA </param> <b>"})"}}}},
      {"<|tool_call|>",
       "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]",
       {"", "", {kParis}}},
      {"functools[",
       " functools[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]",
       {"", "", {kParis}}},
      {"Action: ```json",
       "Action: ```json\n[\n    {\n        \"tool_name\": \"get_weather\",\n        \"parameters\": {\"city\": "
       "\"Paris\"}\n    }\n]```",
       {"", "", {kParis}}},
      {"none of these", "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}", {"", "", {kParis}}},
  };
  for (const Example& example : examples) {
    SCOPED_TRACE(example.text);
    const ParsedMessage found = parse_everywhere(detect_syntax(example.template_part), kTools, example.text);
    EXPECT_EQ(found, example.expected) << describe(found) << "\nexpected " << describe(example.expected);
  }
}

TEST(OutputParser, TellsStringsWithoutQuotesFromJsonByTheSchema) {
  const Json tools = Json::parse(R"([{"function": {"name": "f", "parameters": {"properties": {
      "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "unit": {"$ref": "#/$defs/unit"},
      "either": {"type": ["integer", "string"]}, "any": {}}, "$defs": {"unit": {"enum": ["1", "2"]}}}}}])");
  const auto read = [&](const std::string& name, const std::string& value) {
    OutputParser parser(detect_syntax("<function= <tool_call>"), kTools, tools);
    ParsedMessage message;
    const std::string text =
        "<tool_call><function=f><parameter=" + name + ">" + value + "</parameter></function></tool_call>";
    for (const Delta& delta : parser.push(text)) message.add(delta);
    for (const Delta& delta : parser.finish()) message.add(delta);
    return message.calls.empty() ? Json() : Json::parse(message.calls[0].arguments).value(name, Json());
  };
  EXPECT_EQ(read("maybe", "null"), Json(nullptr));
  EXPECT_EQ(read("maybe", "12"), "12") << "no number is accepted there";
  EXPECT_EQ(read("unit", "1"), "1");
  EXPECT_EQ(read("either", "12"), 12);
  EXPECT_EQ(read("either", "1.5"), "1.5");
  EXPECT_EQ(read("either", "[1]"), "[1]");
  EXPECT_EQ(read("any", "[1]"), Json::parse("[1]"));
  EXPECT_EQ(read("unknown", "true"), true);
}

TEST(OutputParser, ReadsTheEscapesOfPythonStrings) {
  OutputParser parser(detect_syntax("<|tool_call_start|>"), kTools, weather_tools());
  ParsedMessage message;
  const char* text =
      R"(<|tool_call_start|>[get_weather(city="\u00e9\ud83d\ude00\b\f\/\\'\u00", days='\'"\n')]<|tool_call_end|>)";
  for (const Delta& delta : parser.push(text)) message.add(delta);
  for (const Delta& delta : parser.finish()) message.add(delta);
  ASSERT_EQ(message.calls.size(), 1u);
  const Json arguments = Json::parse(message.calls[0].arguments);
  EXPECT_EQ(arguments["city"], "\xC3\xA9\xF0\x9F\x98\x80\b\f/\\'u00");
  EXPECT_EQ(arguments["days"], "'\"\n");
}

TEST(OutputParser, TakesWhatIsNoCallForContent) {
  const Example examples[] = {
      {"<|python_tag|>", "{\"answer\": 42}", {"{\"answer\": 42}", "", {}}},
      {"<|python_tag|>",
       "{\"name\": \"Ada\", \"age\": 36} is JSON",
       {"{\"name\": \"Ada\", \"age\": 36} is JSON", "", {}}},
      {"<|python_tag|>",
       "{\"name\": \"other\", \"parameters\": {}}",
       {"{\"name\": \"other\", \"parameters\": {}}", "", {}}},
      {"<tool_call>", "Write <tool_call> then stop", {"Write <tool_call> then stop", "", {}}},
      {"<tool_call>", "<tool_call>[1, 2]</tool_call>", {"<tool_call>[1, 2]</tool_call>", "", {}}},
      {"<tool_call>", "a <tool", {"a <tool", "", {}}},
      {"<tool_call>", "a < b  \n", {"a < b  \n", "", {}}},
      {"<tool_call>", "x <think> y </think>", {"x <think> y </think>", "", {}}},
      {"<|tool_call_start|>",
       "<|tool_call_start|>1 + 1<|tool_call_end|>",
       {"<|tool_call_start|>1 + 1<|tool_call_end|>", "", {}}},
      {"<|channel|> <|message|>", "Just text.", {"Just text.", "", {}}},
      {"<|channel|> <|message|>", "Hi <|message|> you", {"Hi <|message|> you", "", {}}},
  };
  for (const Example& example : examples) {
    SCOPED_TRACE(example.text);
    const ParsedMessage found = parse_everywhere(detect_syntax(example.template_part), kTools, example.text);
    EXPECT_EQ(found, example.expected) << describe(found);
  }
}

TEST(OutputParser, FollowsItsOptions) {
  const OutputSyntax hermes = detect_syntax("<tool_call>");
  const std::string_view text = "<think>a</think>b<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
  EXPECT_EQ(parse_everywhere(hermes, {.tools = false, .reasoning = false}, text).content, text);
  EXPECT_EQ(parse_everywhere(hermes, {.tools = false, .reasoning = true}, text),
            (ParsedMessage{"b<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>", "a", {}}));
  const ParseOptions open{.tools = true, .reasoning = true, .reasoning_open = true};
  EXPECT_EQ(parse_everywhere(hermes, open, "a\n</think>\n\nb"), (ParsedMessage{"b", "a", {}}));
  EXPECT_EQ(parse_everywhere(hermes, open, "<think>a</think>b"), (ParsedMessage{"b", "a", {}}));
  EXPECT_EQ(parse_everywhere(hermes, open, "a never ends "), (ParsedMessage{"", "a never ends", {}}));
}

TEST(OutputParser, StreamsArgumentsAsTheyCome) {
  OutputParser parser(detect_syntax("<tool_call>"), kTools, weather_tools());
  EXPECT_TRUE(parser.push("<tool_call>{\"name\": \"get_weather\", \"argu").empty());
  std::vector<Delta> deltas = parser.push("ments\": {\"ci");
  ASSERT_EQ(deltas.size(), 2u);
  EXPECT_EQ(deltas[0], (Delta{Delta::Kind::call, "get_weather", "", 0}));
  EXPECT_EQ(deltas[1], (Delta{Delta::Kind::arguments, "{\"ci", "", 0}));
  deltas = parser.push("ty\": \"Par");
  ASSERT_EQ(deltas.size(), 1u);
  EXPECT_EQ(deltas[0].text, "ty\": \"Par");
}

TEST(OutputParser, KeepsUpWithLongAnswers) {  // linear: a quadratic parser takes minutes
  OutputParser parser(detect_syntax("<function= <tool_call>"), kTools, weather_tools());
  ParsedMessage message;
  const auto push = [&](std::string_view text) {
    for (const Delta& delta : parser.push(text)) message.add(delta);
  };
  for (int i = 0; i < 100'000; ++i) push("word < ");
  push("<tool_call><function=get_weather><parameter=city>");
  for (int i = 0; i < 100'000; ++i) push("word < ");
  push("</parameter></function></tool_call>");
  EXPECT_GT(message.content.size(), 600'000u);
  ASSERT_EQ(message.calls.size(), 1u);
  EXPECT_GT(message.calls[0].arguments.size(), 600'000u);
}

TEST(NamedTemplates, AllRenderAConversation) {
  for (const std::string& name : template_names()) {
    SCOPED_TRACE(name);
    RenderInput input;
    input.messages = Json::parse(R"([{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"},
                                     {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}])");
    input.bos_token = "<s>";
    input.eos_token = "</s>";
    const std::string text = Template(*named_template(name)).render(input);
    size_t at = 0;
    for (const char* part : {"Be terse.", "Hi", "Hello", "Bye"}) {
      at = text.find(part, at);
      ASSERT_NE(at, std::string::npos) << part << " in " << text;
    }
  }
  RenderInput hi;
  hi.messages = Json::parse(R"([{"role": "user", "content": "Hi"}])");
  EXPECT_EQ(Template(*named_template("chatml")).render(hi), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_FALSE(named_template("no such name"));
}

}  // namespace
}  // namespace caravan::chat
