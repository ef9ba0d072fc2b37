// How families of models write reasoning and tool calls, as data, and which of them a chat template belongs to.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace caravan::chat {

// One way to write tool calls. White space between the parts is free.
struct CallSyntax {
  enum class Form {
    json,        // begin {"name": ..., "arguments": {...}} end, or an array of such objects
    named,       // begin { call_begin NAME name_end {...} call_end } end
    parameters,  // begin { call_begin NAME name_end { parameter_begin KEY key_end VALUE parameter_end } call_end } end
    python,      // begin [name(key=value, ...), ...] end
  };
  Form form = Form::json;
  std::string begin, end;  // end may be missing in a text, or empty here
  std::string call_begin, name_end, call_end;
  std::string id_begin;  // named: NAME may be followed by this and the id of the call
  std::string parameter_begin, key_end, value_begin, parameter_end;
  bool cdata = false;        // parameters: a VALUE may be <![CDATA[TEXT]]>
  bool name_is_key = false;  // json: {NAME: {...}}
  bool bare = false;         // json: begins with the object itself, at the start of the answer only
};

struct OutputSyntax {
  std::string name;                            // "hermes", "mistral", ...
  std::string reasoning_begin, reasoning_end;  // empty: none
  std::vector<CallSyntax> calls;
  std::vector<std::string> dropped;  // marks that mean nothing to a client
  bool channels = false;             // gpt-oss: <|channel|>NAME<|message|>TEXT<|end|>, nothing of the above
};

// The syntax that models with this chat template use; "generic" where none is recognised.
OutputSyntax detect_syntax(std::string_view template_source);

// All texts that the parser looks for: a vocabulary may hold some of them as control tokens.
std::vector<std::string> marks_of(const OutputSyntax& syntax);

}  // namespace caravan::chat
