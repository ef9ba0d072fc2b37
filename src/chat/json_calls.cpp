#include "chat/json_calls.h"

#include <nlohmann/json.hpp>
#include <utility>

namespace caravan::chat {
namespace {

bool is_json_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

}  // namespace

JsonValueScanner::Result JsonValueScanner::push(char c) {
  if (kind_ == Kind::none) {
    if (is_json_space(c)) return Result::more;
    if (c == ',' || c == ':' || c == ']' || c == '}') return Result::done_before;
    kind_ = c == '"' ? Kind::string : c == '{' || c == '[' ? Kind::container : Kind::scalar;
    in_string_ = kind_ == Kind::string;
    depth_ = kind_ == Kind::container ? 1 : 0;
    return Result::more;
  }
  if (kind_ == Kind::scalar)
    return is_json_space(c) || c == ',' || c == ']' || c == '}' ? Result::done_before : Result::more;
  if (in_string_) {
    if (escaped_) {
      escaped_ = false;
    } else if (c == '\\') {
      escaped_ = true;
    } else if (c == '"') {
      in_string_ = false;
      if (kind_ == Kind::string) return Result::done;
    }
    return Result::more;
  }
  if (c == '"') in_string_ = true;
  if (c == '{' || c == '[') ++depth_;
  if (c == '}' || c == ']') return --depth_ == 0 ? Result::done : Result::more;
  return Result::more;
}

std::string decoded_json_string(std::string_view json) {
  const auto value = nlohmann::json::parse(json, nullptr, false);
  return value.is_string() ? value.get<std::string>() : std::string(json);
}

JsonCallReader::Meaning JsonCallReader::meaning_of(const std::string& key) const {
  if (name_is_key_) return Meaning::arguments;
  if (key == "name" || key == "tool_name") return Meaning::name;
  if (key == "arguments" || key == "parameters" || key == "args") return Meaning::arguments;
  if (key == "id" || key == "tool_call_id") return Meaning::id;
  return key == "function" ? Meaning::wrapper : Meaning::other;
}

JsonCallReader::Result JsonCallReader::push(char c) {
  switch (state_) {
    case State::begin:
      if (c != '{') return Result::failed;
      depth_ = 1;
      state_ = State::key_or_end;
      return Result::more;
    case State::key_or_end:
      if (is_json_space(c)) return Result::more;
      if (c == '"') {
        key_ = "\"";
        state_ = State::key;
        return Result::more;
      }
      if (c != '}') return Result::failed;
      break;
    case State::key:
      key_ += c;
      if (c == '"' && (key_.size() < 2 || key_[key_.size() - 2] != '\\')) {
        key_ = decoded_json_string(key_);
        meaning_ = meaning_of(key_);
        state_ = State::colon;
      }
      return Result::more;
    case State::colon:
      if (is_json_space(c)) return Result::more;
      if (c != ':') return Result::failed;
      if (name_is_key_ && !has_name_) {
        name_ = key_;
        has_name_ = true;
      }
      scanner_.reset();
      text_.clear();
      state_ = State::value;
      return Result::more;
    case State::value:
      return push_value(c);
    case State::separator:
      if (is_json_space(c)) return Result::more;
      if (c == ',') {
        state_ = State::key_or_end;
        return Result::more;
      }
      if (c != '}') return Result::failed;
      break;
  }
  // a closing bracket
  state_ = State::separator;
  if (--depth_ > 0) return Result::more;
  return has_name_ ? Result::done : Result::failed;
}

JsonCallReader::Result JsonCallReader::push_value(char c) {
  if (meaning_ == Meaning::wrapper && !scanner_.begun() && c == '{') {
    ++depth_;
    if (depth_ > 2) return Result::failed;
    state_ = State::key_or_end;
    return Result::more;
  }
  const JsonValueScanner::Result result = scanner_.push(c);
  const bool belongs = result != JsonValueScanner::Result::done_before;
  if (!belongs && !scanner_.begun()) return Result::failed;
  if (belongs && scanner_.begun()) {
    if (meaning_ == Meaning::arguments && !scanner_.is_string()) {
      arguments_ += c;
      has_arguments_ = true;
    } else {
      text_ += c;
    }
  }
  if (result == JsonValueScanner::Result::more) return Result::more;
  end_value();
  state_ = State::separator;
  return belongs ? Result::more : push(c);
}

void JsonCallReader::end_value() {
  if (meaning_ == Meaning::name || (meaning_ == Meaning::wrapper && scanner_.is_string())) {
    name_ = decoded_json_string(text_);
    has_name_ = !name_.empty();
  } else if (meaning_ == Meaning::id) {
    id_ = decoded_json_string(text_);
  } else if (meaning_ == Meaning::arguments && scanner_.is_string()) {
    arguments_ += decoded_json_string(text_);
    has_arguments_ = true;
  }
}

std::string JsonCallReader::take_arguments() { return std::exchange(arguments_, {}); }

}  // namespace caravan::chat
