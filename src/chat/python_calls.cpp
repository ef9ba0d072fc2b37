#include "chat/python_calls.h"

#include <nlohmann/json.hpp>

namespace caravan::chat {
namespace {

using Json = nlohmann::ordered_json;

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  std::optional<std::vector<std::pair<std::string, std::string>>> calls() {
    std::vector<std::pair<std::string, std::string>> list;
    const bool bracketed = take('[');
    do {
      if (bracketed && peek() == ']') break;
      const std::string name = identifier();
      Json arguments = Json::object();
      if (name.empty() || !take('(') || !keywords(arguments)) return std::nullopt;
      list.emplace_back(name, arguments.dump(-1, ' ', false, Json::error_handler_t::replace));
    } while (take(','));
    if ((bracketed && !take(']')) || peek() != '\0' || list.empty()) return std::nullopt;
    return list;
  }

 private:
  static constexpr int kMaxDepth = 64;

  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }

  std::string identifier() {
    peek();
    const size_t begin = at_;
    const auto is_part = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
             c == '-';
    };
    while (at_ < text_.size() && is_part(text_[at_])) ++at_;
    return std::string(text_.substr(begin, at_ - begin));
  }

  // key=value, ... ")"
  bool keywords(Json& object) {
    if (take(')')) return true;
    do {
      if (peek() == ')') break;
      const std::string key = identifier();
      Json value;
      if (key.empty() || !take('=') || !literal(value, 0)) return false;
      object[key] = std::move(value);
    } while (take(','));
    return take(')');
  }

  bool literal(Json& value, int depth) {
    if (depth > kMaxDepth) return false;
    const char c = peek();
    if (c == '"' || c == '\'') return string(value);
    if (c == '[' || c == '(') return list(value, depth);
    if (c == '{') return dict(value, depth);
    return word(value);
  }

  bool string(Json& value) {
    const char mark = text_[at_++];
    std::string out;
    while (at_ < text_.size() && text_[at_] != mark) {
      const char c = text_[at_++];
      if (c == '\\' && at_ < text_.size()) {
        escape(text_[at_++], out);
      } else {
        out += c;
      }
    }
    if (at_ >= text_.size()) return false;
    ++at_;
    value = std::move(out);
    return true;
  }

  // What a backslash and c stand for; further digits are taken. \uXXXX is read as JSON has it: two of them may be one
  // character.
  void escape(char c, std::string& out) {
    constexpr std::string_view kNames = "ntrbf", kMeanings = "\n\t\r\b\f";
    if (const size_t known = kNames.find(c); known != kNames.npos) {
      out += kMeanings[known];
      return;
    }
    if (c == 'u') {
      for (const size_t n : {size_t{10}, size_t{4}}) {  // \uD83D\uDE00 or \u00E9
        const auto text = Json::parse("\"\\u" + std::string(text_.substr(at_, n)) + '"', nullptr, false);
        if (!text.is_string() || (n == 10 && !text_.substr(at_, 6).ends_with("\\u"))) continue;
        out += text.get_ref<const std::string&>();
        at_ += n;
        return;
      }
    }
    out += c;
  }

  bool list(Json& value, int depth) {
    const char end = text_[at_++] == '[' ? ']' : ')';
    value = Json::array();
    while (peek() != end) {
      Json item;
      if (!literal(item, depth + 1)) return false;
      value.push_back(std::move(item));
      if (!take(',') && peek() != end) return false;
    }
    return take(end);
  }

  bool dict(Json& value, int depth) {
    ++at_;
    value = Json::object();
    while (peek() != '}') {
      Json key, item;
      if (!literal(key, depth + 1) || !key.is_string() || !take(':') || !literal(item, depth + 1)) return false;
      value[key.get<std::string>()] = std::move(item);
      if (!take(',') && peek() != '}') return false;
    }
    return take('}');
  }

  bool word(Json& value) {
    const size_t begin = at_;
    while (at_ < text_.size() && std::string_view(",)]}: \n\t\r").find(text_[at_]) == std::string_view::npos) ++at_;
    const std::string_view text = text_.substr(begin, at_ - begin);
    if (text == "True" || text == "true") {
      value = true;
    } else if (text == "False" || text == "false") {
      value = false;
    } else if (text == "None" || text == "null") {
      value = nullptr;
    } else {
      value = Json::parse(text, nullptr, false);
      return value.is_number();
    }
    return true;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

std::optional<std::vector<std::pair<std::string, std::string>>> parse_python_calls(std::string_view text) {
  return Reader(text).calls();
}

}  // namespace caravan::chat
