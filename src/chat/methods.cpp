// Methods of Python's strings, lists, tuples, dicts and floats.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "chat/builtins.h"
#include "chat/interpreter.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

Value text_list(Interpreter& interpreter, const std::vector<std::string_view>& parts) {
  List items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) items.push_back(interpreter.text(std::string(part)));
  return interpreter.list(std::move(items));
}

// ---- str

template <std::string (*F)(std::string_view)>
Value mapped(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "str method");
  return interpreter.text_like(self, F(self.as_string()));
}

template <StripSide Side>
Value stripped(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"chars"}, "strip");
  if (!values[0] || values[0]->is_none())
    return interpreter.text_like(self, std::string(strip(self.as_string(), Side)));
  const std::string chars = text_or(values[0], "", "strip");
  interpreter.step(self.as_string().size() / 64 * (1 + chars.size() / 8));
  return interpreter.text_like(self, std::string(strip(self.as_string(), Side, chars)));
}

// split (from the left) and rsplit.
template <bool FromLeft>
Value split(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"sep", "maxsplit"}, "split");
  const int64_t limit = integer_or(values[1], -1, "split");
  const std::string& text = self.as_string();
  if (!values[0] || values[0]->is_none())
    return text_list(interpreter,
                     FromLeft ? split_white_space(text, limit) : split_white_space_from_right(text, limit));
  interpreter.require_defined(*values[0]);
  const std::string separator = text_or(values[0], "", "split");
  if (separator.empty()) interpreter.fail("ValueError", "empty separator");
  return text_list(interpreter,
                   FromLeft ? split_at(text, separator, limit) : split_at_from_right(text, separator, limit));
}

Value splitlines(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"keepends"}, "splitlines");
  std::vector<std::string_view> lines = split_lines(self.as_string());
  if (boolean_or(values[0], false)) {
    const char* const end = self.as_string().data() + self.as_string().size();
    for (size_t i = 0; i < lines.size(); ++i) {
      const char* const next = i + 1 < lines.size() ? lines[i + 1].data() : end;
      lines[i] = std::string_view(lines[i].data(), static_cast<size_t>(next - lines[i].data()));
    }
  }
  return text_list(interpreter, lines);
}

// s[begin:end] of the optional bounds that find, count, startswith take.
std::string_view between(const std::string& text, const std::optional<Value>& begin, const std::optional<Value>& end,
                         const char* what, size_t* offset = nullptr) {
  if (!begin && !end) return text;
  const auto n = static_cast<int64_t>(count_code_points(text));
  const auto place = [&](const std::optional<Value>& v, int64_t otherwise) {
    const int64_t at = v && !v->is_none() ? integer_or(v, 0, what) : otherwise;
    return at < 0 ? std::max<int64_t>(at + n, 0) : std::min(at, n);
  };
  const int64_t from = place(begin, 0), to = std::max(place(end, n), from);
  size_t at = 0;
  for (int64_t i = 0; i < from; ++i) at += code_point_at(text, at).size;
  const size_t first = at;
  for (int64_t i = from; i < to; ++i) at += code_point_at(text, at).size;
  if (offset != nullptr) *offset = first;
  return std::string_view(text).substr(first, at - first);
}

template <bool AtStart>
Value has_affix(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"affix", "start", "end"}, AtStart ? "startswith" : "endswith");
  const std::string_view text = between(self.as_string(), values[1], values[2], "startswith");
  const auto matches = [&](const Value& affix) {
    interpreter.require_defined(affix);
    if (!affix.is_string())
      interpreter.fail("TypeError", fmt::format("{} first arg must be str or a tuple of str, not {}",
                                                AtStart ? "startswith" : "endswith", affix.type_name()));
    return AtStart ? text.starts_with(affix.as_string()) : text.ends_with(affix.as_string());
  };
  if (!values[0]) interpreter.fail("TypeError", "startswith: expected at least 1 argument");
  if (!values[0]->is_list()) return Value::boolean(matches(*values[0]));
  const List& affixes = values[0]->as_list();
  return Value::boolean(std::any_of(affixes.begin(), affixes.end(), matches));
}

std::string replaced(Interpreter& interpreter, const std::string& text, const std::string& from, const std::string& to,
                     int64_t limit) {
  std::string out;
  if (from.empty()) {  // between all characters
    int64_t n = 0;
    const auto put = [&] {
      if (limit < 0 || n++ < limit) out += to;
    };
    interpreter.check_size((text.size() + 1) * (to.size() + 1));
    for (const std::string_view c : split_code_points(text)) {
      put();
      out += c;
    }
    put();
    return out;
  }
  size_t at = 0;
  for (int64_t n = 0; limit < 0 || n < limit; ++n) {
    const size_t found = text.find(from, at);
    if (found == std::string::npos) break;
    out.append(text, at, found - at);
    out += to;
    interpreter.check_size(out.size());
    at = found + from.size();
  }
  return out.append(text, at);
}

