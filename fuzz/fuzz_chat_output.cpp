// Arbitrary text as the answer of a model: every syntax, whole and in two pieces, which must give the same.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

#include "chat/output_parser.h"

namespace caravan {
namespace {

// Marks by which each syntax is told.
constexpr const char* kTemplates[] = {"<tool_call>",
                                      "<|python_tag|>",
                                      "[TOOL_CALLS]",
                                      "[TOOL_CALLS][ARGS]",
                                      "<|channel|><|message|>",
                                      "<arg_key>",
                                      "<function=<tool_call>",
                                      "<|START_ACTION|><|START_THINKING|>",
                                      "｜DSML｜",
                                      "<|tools_prefix|>",
                                      "<｜tool▁calls▁begin｜>```json",
                                      "<|tool_calls_section_begin|>",
                                      "<minimax:tool_call>",
                                      "<|tool_call_start|>",
                                      "none"};

chat::ParsedMessage parse(const chat::OutputSyntax& syntax, chat::ParseOptions options, std::string_view a,
                          std::string_view b) {
  chat::OutputParser parser(syntax, options);
  chat::ParsedMessage message;
  for (const std::string_view piece : {a, b})
    for (const chat::Delta& delta : parser.push(piece)) message.add(delta);
  for (const chat::Delta& delta : parser.finish()) message.add(delta);
  return message;
}

}  // namespace
}  // namespace caravan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  if (size < 3 || size > 1 << 14) return 0;
  const chat::OutputSyntax syntax = chat::detect_syntax(kTemplates[data[0] % std::size(kTemplates)]);
  const chat::ParseOptions options{(data[1] & 1) != 0, (data[1] & 2) != 0, (data[1] & 4) != 0};
  const std::string_view text(reinterpret_cast<const char*>(data) + 3, size - 3);
  const size_t cut = text.empty() ? 0 : data[2] * text.size() / 256;
  if (parse(syntax, options, text, "") != parse(syntax, options, text.substr(0, cut), text.substr(cut))) {
    fprintf(stderr, "the parse depends on where the text was cut\n");
    abort();
  }
  return 0;
}
