// Python's two ways to fill values into a string: "%d" % x and "{}".format(x).
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "chat/builtins.h"
#include "chat/interpreter.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

constexpr int64_t kMaxWidth = 1 << 20;

// How one value is laid out, in either mini-language.
struct Layout {
  std::string fill = " ";
  char align = '\0';  // '<', '>', '^', '='; none: by type
  char sign = '-';    // '-', '+', ' '
  bool alternate = false, thousands = false;
  int64_t width = 0, precision = -1;
  char type = '\0';
};

std::string padded(const std::string& text, const Layout& layout, char default_align) {
  const auto length = static_cast<int64_t>(count_code_points(text));
  if (length >= layout.width) return text;
  const int64_t missing = layout.width - length;
  const char align = layout.align != '\0' ? layout.align : default_align;
  const auto fill = [&](int64_t n) {
    std::string s;
    for (int64_t i = 0; i < n; ++i) s += layout.fill;
    return s;
  };
  if (align == '<') return text + fill(missing);
  if (align == '^') return fill(missing / 2) + text + fill(missing - missing / 2);
  if (align == '=') {
    const size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+' || text[0] == ' ') ? 1 : 0;
    return text.substr(0, sign) + fill(missing) + text.substr(sign);
  }
  return fill(missing) + text;
}

