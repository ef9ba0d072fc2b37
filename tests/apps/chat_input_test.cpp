#include "chat_input.h"

#include <gtest/gtest.h>

#include <deque>
#include <vector>

namespace caravan::app {
namespace {

bool operator==(const Input& a, const Input& b) { return a.state == b.state && a.text == b.text; }

// Gives these lines, then the end, and notes the prompts.
class Script {
 public:
  explicit Script(std::deque<std::string> lines) : lines_(std::move(lines)) {}
  ReadLine reader() {
    return [this](std::string_view prompt) {
      prompts_ += prompt;
      if (lines_.empty()) return Input{Input::State::end, ""};
      std::string line = lines_.front();
      lines_.pop_front();
      if (line == "^C") return Input{Input::State::interrupted, ""};
      return Input{Input::State::text, std::move(line)};
    };
  }
  const std::string& prompts() const { return prompts_; }

 private:
  std::deque<std::string> lines_;
  std::string prompts_;
};

std::vector<std::string> messages(std::deque<std::string> lines, MessageEnd end = MessageEnd::by_line) {
  Script script(std::move(lines));
  std::vector<std::string> out;
  for (;;) {
    const Input input = read_message(script.reader(), end);
    if (input.state == Input::State::end) return out;
    out.push_back(input.state == Input::State::interrupted ? "^C" : input.text);
  }
}

using Texts = std::vector<std::string>;

TEST(ChatInput, TakesALineForAMessage) {
  EXPECT_EQ(messages({"one", "", "two words"}), (Texts{"one", "", "two words"}));
}

TEST(ChatInput, GoesOnBehindABackslash) {
  EXPECT_EQ(messages({"one\\", "two\\", "three", "four"}), (Texts{"one\ntwo\nthree", "four"}));
  EXPECT_EQ(messages({"one\\"}), (Texts{"one"}));
  EXPECT_EQ(messages({"one\\", "^C", "two"}), (Texts{"^C", "two"}));
}

TEST(ChatInput, TakesEverythingBetweenThreeQuotes) {
  EXPECT_EQ(messages({"\"\"\"", "a\\", "", "/exit", "\"\"\"", "b"}), (Texts{"a\\\n\n/exit", "b"}));
  EXPECT_EQ(messages({"\"\"\"a", "b\"\"\""}), (Texts{"a\nb"}));
  EXPECT_EQ(messages({"\"\"\"a\"\"\""}), (Texts{"a"}));
  EXPECT_EQ(messages({"\"\"\"a", "b"}), (Texts{"a\nb"}));
  EXPECT_EQ(messages({"\"\"\"a", "^C", "b"}), (Texts{"^C", "b"}));
}

TEST(ChatInput, CollectsLinesUpToABackslashWhereToldTo) {
  EXPECT_EQ(messages({"one", "two\\", "three\\"}, MessageEnd::until_backslash), (Texts{"one\ntwo", "three"}));
  EXPECT_EQ(messages({"/clear", "one", "two"}, MessageEnd::until_backslash), (Texts{"/clear", "one\ntwo"}));
}

TEST(ChatInput, ShowsThatAMessageGoesOn) {
  Script script({"one\\", "two"});
  EXPECT_TRUE(read_message(script.reader(), MessageEnd::by_line) == (Input{Input::State::text, "one\ntwo"}));
  EXPECT_EQ(script.prompts(), "> . ");
}

TEST(ChatInput, TellsCommandsFromMessages) {
  EXPECT_EQ(parse_command("/exit").name, "exit");
  EXPECT_EQ(parse_command("/save  a file ").name, "save");
  EXPECT_EQ(parse_command("/save  a file ").argument, "a file");
  for (const char* text : {"", "/", "exit", " /exit", "/ exit", "// a comment", "/1"})
    EXPECT_EQ(parse_command(text).name, "") << text;
}

}  // namespace
}  // namespace caravan::app