Value replace(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"old", "new", "count"}, "replace");
  for (size_t i = 0; i < 2; ++i) {
    if (!values[i]) interpreter.fail("TypeError", "replace expected at least 2 arguments");
    interpreter.require_defined(*values[i]);
  }
  return interpreter.text_like(self, replaced(interpreter, self.as_string(), text_or(values[0], "", "replace"),
                                              text_or(values[1], "", "replace"), integer_or(values[2], -1, "replace")));
}

Value join(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"iterable"}, "join");
  if (!values[0]) interpreter.fail("TypeError", "join() takes exactly one argument");
  std::string out;
  bool first = true;
  for (const Value& item : values[0]->iterate()) {
    if (!item.is_string())
      interpreter.fail("TypeError", fmt::format("sequence item: expected str instance, {} found", item.type_name()));
    if (!std::exchange(first, false)) out += self.as_string();
    out += item.as_string();
    interpreter.check_size(out.size());
  }
  return interpreter.text_like(self, std::move(out));
}

// find, rfind, index, rindex: the place in characters.
template <bool FromLeft, bool Raises>
Value find(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"sub", "start", "end"}, "find");
  const std::string sub = text_or(values[0], "", "find");
  size_t offset = 0;
  const std::string_view text = between(self.as_string(), values[1], values[2], "find", &offset);
  const size_t found = FromLeft ? text.find(sub) : text.rfind(sub);
  if (found != std::string_view::npos)
    return Value::integer(static_cast<int64_t>(count_code_points(self.as_string().substr(0, offset + found))));
  if (Raises) interpreter.fail("ValueError", "substring not found");
  return Value::integer(-1);
}

Value count(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"sub", "start", "end"}, "count");
  const std::string sub = text_or(values[0], "", "count");
  const std::string_view text = between(self.as_string(), values[1], values[2], "count");
  interpreter.step(text.size() / 64);
  const size_t n = sub.empty() ? count_code_points(text) + 1 : split_at(text, sub, -1).size() - 1;
  return Value::integer(static_cast<int64_t>(n));
}

template <CharacterClass Which>
Value is_of(Interpreter&, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "str method");
  return Value::boolean(consists_of(self.as_string(), Which));
}

Value format(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  return brace_format(interpreter, self, arguments);
}

// ljust, rjust, center.
template <char Align>
Value justified(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"width", "fillchar"}, "justify");
  const int64_t width = integer_or(values[0], 0, "justify");
  const std::string fill = text_or(values[1], " ", "justify");
  if (count_code_points(fill) != 1)
    interpreter.fail("TypeError", "The fill character must be exactly one character long");
  const std::string& text = self.as_string();
  const int64_t missing = width - static_cast<int64_t>(count_code_points(text));
  if (missing <= 0) return self;
  interpreter.check_size(missing > INT32_MAX ? UINT64_MAX : text.size() + static_cast<uint64_t>(missing) * fill.size());
  const int64_t left = Align == '<' ? 0 : Align == '>' ? missing : missing / 2 + (missing & width & 1);
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += text;
  for (int64_t i = left; i < missing; ++i) out += fill;
  return interpreter.text_like(self, std::move(out));
}

Value zfill(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"width"}, "zfill");
  const std::string& text = self.as_string();
  const int64_t missing = integer_or(values[0], 0, "zfill") - static_cast<int64_t>(count_code_points(text));
  if (missing <= 0) return self;
  interpreter.check_size(static_cast<uint64_t>(missing));
  const size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+') ? 1 : 0;
  return interpreter.text(text.substr(0, sign) + std::string(static_cast<size_t>(missing), '0') + text.substr(sign));
}

template <bool AtStart>
Value remove_affix(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"affix"}, "removeprefix");
  const std::string affix = text_or(values[0], "", "removeprefix");
  const std::string& text = self.as_string();
  if (affix.empty() || !(AtStart ? text.starts_with(affix) : text.ends_with(affix))) return self;
  return interpreter.text(AtStart ? text.substr(affix.size()) : text.substr(0, text.size() - affix.size()));
}

template <bool FromLeft>
Value partition(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"sep"}, "partition");
  const std::string separator = text_or(values[0], "", "partition");
  if (separator.empty()) interpreter.fail("ValueError", "empty separator");
  const std::string& text = self.as_string();
  const size_t found = FromLeft ? text.find(separator) : text.rfind(separator);
  std::string parts[3] = {FromLeft ? text : "", "", FromLeft ? "" : text};
  if (found != std::string::npos) {
    parts[0] = text.substr(0, found);
    parts[1] = separator;
    parts[2] = text.substr(found + separator.size());
  }
  List items;
  for (std::string& part : parts) items.push_back(interpreter.text(std::move(part)));
  return interpreter.list(std::move(items), ListKind::tuple);
}

std::string swap_case(std::string_view text) {
  std::string out;
  for (const std::string_view c : split_code_points(text)) {
    const std::string up = to_upper(c);
    out += up == c ? to_lower(c) : up;
  }
  return out;
}

// ---- dict

Value dict_get(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"key", "default"}, "get");
  if (!values[0]) interpreter.fail("TypeError", "get expected at least 1 argument, got 0");
  const Value* found = self.as_dict().find(*values[0]);
  return found != nullptr ? *found : values[1].value_or(Value());
}

