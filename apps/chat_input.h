// What a user types into a conversation: lines, put together to messages, and the commands among them.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace caravan::app {

// One line of input, or a whole message.
struct Input {
  enum class State { text, end, interrupted };
  State state = State::text;
  std::string text;  // without the end of the line
};

// Reads one line after showing prompt.
using ReadLine = std::function<Input(std::string_view prompt)>;

// by_line: a line is a message; one that ends in a backslash goes on in the next.
// until_backslash: lines are collected up to one that ends in a backslash.
enum class MessageEnd { by_line, until_backslash };

// The next message. """ at the beginning of a line opens a message that goes on to a line that ends in """, whatever is
// between. At the end of the input what was read so far is a message, if it is not empty. An interrupt drops it.
Input read_message(const ReadLine& read_line, MessageEnd end);

// "/save file name" -> name "save", argument "file name". Text that does not begin with a slash and a letter is no
// command: the name is empty.
struct ChatCommand {
  std::string name, argument;
};
ChatCommand parse_command(std::string_view message);

}  // namespace caravan::app
