// The text of an answer, piece by piece, into content, reasoning and tool calls. What comes out does not depend on
// where the text was cut: the parser decides only on text that can no longer mean anything else.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "chat/json_calls.h"
#include "chat/syntax.h"

namespace caravan::chat {

struct Delta {
  enum class Kind { content, reasoning, call, arguments } kind = Kind::content;
  std::string text;  // content, reasoning, more of the arguments (JSON), or the name of a new call
  std::string id;    // of a new call; empty where the model gives none
  size_t index = 0;  // of the call
  bool operator==(const Delta&) const = default;
};

struct ToolCall {
  std::string id, name, arguments;
  bool operator==(const ToolCall&) const = default;
};

// A whole answer.
struct ParsedMessage {
  std::string content, reasoning;
  std::vector<ToolCall> calls;
  void add(const Delta& delta);
  bool operator==(const ParsedMessage&) const = default;
};

struct ParseOptions {
  bool tools = false;           // false: tool calls are content
  bool reasoning = true;        // false: reasoning and its marks are content
  bool reasoning_open = false;  // the prompt ended inside the reasoning
};

class OutputParser {
 public:
  // tools: OpenAI's array of tools, for the types of parameters that are written without JSON; may be null.
  OutputParser(OutputSyntax syntax, ParseOptions options, const nlohmann::ordered_json& tools = nullptr);

  // The next piece of the text.
  std::vector<Delta> push(std::string_view text);
  // The end of the text: everything withheld. Once.
  std::vector<Delta> finish();

 private:
  enum class State { text, reasoning, json, list, arguments, call_end, parameters, python, header, channel };

  // Each uses what it can of the buffer; false: it needs more text.
  bool step();
  bool step_text();
  bool step_reasoning();
  bool step_json();
  bool step_json_object();
  bool step_list();
  bool step_arguments();
  bool step_call_end();
  bool step_parameters();
  bool step_python();
  bool step_header();
  bool step_channel();

  // ---- the buffer
  std::string_view rest() const { return std::string_view(buffer_).substr(at_); }
  void use(size_t n_bytes);
  void skip_space();
  enum class Match { yes, no, maybe };  // maybe: the text ends inside the mark
  Match match(std::string_view mark) const;
  // Where in the rest a mark may begin that is not complete yet.
  size_t safe_length(const std::vector<std::string_view>& marks) const;
  struct Found {
    size_t at, mark;
  };
  // The first mark in the rest, by place and then by length; at is npos where there is none.
  Found find_first(const std::vector<std::string_view>& marks) const;

  // ---- output
  void emit(Delta::Kind kind, std::string_view text);
  void emit_text(Delta::Kind kind, std::string_view text);
  void begin_call(std::string name, std::string id);
  void emit_arguments(std::string_view text);
  void enter_reasoning();
  void enter_calls(const CallSyntax& calls, size_t n_mark_bytes);
  void leave_calls();
  void give_up();
  bool begin_object_call(bool complete);
  void begin_named_call(std::string_view name);
  bool read_parameter();
  void add_parameter(std::string_view key, std::string_view value);
  void begin_parameter(std::string_view key);
  void end_parameters();
  bool is_raw_string(const std::string& key, std::string_view value) const;
  bool is_known_tool(const std::string& name) const;

  const OutputSyntax syntax_;
  const ParseOptions options_;
  const nlohmann::ordered_json tools_;
  State state_ = State::text;
  std::string buffer_;
  size_t at_ = 0;        // up to here the buffer was used
  size_t searched_ = 0;  // bytes of the rest in which the end of a parameter does not begin
  bool finishing_ = false;
  std::vector<Delta> deltas_;

  std::string held_space_;   // white space that is dropped before a mark
  bool at_start_ = true;     // no content came yet
  bool drop_space_ = false;  // white space here is no content
  bool had_reasoning_ = false;
  bool reasoning_fresh_ = false;  // nothing of it came yet

  size_t n_calls_ = 0;
  const CallSyntax* calls_ = nullptr;
  std::string raw_;           // what turns out to be content if no call follows
  size_t n_block_calls_ = 0;  // since the mark that began them
  bool array_open_ = false, in_object_ = false, call_begun_ = false;
  bool has_arguments_ = false;  // of the current call
  JsonCallReader json_;
  JsonValueScanner value_;
  std::string call_name_;
  std::string channel_;  // gpt-oss: "analysis", "commentary", "final"
  bool channel_is_call_ = false;
};

}  // namespace caravan::chat