Value dict_items(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "items");
  List items;
  items.reserve(self.as_dict().entries.size());
  for (const auto& [key, value] : self.as_dict().entries)
    items.push_back(interpreter.list({key, value}, ListKind::tuple));
  return interpreter.list(std::move(items), ListKind::view);
}

Value dict_keys(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "keys");
  return interpreter.list(self.iterate(), ListKind::view);
}

Value dict_values(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "values");
  List items;
  for (const auto& entry : self.as_dict().entries) items.push_back(entry.second);
  return interpreter.list(std::move(items), ListKind::view);
}

Value copy(Interpreter&, const Value& self, Arguments& arguments) {
  bind(arguments, {}, "copy");
  return self;  // nothing changes it
}

// ---- list and tuple

Value list_index(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"value"}, "index");
  const List& items = self.as_list();
  interpreter.step(self.extent().weight / 64);
  for (size_t i = 0; values[0] && i < items.size(); ++i)
    if (equal(items[i], *values[0])) return Value::integer(static_cast<int64_t>(i));
  interpreter.fail("ValueError", "the value is not in the list");
}

Value list_count(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const auto values = bind(arguments, {"value"}, "count");
  const List& items = self.as_list();
  interpreter.step(self.extent().weight / 64);
  return Value::integer(
      std::count_if(items.begin(), items.end(), [&](const Value& v) { return values[0] && equal(v, *values[0]); }));
}

// ---- float

Value real_is_integer(Interpreter&, const Value& self, Arguments&) {
  return Value::boolean(std::isfinite(self.as_real()) && std::floor(self.as_real()) == self.as_real());
}

struct MethodRow {
  std::string_view name;
  MethodFunction function;
};

constexpr MethodRow kStringMethods[] = {
    {"strip", stripped<StripSide::both>},
    {"lstrip", stripped<StripSide::left>},
    {"rstrip", stripped<StripSide::right>},
    {"split", split<true>},
    {"rsplit", split<false>},
    {"splitlines", splitlines},
    {"startswith", has_affix<true>},
    {"endswith", has_affix<false>},
    {"replace", replace},
    {"join", join},
    {"upper", mapped<to_upper>},
    {"lower", mapped<to_lower>},
    {"casefold", mapped<to_lower>},
    {"capitalize", mapped<capitalize>},
    {"title", mapped<title_case>},
    {"swapcase", mapped<swap_case>},
    {"find", find<true, false>},
    {"rfind", find<false, false>},
    {"index", find<true, true>},
    {"rindex", find<false, true>},
    {"count", count},
    {"format", format},
    {"isalpha", is_of<CharacterClass::alpha>},
    {"isalnum", is_of<CharacterClass::alnum>},
    {"isdigit", is_of<CharacterClass::digit>},
    {"isdecimal", is_of<CharacterClass::decimal>},
    {"isnumeric", is_of<CharacterClass::numeric>},
    {"isspace", is_of<CharacterClass::space>},
    {"isupper", is_of<CharacterClass::upper>},
    {"islower", is_of<CharacterClass::lower>},
    {"ljust", justified<'<'>},
    {"rjust", justified<'>'>},
    {"center", justified<'^'>},
    {"zfill", zfill},
    {"removeprefix", remove_affix<true>},
    {"removesuffix", remove_affix<false>},
    {"partition", partition<true>},
    {"rpartition", partition<false>},
};
constexpr MethodRow kDictMethods[] = {
    {"get", dict_get}, {"items", dict_items}, {"keys", dict_keys}, {"values", dict_values}, {"copy", copy}};
constexpr MethodRow kListMethods[] = {{"index", list_index}, {"count", list_count}, {"copy", copy}};
constexpr MethodRow kTupleMethods[] = {{"index", list_index}, {"count", list_count}};
constexpr MethodRow kRealMethods[] = {{"is_integer", real_is_integer}};

template <size_t N>
MethodFunction row_of(const MethodRow (&table)[N], std::string_view name) {
  for (const MethodRow& row : table)
    if (row.name == name) return row.function;
  return nullptr;
}

constexpr std::string_view kDictMutators[] = {"clear", "pop", "popitem", "setdefault", "update"};
constexpr std::string_view kListMutators[] = {"append", "clear",  "extend",  "insert",
                                              "pop",    "remove", "reverse", "sort"};

}  // namespace

MethodFunction find_method(const Value& self, std::string_view name) {
  if (self.is_string()) return row_of(kStringMethods, name);
  if (self.is_dict()) return row_of(kDictMethods, name);
  if (self.is_real()) return row_of(kRealMethods, name);
  if (!self.is_list()) return nullptr;
  if (self.list_kind() == ListKind::list) return row_of(kListMethods, name);
  return self.list_kind() == ListKind::tuple ? row_of(kTupleMethods, name) : nullptr;
}

bool is_mutating_method(const Value& self, std::string_view name) {
  const auto has = [&](const auto& table) {
    return std::find(std::begin(table), std::end(table), name) != std::end(table);
  };
  if (self.is_dict()) return has(kDictMutators);
  return self.is_list() && self.list_kind() == ListKind::list && has(kListMutators);
}

}  // namespace caravan::chat
