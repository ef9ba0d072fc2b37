#include "chat/text.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <utility>

namespace caravan::chat {
namespace {

utf8proc_category_t category(char32_t c) {
  return c > 0x10FFFF ? UTF8PROC_CATEGORY_CN : utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

bool is_letter(char32_t c) {
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool is_escaped_byte(char32_t c) { return c >= 0xDC80 && c <= 0xDCFF; }

// Appends the code point, or the byte that an invalid one stands for.
void append_back(std::string& out, char32_t c) {
  if (is_escaped_byte(c)) {
    out += static_cast<char>(c - 0xDC00);
  } else {
    append_utf8(out, c);
  }
}

template <typename F>
std::string map_code_points(std::string_view s, F&& f) {
  std::string out;
  out.reserve(s.size());
  for (size_t at = 0; at < s.size();) {
    const CodePoint c = code_point_at(s, at);
    append_back(out, f(c.value));
    at += c.size;
  }
  return out;
}

char32_t upper(char32_t c) {
  if (c < 0x80) return c >= 'a' && c <= 'z' ? c - 32 : c;
  return is_escaped_byte(c) ? c : static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}

char32_t lower(char32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
  return is_escaped_byte(c) ? c : static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}

// str.isprintable() of one character.
bool is_printable(char32_t c) {
  if (c < 0x7F) return c >= 0x20;
  switch (category(c)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

bool is_line_end(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

}  // namespace

CodePoint code_point_at(std::string_view s, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(s[at + i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return {first, 1};
  const CodePoint invalid{0xDC00u + first, 1};
  const size_t size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 1;
  if (size == 1 || first > 0xF4 || at + size > s.size()) return invalid;
  char32_t value = first & (0x7F >> size);
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return invalid;
    value = (value << 6) | (byte(i) & 0x3F);
  }
  constexpr char32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
  if (value < kSmallest[size] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return invalid;
  return {value, size};
}

size_t count_code_points(std::string_view s) {
  size_t n = 0;
  for (size_t at = 0; at < s.size(); ++n) at += code_point_at(s, at).size;
  return n;
}

std::vector<std::string_view> split_code_points(std::string_view s) {
  std::vector<std::string_view> list;
  list.reserve(s.size());
  for (size_t at = 0; at < s.size();) {
    const size_t size = code_point_at(s, at).size;
    list.push_back(s.substr(at, size));
    at += size;
  }
  return list;
}

void append_utf8(std::string& out, char32_t c) {
  const auto put = [&](char32_t byte) { out += static_cast<char>(byte); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | (c >> 6));
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3F));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::string_view strip(std::string_view s, StripSide side, std::optional<std::string_view> chars) {
  const auto goes = [&](std::string_view c) {
    return chars ? chars->find(c) != std::string_view::npos : is_space(code_point_at(c, 0).value);
  };
  if (side != StripSide::right)
    while (!s.empty()) {
      const size_t size = code_point_at(s, 0).size;
      if (!goes(s.substr(0, size))) break;
      s.remove_prefix(size);
    }
  if (side != StripSide::left)
    while (!s.empty()) {
      size_t begin = s.size() - 1;  // back to where the last character begins
      while (begin > 0 && s.size() - begin < 4 && (static_cast<unsigned char>(s[begin]) & 0xC0) == 0x80) --begin;
      if (code_point_at(s, begin).size != s.size() - begin) begin = s.size() - 1;
      if (!goes(s.substr(begin))) break;
      s.remove_suffix(s.size() - begin);
    }
  return s;
}

std::string to_upper(std::string_view s) { return map_code_points(s, upper); }
std::string to_lower(std::string_view s) { return map_code_points(s, lower); }

std::string capitalize(std::string_view s) {
  bool first = true;
  return map_code_points(s, [&](char32_t c) { return std::exchange(first, false) ? upper(c) : lower(c); });
}

std::string title_case(std::string_view s) {
  bool inside = false;
  return map_code_points(s, [&](char32_t c) {
    const char32_t mapped = inside ? lower(c) : upper(c);
    inside = is_letter(c);
    return mapped;
  });
}

std::vector<std::string_view> split_lines(std::string_view s) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < s.size();) {
    const CodePoint c = code_point_at(s, at);
    size_t next = at + c.size;
    if (is_line_end(c.value)) {
      if (c.value == '\r' && next < s.size() && s[next] == '\n') ++next;
      lines.push_back(s.substr(begin, at - begin));
      begin = next;
    }
    at = next;
  }
  if (begin < s.size()) lines.push_back(s.substr(begin));
  return lines;
}

std::vector<std::string_view> split_white_space(std::string_view s, int64_t limit) {
  std::vector<std::string_view> parts;
  s = strip(s, StripSide::left);
  while (!s.empty()) {
    if (limit >= 0 && static_cast<int64_t>(parts.size()) >= limit) {
      parts.push_back(strip(s, StripSide::right));
      break;
    }
    size_t end = 0;
    while (end < s.size() && !is_space(code_point_at(s, end).value)) end += code_point_at(s, end).size;
    parts.push_back(s.substr(0, end));
    s = strip(s.substr(end), StripSide::left);
  }
  return parts;
}

std::vector<std::string_view> split_white_space_from_right(std::string_view s, int64_t limit) {
  std::vector<std::string_view> parts = split_white_space(s, -1);
  if (limit >= 0 && static_cast<int64_t>(parts.size()) > limit) {
    const size_t n_joined = parts.size() - static_cast<size_t>(limit);  // these stay one part
    const char* begin = parts.front().data();
    const std::string_view last = parts[n_joined - 1];
    parts.erase(parts.begin(), parts.begin() + static_cast<ptrdiff_t>(n_joined) - 1);
    parts.front() = std::string_view(begin, static_cast<size_t>(last.data() + last.size() - begin));
  }
  return parts;
}

std::vector<std::string_view> split_at(std::string_view s, std::string_view separator, int64_t limit) {
  std::vector<std::string_view> parts;
  while (limit < 0 || static_cast<int64_t>(parts.size()) < limit) {
    const size_t found = s.find(separator);
    if (found == std::string_view::npos) break;
    parts.push_back(s.substr(0, found));
    s.remove_prefix(found + separator.size());
  }
  parts.push_back(s);
  return parts;
}

std::vector<std::string_view> split_at_from_right(std::string_view s, std::string_view separator, int64_t limit) {
  std::vector<std::string_view> parts;
  while (limit < 0 || static_cast<int64_t>(parts.size()) < limit) {
    const size_t found = s.rfind(separator);
    if (found == std::string_view::npos) break;
    parts.push_back(s.substr(found + separator.size()));
    s = s.substr(0, found);
  }
  parts.push_back(s);
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::string quote(std::string_view s) {
  const bool has_single = s.find('\'') != std::string_view::npos, has_double = s.find('"') != std::string_view::npos;
  const char mark = has_single && !has_double ? '"' : '\'';
  std::string out(1, mark);
  for (size_t at = 0; at < s.size();) {
    const auto [c, size] = code_point_at(s, at);
    at += size;
    if (c == static_cast<unsigned char>(mark) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else if (is_printable(c)) {
      append_utf8(out, c);
    } else if (c < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    } else {
      out += c < 0x10000 ? fmt::format("\\u{:04x}", static_cast<uint32_t>(c))
                         : fmt::format("\\U{:08x}", static_cast<uint32_t>(c));
    }
  }
  return out + mark;
}

std::string escape_html(std::string_view s) {
  std::string out;
  for (const char c : s) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  return out;
}

bool consists_of(std::string_view s, CharacterClass which) {
  bool cased = false;
  for (const std::string_view part : split_code_points(s)) {
    const char32_t c = code_point_at(part, 0).value;
    const auto k = category(c);
    const bool number = k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
    switch (which) {
      case CharacterClass::alpha:
        if (!is_letter(c)) return false;
        break;
      case CharacterClass::alnum:
        if (!is_letter(c) && !number) return false;
        break;
      case CharacterClass::digit:
      case CharacterClass::decimal:
        if (k != UTF8PROC_CATEGORY_ND) return false;
        break;
      case CharacterClass::numeric:
        if (!number) return false;
        break;
      case CharacterClass::space:
        if (!is_space(c)) return false;
        break;
      case CharacterClass::upper:
        if (k == UTF8PROC_CATEGORY_LL || k == UTF8PROC_CATEGORY_LT) return false;
        cased = cased || k == UTF8PROC_CATEGORY_LU;
        break;
      case CharacterClass::lower:
        if (k == UTF8PROC_CATEGORY_LU || k == UTF8PROC_CATEGORY_LT) return false;
        cased = cased || k == UTF8PROC_CATEGORY_LL;
        break;
    }
  }
  return which == CharacterClass::upper || which == CharacterClass::lower ? cased : !s.empty();
}

}  // namespace caravan::chat
