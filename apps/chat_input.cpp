#include "chat_input.h"

namespace caravan::app {
namespace {

constexpr std::string_view kPrompt = "> ", kMore = ". ", kQuotes = "\"\"\"";

// Reads the rest of a message that began with three quotes and `text` behind them.
Input read_quoted(const ReadLine& read_line, std::string text) {
  while (!text.ends_with(kQuotes)) {
    Input line = read_line(kMore);
    if (line.state == Input::State::interrupted) return line;
    if (line.state == Input::State::end) return {Input::State::text, std::move(text)};
    text += '\n' + line.text;
  }
  text.resize(text.size() - kQuotes.size());
  if (text.starts_with('\n')) text.erase(0, 1);
  if (text.ends_with('\n')) text.pop_back();
  return {Input::State::text, std::move(text)};
}

}  // namespace

Input read_message(const ReadLine& read_line, MessageEnd end) {
  Input line = read_line(kPrompt);
  if (line.state != Input::State::text) return line;
  if (line.text.starts_with(kQuotes)) return read_quoted(read_line, line.text.substr(kQuotes.size()));
  std::string message;
  for (;;) {
    const bool has_backslash = line.text.ends_with('\\');
    if (has_backslash) line.text.pop_back();
    message += line.text;
    // A command needs no other end than that of its line.
    const bool is_command = end == MessageEnd::until_backslash && !parse_command(message).name.empty();
    if (has_backslash == (end == MessageEnd::until_backslash) || is_command) break;
    line = read_line(kMore);
    if (line.state == Input::State::interrupted) return line;
    if (line.state == Input::State::end) break;
    message += '\n';
  }
  return {Input::State::text, std::move(message)};
}

ChatCommand parse_command(std::string_view message) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  if (message.size() < 2 || message[0] != '/' || !is_letter(message[1])) return {};
  const std::string_view line = message.substr(1, message.find('\n') - 1);
  const size_t space = line.find(' ');
  std::string_view argument = line.substr(std::min(space, line.size()));
  while (argument.starts_with(' ')) argument.remove_prefix(1);
  while (argument.ends_with(' ')) argument.remove_suffix(1);
  return {std::string(line.substr(0, space)), std::string(argument)};
}

}  // namespace caravan::app
