// Incremental readers of JSON as models write it in tool calls: byte by byte, without a tree.
#pragma once

#include <string>
#include <string_view>

namespace caravan::chat {

// Finds the end of one JSON value. It checks strings and brackets only.
class JsonValueScanner {
 public:
  enum class Result { more, done, done_before };  // done_before: the byte does not belong to the value
  // White space before the value is part of it.
  Result push(char c);
  bool begun() const { return kind_ != Kind::none; }
  bool is_string() const { return kind_ == Kind::string; }
  void reset() { *this = {}; }

 private:
  enum class Kind { none, string, container, scalar } kind_ = Kind::none;
  int depth_ = 0;
  bool in_string_ = false, escaped_ = false;
};

// Reads {"name": NAME, "arguments": {...}}: which keys mean what, models do not agree on. An object under "function" is
// read as if its members stood outside.
class JsonCallReader {
 public:
  // name_is_key: {NAME: {...}} instead.
  explicit JsonCallReader(bool name_is_key = false) : name_is_key_(name_is_key) {}

  enum class Result { more, done, failed };
  // The first byte must be '{'.
  Result push(char c);

  bool has_name() const { return has_name_; }
  const std::string& name() const { return name_; }
  const std::string& id() const { return id_; }
  bool has_arguments() const { return has_arguments_; }
  // What of the arguments has come and was not taken yet: the bytes of the JSON as the model wrote them; arguments that
  // are written as a string are decoded once complete.
  std::string take_arguments();

 private:
  enum class State { begin, key_or_end, key, colon, value, separator };
  enum class Meaning { other, name, id, arguments, wrapper };
  Result push_value(char c);
  void end_value();
  Meaning meaning_of(const std::string& key) const;

  bool name_is_key_;
  State state_ = State::begin;
  int depth_ = 0;  // of the object and its wrapper
  Meaning meaning_ = Meaning::other;
  JsonValueScanner scanner_;
  std::string key_, text_;  // raw JSON
  std::string name_, id_, arguments_;
  bool has_name_ = false, has_arguments_ = false;
};

// The string that a JSON string stands for, or the text itself where it is none.
std::string decoded_json_string(std::string_view json);

}  // namespace caravan::chat
