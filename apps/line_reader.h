// Reads the lines that a user types: with editing and a history on a terminal (libedit), as they are otherwise.
#pragma once

#include <memory>
#include <string_view>

#include "chat_input.h"

namespace caravan::app {

// One object per program, used by one thread. While it edits, Ctrl-C is seen through interrupts.h.
class LineReader {
 public:
  // shows_prompt: whether prompts are written where lines are not edited.
  enum class ShowsPrompt { no, yes };
  explicit LineReader(ShowsPrompt shows_prompt);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // True on a terminal.
  bool edits() const { return editor_ != nullptr; }
  // The next line of standard input. prompt must be ASCII.
  Input read_line(std::string_view prompt);

 private:
  class Editor;
  std::unique_ptr<Editor> editor_;  // null: plain lines
  ShowsPrompt shows_prompt_;
};

}  // namespace caravan::app