std::string with_thousands(const std::string& digits) {
  const size_t end = std::min(digits.find_first_not_of("0123456789"), digits.size());
  std::string out;
  for (size_t i = 0; i < end; ++i) {
    if (i > 0 && (end - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out + digits.substr(end);
}

std::string integer_digits(uint64_t magnitude, char type, bool alternate) {
  switch (type) {
    case 'x':
      return (alternate ? "0x" : "") + fmt::format("{:x}", magnitude);
    case 'X':
      return (alternate ? "0X" : "") + fmt::format("{:X}", magnitude);
    case 'o':
      return (alternate ? "0o" : "") + fmt::format("{:o}", magnitude);
    case 'b':
      return (alternate ? "0b" : "") + fmt::format("{:b}", magnitude);
    default:
      return std::to_string(magnitude);
  }
}

std::string real_digits(double magnitude, const Layout& layout) {
  const int precision = static_cast<int>(std::min<int64_t>(layout.precision < 0 ? 6 : layout.precision, 400));
  switch (layout.type) {
    case 'f':
    case 'F':
      return fmt::format("{:.{}f}", magnitude, precision);
    case 'e':
      return fmt::format("{:.{}e}", magnitude, precision);
    case 'E':
      return fmt::format("{:.{}E}", magnitude, precision);
    case '%':
      return fmt::format("{:.{}f}%", magnitude * 100, precision);
    case 'G':
      return fmt::format("{:.{}G}", magnitude, std::max(precision, 1));
    case 'g':
      return fmt::format("{:.{}g}", magnitude, std::max(precision, 1));
    default:
      return layout.precision < 0 ? real_repr(magnitude) : fmt::format("{:.{}g}", magnitude, std::max(precision, 1));
  }
}

std::string laid_out_number(const Value& value, const Layout& layout) {
  const bool as_real = value.is_real() ||
                       (layout.type != '\0' && std::string_view("fFeEgG%").find(layout.type) != std::string_view::npos);
  bool negative = false;
  std::string digits;
  if (as_real) {
    const double v = value.as_real();
    negative = std::signbit(v);
    digits = std::isfinite(v) ? real_digits(std::fabs(v), layout) : std::isnan(v) ? "nan" : "inf";
  } else {
    const int64_t v = value.as_integer();
    negative = v < 0;
    digits = integer_digits(negative ? 0 - static_cast<uint64_t>(v) : static_cast<uint64_t>(v), layout.type,
                            layout.alternate);
    if (layout.precision > static_cast<int64_t>(digits.size()))
      digits.insert(0, static_cast<size_t>(layout.precision) - digits.size(), '0');
  }
  if (layout.thousands) digits = with_thousands(digits);
  if (negative) {
    digits.insert(0, "-");
  } else if (layout.sign != '-') {
    digits.insert(0, 1, layout.sign);
  }
  return padded(digits, layout, '>');
}

std::string cut(const std::string& text, int64_t precision) {
  if (precision < 0) return text;
  size_t at = 0;
  for (int64_t i = 0; i < precision && at < text.size(); ++i) at += code_point_at(text, at).size;
  return text.substr(0, at);
}

// ---- "%s" % x

class PercentFormatter {
 public:
  PercentFormatter(Interpreter& interpreter, const std::string& format, const Value& arguments)
      : interpreter_(interpreter), format_(format), arguments_(arguments) {
    const bool is_tuple = arguments.is_list() && arguments.list_kind() == ListKind::tuple;
    items_ = is_tuple ? arguments.as_list() : List{arguments};
  }

  std::string run() {
    for (size_t at = 0; at < format_.size(); ++at) {
      if (format_[at] != '%') {
        out_ += format_[at];
        continue;
      }
      at = read_one(at + 1);
    }
    if (!used_mapping_ && n_used_ < items_.size() && !(items_.size() == 1 && arguments_.is_dict()))
      interpreter_.fail("TypeError", "not all arguments converted during string formatting");
    return std::move(out_);
  }

 private:
  char peek(size_t at) const {
    if (at >= format_.size()) interpreter_.fail("ValueError", "incomplete format");
    return format_[at];
  }

  const Value& next() {
    if (n_used_ >= items_.size()) interpreter_.fail("TypeError", "not enough arguments for format string");
    return items_[n_used_++];
  }

  int64_t read_number(size_t& at) {
    if (peek(at) == '*') {
      ++at;
      return checked_width(integer_or(next(), 0, "%"));
    }
    int64_t n = 0;
    while (peek(at) >= '0' && peek(at) <= '9') n = checked_width(n * 10 + (format_[at++] - '0'));
    return n;
  }

  int64_t checked_width(int64_t n) const {
    if (n > kMaxWidth || n < -kMaxWidth) interpreter_.fail("LimitError", "a width or precision beyond 2^20");
    return n;
  }

  // Reads and applies the conversion behind a '%'; returns the place of its last character.
  size_t read_one(size_t at) {
    std::optional<Value> from_mapping;
    if (peek(at) == '(') {
      const size_t end = format_.find(')', at);
      if (end == std::string::npos) interpreter_.fail("ValueError", "incomplete format key");
      if (!arguments_.is_dict()) interpreter_.fail("TypeError", "format requires a mapping");
      const std::string key = format_.substr(at + 1, end - at - 1);
      const Value* found = arguments_.as_dict().find(key);
      if (found == nullptr) interpreter_.fail("KeyError", quote(key));
      from_mapping = *found;
      used_mapping_ = true;
      at = end + 1;
    }
    Layout layout;
    for (;; ++at) {
      const char flag = peek(at);
      if (flag == '-') {
        layout.align = '<';
      } else if (flag == '0') {
        layout.fill = "0";
      } else if (flag == '+' || (flag == ' ' && layout.sign != '+')) {
        layout.sign = flag;
      } else if (flag == '#') {
        layout.alternate = true;
      } else if (flag != ' ') {
        break;
      }
    }
    layout.width = read_number(at);
    if (layout.width < 0) layout.align = '<', layout.width = -layout.width;
    if (peek(at) == '.') layout.precision = std::max<int64_t>(read_number(++at), 0);
    while (peek(at) == 'l' || peek(at) == 'h' || peek(at) == 'L') ++at;
    layout.type = peek(at);
    if (layout.type == '%') {
      out_ += '%';
    } else {
      out_ += convert(from_mapping ? *from_mapping : next(), layout);
      interpreter_.check_size(out_.size());
    }
    return at;
  }

  std::string convert(const Value& value, Layout layout) {
    switch (layout.type) {
      case 's':
      case 'r':
      case 'a':
        interpreter_.charge_bytes(value.extent().weight);
        layout.fill = " ";
        return padded(cut(layout.type == 's' ? value.str() : value.repr(), layout.precision), layout, '>');
      case 'c':
        layout.fill = " ";
        return padded(value.is_integer() ? Value::text(character(value.as_integer())).as_string() : value.str(), layout,
                      '>');
      case 'd':
      case 'i':
      case 'u':
      case 'x':
      case 'X':
      case 'o':
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
        break;
      default:
        interpreter_.fail("ValueError", fmt::format("unsupported format character '{}'", layout.type));
    }
    interpreter_.require_defined(value);
    if (!value.is_number())
      interpreter_.fail("TypeError",
                        fmt::format("%{} format: a number is required, not {}", layout.type, value.type_name()));
    const bool is_integer = std::string_view("diu").find(layout.type) != std::string_view::npos;
    if (layout.fill == "0") layout.fill = layout.align == '<' ? " " : "0";
    if (layout.fill == "0") layout.align = '=';
    if (!is_integer) return laid_out_number(value, layout);
    layout.type = 'd';
    if (!value.is_real()) return laid_out_number(value, layout);
    if (!(std::fabs(value.as_real()) < 9e18)) interpreter_.fail("OverflowError", "cannot convert float to integer");
    return laid_out_number(Value::integer(static_cast<int64_t>(value.as_real())), layout);
  }

  std::string character(int64_t code) const {
    if (code < 0 || code > 0x10FFFF) interpreter_.fail("OverflowError", "%c arg not in range(0x110000)");
    std::string text;
    append_utf8(text, static_cast<char32_t>(code));
    return text;
  }

  Interpreter& interpreter_;
  const std::string& format_;
  const Value& arguments_;
  List items_;
  size_t n_used_ = 0;
  bool used_mapping_ = false;
  std::string out_;
};

// ---- "{}".format(x)

class BraceFormatter {
 public:
  BraceFormatter(Interpreter& interpreter, const Arguments& arguments)
      : interpreter_(interpreter), arguments_(arguments) {}

  std::string run(const std::string& format, int depth) {
    if (depth > 2) interpreter_.fail("ValueError", "Max string recursion exceeded");
    std::string out;
    for (size_t at = 0; at < format.size(); ++at) {
      const char c = format[at];
      const bool doubled = at + 1 < format.size() && format[at + 1] == c;
      if ((c == '{' || c == '}') && doubled) {
        out += c;
        ++at;
      } else if (c == '}') {
        interpreter_.fail("ValueError", "Single '}' encountered in format string");
      } else if (c == '{') {
        const size_t end = field_end(format, at + 1);
        out += field(format.substr(at + 1, end - at - 1), depth);
        interpreter_.check_size(out.size());
        at = end;
      } else {
        out += c;
      }
    }
    return out;
  }

 private:
  size_t field_end(const std::string& format, size_t at) const {
    int open = 1;
    for (; at < format.size(); ++at) {
      if (format[at] == '{') ++open;
      if (format[at] == '}' && --open == 0) return at;
    }
    interpreter_.fail("ValueError", "expected '}' before end of string");
  }

  // "name!r:spec"
  std::string field(const std::string& text, int depth) {
    const size_t colon = std::min(text.find(':'), text.size());
    const size_t mark = std::min(text.rfind('!', colon), text.size());
    const bool has_conversion = mark < colon;
    const std::string name = text.substr(0, has_conversion ? mark : colon);
    Value value = lookup(name);
    if (has_conversion) {
      const std::string conversion = text.substr(mark + 1, colon - mark - 1);
      if (conversion != "r" && conversion != "s" && conversion != "a")
        interpreter_.fail("ValueError", fmt::format("Unknown conversion specifier '{}'", conversion));
      value = Value::text(conversion == "s" ? value.str() : value.repr());
    }
    const std::string spec = colon < text.size() ? run(text.substr(colon + 1), depth + 1) : "";
    interpreter_.charge_bytes(value.extent().weight);
    return spec.empty() ? value.str() : laid_out(value, spec);
  }

  Value lookup(const std::string& name) {
    const size_t end = std::min(name.find_first_of(".["), name.size());
    const std::string head = name.substr(0, end);
    Value value;
    if (head.empty() || std::all_of(head.begin(), head.end(), [](char c) { return c >= '0' && c <= '9'; })) {
      size_t index = n_used_;
      if (head.empty()) {
        ++n_used_;
      } else if (std::from_chars(head.data(), head.data() + head.size(), index).ec != std::errc()) {
        index = SIZE_MAX;
      }
      if (index >= arguments_.positional.size())
        interpreter_.fail("IndexError", "Replacement index out of range for positional args tuple");
      value = arguments_.positional[index];
    } else {
      const auto found = std::find_if(arguments_.named.begin(), arguments_.named.end(),
                                      [&](const auto& a) { return a.first == head; });
      if (found == arguments_.named.end()) interpreter_.fail("KeyError", quote(head));
      value = found->second;
    }
    return member(std::move(value), name, end);
  }

  // ".attribute" and "[key]" behind the name.
  Value member(Value value, const std::string& name, size_t at) {
    while (at < name.size()) {
      if (name[at] == '.') {
        const size_t end = std::min(name.find_first_of(".[", at + 1), name.size());
        value = interpreter_.attribute(value, name.substr(at + 1, end - at - 1));
        at = end;
      } else {
        const size_t end = name.find(']', at);
        if (name[at] != '[' || end == std::string::npos)
          interpreter_.fail("ValueError", "Missing ']' in format string");
        const std::string key = name.substr(at + 1, end - at - 1);
        int64_t index = 0;
        const auto parsed = std::from_chars(key.data(), key.data() + key.size(), index);
        const bool is_index = parsed.ec == std::errc() && parsed.ptr == key.data() + key.size();
        value = interpreter_.subscript(value, is_index ? Value::integer(index) : Value::text(key));
        at = end + 1;
      }
    }
    interpreter_.require_defined(value);
    return value;
  }

  // [[fill]align][sign][#][0][width][,][.precision][type]
  Layout parse_spec(const std::string& spec) const {
    Layout layout;
    size_t at = 0;
    const auto is_align = [&](size_t i) {
      return i < spec.size() && std::string_view("<>^=").find(spec[i]) != std::string_view::npos;
    };
    const size_t first = code_point_at(spec, 0).size;
    if (is_align(first)) {
      layout.fill = spec.substr(0, first);
      layout.align = spec[first];
      at = first + 1;
    } else if (is_align(0)) {
      layout.align = spec[0];
      at = 1;
    }
    const auto accept = [&](char c) { return at < spec.size() && spec[at] == c && ++at > 0; };
    if (accept('+')) {
      layout.sign = '+';
    } else if (accept(' ')) {
      layout.sign = ' ';
    } else {
      accept('-');
    }
    layout.alternate = accept('#');
    if (accept('0') && layout.align == '\0') {
      layout.fill = "0";
      layout.align = '=';
    }
    const auto number = [&] {
      int64_t n = 0;
      for (; at < spec.size() && spec[at] >= '0' && spec[at] <= '9'; ++at) {
        n = n * 10 + (spec[at] - '0');
        if (n > kMaxWidth) interpreter_.fail("LimitError", "a width or precision beyond 2^20");
      }
      return n;
    };
    layout.width = number();
    layout.thousands = accept(',');
    if (accept('.')) layout.precision = number();
    if (at + 1 == spec.size()) layout.type = spec[at++];
    if (at != spec.size()) interpreter_.fail("ValueError", fmt::format("Invalid format specifier '{}'", spec));
    return layout;
  }

  std::string laid_out(const Value& value, const std::string& spec) const {
    Layout layout = parse_spec(spec);
    if (value.is_number() && !(value.is_boolean() && layout.type == '\0')) {
      if (layout.type == 'n') layout.type = 'd';
      if (layout.type != '\0' && std::string_view("bdoxXfFeEgG%").find(layout.type) == std::string_view::npos)
        interpreter_.fail("ValueError", fmt::format("Unknown format code '{}'", layout.type));
      if (value.is_real() && layout.type != '\0' &&
          std::string_view("bdoxX").find(layout.type) != std::string_view::npos)
        interpreter_.fail("ValueError",
                          fmt::format("Unknown format code '{}' for object of type 'float'", layout.type));
      return laid_out_number(value, layout);
    }
    if (layout.type != '\0' && layout.type != 's')
      interpreter_.fail("ValueError", fmt::format("Unknown format code '{}' for object of type '{}'", layout.type,
                                                  value.type_name()));
    if (layout.align == '=') layout.align = '<';
    return padded(cut(value.str(), layout.precision), layout, '<');
  }

  Interpreter& interpreter_;
  const Arguments& arguments_;
  size_t n_used_ = 0;
};

}  // namespace

Value percent_format(Interpreter& interpreter, const Value& format, const Value& arguments) {
  return interpreter.text_like(format, PercentFormatter(interpreter, format.as_string(), arguments).run());
}

Value brace_format(Interpreter& interpreter, const Value& format, const Arguments& arguments) {
  return interpreter.text_like(format, BraceFormatter(interpreter, arguments).run(format.as_string(), 0));
}

}  // namespace caravan::chat
