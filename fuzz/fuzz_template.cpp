// Arbitrary bytes as a chat template: the lexer, the parser, and a rendering of whatever parses, within small limits.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "chat/syntax.h"
#include "chat/template.h"

namespace caravan {
namespace {

const chat::RenderInput& conversation() {
  static const chat::RenderInput input = [] {
    chat::RenderInput made;
    made.messages = chat::Json::parse(R"([
      {"role": "system", "content": "Be terse."}, {"role": "user", "content": "naïve? 漢字"},
      {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "a", "function": {"name": "f", "arguments": {"x": [1, 2.5, null]}}}]},
      {"role": "tool", "tool_call_id": "a", "content": "18 C"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}])");
    made.tools =
        chat::Json::parse(R"([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])");
    made.bos_token = "<s>";
    made.eos_token = "</s>";
    return made;
  }();
  return input;
}

void fuzz(std::string source) {
  chat::RenderLimits limits;
  limits.max_steps = 20'000;
  limits.max_bytes = 4 << 20;
  limits.max_output_bytes = 1 << 20;
  chat::detect_syntax(source);
  try {
    const chat::Template parsed(std::move(source));
    const std::string text = parsed.render(conversation(), limits);
    if (text.size() > limits.max_output_bytes) {
      fprintf(stderr, "the output is bounded\n");
      abort();
    }
  } catch (const chat::TemplateError&) {
  }
}

}  // namespace
}  // namespace caravan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 1 << 16) return 0;
  caravan::fuzz(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
