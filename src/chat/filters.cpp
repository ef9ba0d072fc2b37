// Filters: {{ x | name }}. As Jinja2 3.1's, with the tojson of Hugging Face's templates (json.dumps without ASCII
// escapes).
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "chat/builtins.h"
#include "chat/interpreter.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

void no_arguments(Arguments& arguments, const char* what) { bind(arguments, {}, what); }

List items_of(Interpreter& interpreter, const Value& value) {
  List items = value.iterate();
  interpreter.charge_bytes(items.size() * sizeof(Value));
  return items;
}

// What a filter for strings sees of any value.
Value as_text(Interpreter& interpreter, const Value& value) {
  if (value.is_string()) return value;
  interpreter.charge_bytes(value.extent().weight);
  return interpreter.text(value.str());
}

// ---- strings

template <std::string (*F)(std::string_view)>
Value mapped(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "filter");
  const Value text = as_text(interpreter, input);
  return interpreter.text_like(text, F(text.as_string()));
}

// Jinja's title differs from Python's: a word begins after white space, '-', or an opening bracket only.
std::string title_words(std::string_view text) {
  std::string out;
  bool begin = true;
  for (const std::string_view c : split_code_points(text)) {
    const bool boundary = is_space(code_point_at(c, 0).value) ||
                          (c.size() == 1 && std::string_view("-({[<").find(c) != std::string_view::npos);
    out += boundary ? std::string(c) : begin ? to_upper(c) : to_lower(c);
    begin = boundary;
  }
  return out;
}

Value to_string(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "string");
  return as_text(interpreter, input);
}

Value trim(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"chars"}, "trim");
  const Value text = as_text(interpreter, input);
  if (!values[0] || values[0]->is_none())
    return interpreter.text_like(text, std::string(strip(text.as_string(), StripSide::both)));
  const std::string chars = text_or(values[0], "", "trim");
  return interpreter.text_like(text, std::string(strip(text.as_string(), StripSide::both, chars)));
}

Value replace(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"old", "new", "count"}, "replace");
  if (!values[0] || !values[1]) interpreter.fail("TypeError", "replace: missing arguments");
  Arguments call;
  call.positional = {as_text(interpreter, *values[0]), as_text(interpreter, *values[1])};
  if (values[2] && !values[2]->is_none()) call.positional.push_back(*values[2]);
  const Value text = as_text(interpreter, input);
  return find_method(text, "replace")(interpreter, text, call);
}

Value safe(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "safe");
  return input.is_markup() ? input : Value::markup(as_text(interpreter, input).as_string());
}

Value escape(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "escape");
  return input.is_markup() ? input : Value::markup(escape_html(as_text(interpreter, input).as_string()));
}

Value force_escape(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "forceescape");
  return Value::markup(escape_html(as_text(interpreter, input).as_string()));
}

Value format(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  if (!arguments.named.empty()) {
    if (!arguments.positional.empty())
      interpreter.fail("FilterArgumentError", "format takes positional or keyword arguments, not both");
    DictBuilder dict;
    for (auto& [name, value] : arguments.named) dict.set(Value::text(name), std::move(value));
    return percent_format(interpreter, as_text(interpreter, input), dict.build());
  }
  return percent_format(interpreter, as_text(interpreter, input),
                        interpreter.list(std::move(arguments.positional), ListKind::tuple));
}

// The indentation that a number of spaces or a string stands for.
std::string indentation(Interpreter& interpreter, const std::optional<Value>& width, int64_t otherwise) {
  if (width && width->is_string()) return width->as_string();
  const int64_t n = integer_or(width, otherwise, "indent");
  if (n > (1 << 16)) interpreter.fail("LimitError", "an indentation beyond 65536");
  return std::string(static_cast<size_t>(std::max<int64_t>(n, 0)), ' ');
}

Value indent(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"width", "first", "blank"}, "indent");
  const std::string space = indentation(interpreter, values[0], 4);
  const bool first = boolean_or(values[1], false), blank = boolean_or(values[2], false);
  const Value source = as_text(interpreter, input);
  const std::string text = source.as_string() + "\n";  // as Jinja: a last line end stays
  std::string out;
  bool at_first = true;
  for (const std::string_view line : split_lines(text)) {
    if (!at_first) out += '\n';
    if (at_first ? first : blank || !line.empty()) out += space;
    out += line;
    at_first = false;
    interpreter.check_size(out.size());
  }
  return interpreter.text_like(source, std::move(out));
}

Value center(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"width"}, "center");
  Arguments call;
  call.positional = {Value::integer(integer_or(values[0], 80, "center"))};
  const Value text = as_text(interpreter, input);
  return find_method(text, "center")(interpreter, text, call);
}

Value truncate(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"length", "killwords", "end", "leeway"}, "truncate");
  const int64_t length = integer_or(values[0], 255, "truncate"), leeway = integer_or(values[3], 5, "truncate");
  const std::string end = text_or(values[2], "...", "truncate");
  const Value source = as_text(interpreter, input);
  const auto characters = split_code_points(source.as_string());
  const auto n_end = static_cast<int64_t>(count_code_points(end));
  if (length < n_end || leeway < 0) interpreter.fail("AssertionError", "truncate: impossible length or leeway");
  if (static_cast<int64_t>(characters.size()) <= length || static_cast<int64_t>(characters.size()) - length <= leeway)
    return source;
  std::string kept;
  for (int64_t i = 0; i < length - n_end; ++i) kept += characters[static_cast<size_t>(i)];
  if (!boolean_or(values[1], false)) kept.resize(std::min(kept.rfind(' '), kept.size()));
  return interpreter.text_like(source, kept + end);
}

Value word_count(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "wordcount");
  const Value source = as_text(interpreter, input);
  int64_t n = 0;
  bool inside = false;
  for (const std::string_view c : split_code_points(source.as_string())) {
    const bool word = c == "_" || consists_of(c, CharacterClass::alnum);
    n += word && !inside ? 1 : 0;
    inside = word;
  }
  return Value::integer(n);
}

void append_percent(std::string& out, std::string_view text, bool keep_slash) {
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::string_view("_.-~").find(c) != std::string_view::npos || (keep_slash && c == '/');
    out += plain ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
}

Value url_encode(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "urlencode");
  std::string out;
  if (input.is_string() || !input.iterable()) {
    append_percent(out, as_text(interpreter, input).as_string(), true);
    return interpreter.text(std::move(out));
  }
  for (const Value& entry : items_of(interpreter, input)) {
    const List pair = input.is_dict() ? List{entry, *input.as_dict().find(entry)} : entry.iterate();
    if (pair.size() != 2) interpreter.fail("ValueError", "urlencode: expected pairs");
    if (!out.empty()) out += '&';
    append_percent(out, pair[0].str(), false);
    out += '=';
    append_percent(out, pair[1].str(), false);
  }
  return interpreter.text(std::move(out));
}

// ---- numbers

Value absolute(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "abs");
  interpreter.require_defined(input);
  if (!input.is_number())
    interpreter.fail("TypeError", fmt::format("bad operand type for abs(): '{}'", input.type_name()));
  if (input.is_real()) return Value::real(std::fabs(input.as_real()));
  return input.as_integer() < 0 ? interpreter.binary(BinaryOp::subtract, Value::integer(0), input)
                                : Value::integer(input.as_integer());
}

// int(text, base); nullopt where Python raises ValueError.
std::optional<int64_t> parse_integer(std::string_view text, int base) {
  text = strip(text, StripSide::both);
  std::string digits;
  for (size_t i = 0; i < text.size(); ++i)
    if (text[i] != '_') digits += text[i];
  const bool negative = !digits.empty() && digits[0] == '-';
  if (!digits.empty() && (digits[0] == '-' || digits[0] == '+')) digits.erase(0, 1);
  if (digits.size() > 2 && digits[0] == '0' && (base == 16 || base == 8 || base == 2)) {
    const char letter = static_cast<char>(digits[1] | 0x20);
    if (letter == (base == 16 ? 'x' : base == 8 ? 'o' : 'b')) digits.erase(0, 2);
  }
  if (digits.empty() || digits[0] == '-') return std::nullopt;
  int64_t value = 0;
  const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (result.ec != std::errc() || result.ptr != digits.data() + digits.size()) return std::nullopt;
  return negative ? -value : value;
}

std::optional<double> parse_real(std::string_view text) {
  text = strip(text, StripSide::both);
  const bool negative = !text.empty() && text[0] == '-';
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  if (text.empty() || text[0] == '-') return std::nullopt;
  double value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ptr != text.data() + text.size() || result.ec == std::errc::invalid_argument) return std::nullopt;
  if (result.ec == std::errc::result_out_of_range) value = INFINITY;
  return negative ? -value : value;
}

std::optional<int64_t> truncated(double value) {
  if (!(std::fabs(value) < 9.2e18)) return std::nullopt;
  return static_cast<int64_t>(value);
}

Value to_integer(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"default", "base"}, "int");
  interpreter.require_defined(input);
  const int64_t base = integer_or(values[1], 10, "int");
  if (base < 2 || base > 36) interpreter.fail("ValueError", "int: base must be >= 2 and <= 36");
  std::optional<int64_t> value;
  if (input.is_string()) {
    value = parse_integer(input.as_string(), static_cast<int>(base));
    if (!value)
      if (const auto real = parse_real(input.as_string())) value = truncated(*real);
  } else if (input.is_number()) {
    value = input.is_real() ? truncated(input.as_real()) : std::optional(input.as_integer());
  }
  return value ? Value::integer(*value) : values[0].value_or(Value::integer(0));
}

Value to_real(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"default"}, "float");
  interpreter.require_defined(input);
  if (input.is_number()) return Value::real(input.as_real());
  const auto value = input.is_string() ? parse_real(input.as_string()) : std::nullopt;
  return value ? Value::real(*value) : values[0].value_or(Value::real(0));
}

Value round(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"precision", "method"}, "round");
  interpreter.require_defined(input);
  if (!input.is_number())
    interpreter.fail("TypeError", fmt::format("type {} doesn't define __round__", input.type_name()));
  const std::string method = text_or(values[1], "common", "round");
  const int64_t precision = std::clamp<int64_t>(integer_or(values[0], 0, "round"), -300, 300);
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double value = input.as_real();
  if (method == "ceil") return Value::real(std::ceil(value * scale) / scale);
  if (method == "floor") return Value::real(std::floor(value * scale) / scale);
  if (method != "common") interpreter.fail("FilterArgumentError", "method must be common, ceil or floor");
  if (!input.is_real() && precision >= 0) return Value::integer(input.as_integer());
  if (precision < 0) return Value::real(std::nearbyint(value * scale) / scale);
  double rounded = value;  // correctly rounded decimal digits, half to even, as Python's round
  const std::string digits = fmt::format("{:.{}f}", value, precision);
  std::from_chars(digits.data(), digits.data() + digits.size(), rounded);
  return Value::real(rounded);
}

// ---- items

// The value at "a.b.0" below a value, as the `attribute` argument of many filters means it.
Value at_path(Interpreter& interpreter, Value value, const Value& path) {
  if (path.is_integer()) return interpreter.subscript(value, path);
  const std::string text = path.str();  // outlives its parts
  for (const std::string_view part : split_at(text, ".", -1)) {
    const bool number =
        !part.empty() && std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    const auto index = number ? parse_integer(part, 10) : std::nullopt;
    value = interpreter.subscript(value, index ? Value::integer(*index) : Value::text(std::string(part)));
  }
  return value;
}

// What items are compared by: the attribute, in lower case unless case matters.
Value sort_key(Interpreter& interpreter, const Value& item, const std::optional<Value>& path, bool case_sensitive) {
  Value key = path && !path->is_none() ? at_path(interpreter, item, *path) : item;
  return key.is_string() && !case_sensitive ? Value::text(to_lower(key.as_string())) : key;
}

List sort_keys(Interpreter& interpreter, const List& items, const std::optional<Value>& path, bool case_sensitive) {
  List keys;
  keys.reserve(items.size());
  for (const Value& item : items) keys.push_back(sort_key(interpreter, item, path, case_sensitive));
  uint64_t n_levels = 1;
  while ((1ull << n_levels) < items.size()) ++n_levels;
  interpreter.step(items.size() * n_levels);
  return keys;
}

Value length(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "length");
  const auto n = input.length();
  if (!n) interpreter.fail("TypeError", fmt::format("object of type '{}' has no len()", input.type_name()));
  interpreter.step(input.is_string() ? *n / 64 : 0);
  return Value::integer(static_cast<int64_t>(*n));
}

Value first(Interpreter&, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "first");
  return input.next().value_or(Value::undefined("No first item, sequence was empty."));
}

Value last(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "last");
  if (input.is_list() && input.list_kind() == ListKind::generator)
    interpreter.fail("TypeError", "'generator' object is not reversible");
  const List items = items_of(interpreter, input);
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}

Value to_list(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "list");
  return interpreter.list(items_of(interpreter, input));
}

Value join(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"d", "attribute"}, "join");
  const std::string separator = values[0] ? values[0]->str() : "";
  std::string out;
  bool is_first = true;
  for (const Value& item : items_of(interpreter, input)) {
    const Value part = values[1] && !values[1]->is_none() ? at_path(interpreter, item, *values[1]) : item;
    if (!std::exchange(is_first, false)) out += separator;
    interpreter.check_size(out.size() + part.extent().weight);
    out += part.str();
  }
  return interpreter.text(std::move(out));
}

Value reverse(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "reverse");
  if (!input.iterable() || input.is_undefined() || (input.is_list() && input.list_kind() == ListKind::generator))
    interpreter.fail("FilterArgumentError", "argument must be iterable");
  List items = items_of(interpreter, input);
  std::reverse(items.begin(), items.end());
  if (!input.is_string()) return interpreter.list(std::move(items), ListKind::generator);
  std::string out;
  for (const Value& c : items) out += c.as_string();
  return interpreter.text_like(input, std::move(out));
}

Value sort(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"reverse", "case_sensitive", "attribute"}, "sort");
  List items = items_of(interpreter, input);
  std::vector<Value> paths;  // "a,b" sorts by a, then by b
  if (values[2] && values[2]->is_string()) {
    for (const std::string_view path : split_at(values[2]->as_string(), ",", -1))
      paths.push_back(Value::text(std::string(path)));
  } else if (values[2] && !values[2]->is_none()) {
    paths.push_back(*values[2]);
  }
  List keys;
  if (paths.size() <= 1) {
    keys = sort_keys(interpreter, items, paths.empty() ? std::nullopt : std::optional(paths[0]),
                     boolean_or(values[1], false));
  } else {
    for (const Value& item : items) {
      List parts;
      for (const Value& path : paths) parts.push_back(sort_key(interpreter, item, path, boolean_or(values[1], false)));
      keys.push_back(interpreter.list(std::move(parts)));
    }
  }
  sort_by_keys(items, keys, boolean_or(values[0], false));
  return interpreter.list(std::move(items));
}

Value dict_sort(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"case_sensitive", "by", "reverse"}, "dictsort");
  interpreter.require_defined(input);
  if (!input.is_dict())
    interpreter.fail("TypeError", fmt::format("dictsort: expected a dict, found {}", input.type_name()));
  const std::string by = text_or(values[1], "key", "dictsort");
  if (by != "key" && by != "value")
    interpreter.fail("FilterArgumentError", "You can only sort by either \"key\" or \"value\"");
  List items;
  for (const auto& [key, value] : input.as_dict().entries)
    items.push_back(interpreter.list({key, value}, ListKind::tuple));
  List keys = sort_keys(interpreter, items, Value::integer(by == "key" ? 0 : 1), boolean_or(values[0], false));
  sort_by_keys(items, keys, boolean_or(values[2], false));
  return interpreter.list(std::move(items));
}

Value dict_items(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  no_arguments(arguments, "items");
  if (input.is_undefined()) return interpreter.list({}, ListKind::generator);
  if (!input.is_dict()) interpreter.fail("TypeError", "Can only get item pairs from a mapping.");
  List items;
  for (const auto& [key, value] : input.as_dict().entries)
    items.push_back(interpreter.list({key, value}, ListKind::tuple));
  return interpreter.list(std::move(items), ListKind::generator);
}

Value unique(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"case_sensitive", "attribute"}, "unique");
  DictBuilder seen;
  List chosen;
  size_t n_seen = 0;
  for (const Value& item : items_of(interpreter, input)) {
    seen.set(sort_key(interpreter, item, values[1], boolean_or(values[0], false)), Value());
    if (seen.size() > n_seen) chosen.push_back(item);
    n_seen = seen.size();
  }
  return interpreter.list(std::move(chosen), ListKind::generator);
}

// min and max.
template <bool Smallest>
Value extreme(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"case_sensitive", "attribute"}, Smallest ? "min" : "max");
  const List items = items_of(interpreter, input);
  if (items.empty()) return Value::undefined("No aggregated item, sequence was empty.");
  const List keys = sort_keys(interpreter, items, values[1], boolean_or(values[0], false));
  size_t best = 0;
  for (size_t i = 1; i < items.size(); ++i)
    if (Smallest ? less(keys[i], keys[best]) : less(keys[best], keys[i])) best = i;
  return items[best];
}

Value sum(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"attribute", "start"}, "sum");
  Value total = values[1].value_or(Value::integer(0));
  for (const Value& item : items_of(interpreter, input))
    total = interpreter.binary(BinaryOp::add, total,
                               values[0] && !values[0]->is_none() ? at_path(interpreter, item, *values[0]) : item);
  return total;
}

Value group_by(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"attribute", "default", "case_sensitive"}, "groupby");
  if (!values[0]) interpreter.fail("TypeError", "groupby: missing attribute");
  List items = items_of(interpreter, input);
  const bool case_sensitive = boolean_or(values[2], false);
  const auto key_of = [&](const Value& item) {
    Value key = at_path(interpreter, item, *values[0]);
    return key.is_undefined() && values[1] ? *values[1] : key;
  };
  const auto compared = [&](const Value& key) {
    return key.is_string() && !case_sensitive ? Value::text(to_lower(key.as_string())) : key;
  };
  List keys;
  for (const Value& item : items) keys.push_back(compared(key_of(item)));
  sort_by_keys(items, keys, false);
  List groups, members;
  for (size_t i = 0; i < items.size(); ++i) {
    members.push_back(items[i]);
    if (i + 1 < items.size() && equal(compared(key_of(items[i])), compared(key_of(items[i + 1])))) continue;
    const Value name = key_of(members.front());
    groups.push_back(interpreter.list({name, interpreter.list(std::exchange(members, {}))}, ListKind::tuple));
  }
  return interpreter.list(std::move(groups));
}

Value batch(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"linecount", "fill_with"}, "batch");
  const int64_t size = integer_or(values[0], 0, "batch");
  List batches, row;
  for (const Value& item : items_of(interpreter, input)) {
    if (static_cast<int64_t>(row.size()) == size) batches.push_back(interpreter.list(std::exchange(row, {})));
    row.push_back(item);
  }
  if (!row.empty()) {
    if (values[1] && !values[1]->is_none()) {
      interpreter.check_size(size > INT32_MAX ? UINT64_MAX : static_cast<uint64_t>(size) * sizeof(Value));
      while (static_cast<int64_t>(row.size()) < size) row.push_back(*values[1]);
    }
    batches.push_back(interpreter.list(std::move(row)));
  }
  return interpreter.list(std::move(batches), ListKind::generator);
}

Value slice(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"slices", "fill_with"}, "slice");
  const int64_t n_slices = integer_or(values[0], 0, "slice");
  if (n_slices <= 0) interpreter.fail("ZeroDivisionError", "integer division or modulo by zero");
  if (n_slices > 100'000) interpreter.fail("LimitError", "slice: more than 100000 slices");
  const List items = items_of(interpreter, input);
  const size_t n = static_cast<size_t>(n_slices), each = items.size() / n, n_longer = items.size() % n;
  List slices;
  size_t at = 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t size = each + (i < n_longer ? 1 : 0);
    List part(items.begin() + static_cast<ptrdiff_t>(at), items.begin() + static_cast<ptrdiff_t>(at + size));
    at += size;
    if (values[1] && !values[1]->is_none() && i >= n_longer) part.push_back(*values[1]);
    slices.push_back(interpreter.list(std::move(part)));
  }
  return interpreter.list(std::move(slices), ListKind::generator);
}

// The arguments from the second on, for the filter or test that the first names.
Arguments rest_of(const Arguments& arguments, size_t n_taken) {
  Arguments rest;
  rest.positional.assign(arguments.positional.begin() + static_cast<ptrdiff_t>(n_taken), arguments.positional.end());
  rest.named = arguments.named;
  return rest;
}

const Value* named_argument(const Arguments& arguments, std::string_view name) {
  for (const auto& [key, value] : arguments.named)
    if (key == name) return &value;
  return nullptr;
}

Value map_attribute(Interpreter& interpreter, const List& items, const Arguments& arguments, const Value& path) {
  const Value* otherwise = named_argument(arguments, "default");
  for (const auto& named : arguments.named)
    if (named.first != "attribute" && named.first != "default")
      interpreter.fail("FilterArgumentError", fmt::format("map: unexpected keyword argument '{}'", named.first));
  List mapped_items;
  for (const Value& item : items) {
    Value value = at_path(interpreter, item, path);
    mapped_items.push_back(value.is_undefined() && otherwise != nullptr ? *otherwise : std::move(value));
  }
  return interpreter.list(std::move(mapped_items), ListKind::generator);
}

Value map(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const List items = input.truthy() ? items_of(interpreter, input) : List{};  // as Jinja: none maps to nothing
  if (arguments.positional.empty()) {
    const Value* path = named_argument(arguments, "attribute");
    if (path == nullptr) interpreter.fail("FilterArgumentError", "map requires a filter argument");
    return map_attribute(interpreter, items, arguments, *path);
  }
  const std::string name = arguments.positional[0].str();
  const FilterFunction filter = find_filter(name);
  if (filter == nullptr) interpreter.fail("TemplateAssertionError", fmt::format("no filter named '{}'", name));
  List mapped_items;
  for (const Value& item : items) {
    Arguments rest = rest_of(arguments, 1);
    interpreter.step();
    mapped_items.push_back(filter(interpreter, item, rest));
  }
  return interpreter.list(std::move(mapped_items), ListKind::generator);
}

// select, reject, selectattr, rejectattr.
template <bool ByAttribute, bool Keep>
Value choose(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  constexpr size_t kTestAt = ByAttribute ? 1 : 0;
  if (ByAttribute && arguments.positional.empty())
    interpreter.fail("FilterArgumentError", "Missing parameter for attribute name");
  TestFunction test = nullptr;
  if (arguments.positional.size() > kTestAt) {
    const std::string name = arguments.positional[kTestAt].str();
    test = find_test(name);
    if (test == nullptr) interpreter.fail("TemplateAssertionError", fmt::format("no test named '{}'", name));
  }
  List chosen;
  const List items = input.truthy() ? items_of(interpreter, input) : List{};  // as Jinja: none has no items
  for (const Value& item : items) {
    interpreter.step();
    const Value tested = ByAttribute ? at_path(interpreter, item, arguments.positional[0]) : item;
    Arguments rest = test != nullptr ? rest_of(arguments, kTestAt + 1) : Arguments{};
    if ((test != nullptr ? test(interpreter, tested, rest) : tested.truthy()) == Keep) chosen.push_back(item);
  }
  return interpreter.list(std::move(chosen), ListKind::generator);
}

// ---- others

Value default_value(Interpreter&, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"default_value", "boolean"}, "default");
  const bool replace_it = input.is_undefined() || (boolean_or(values[1], false) && !input.truthy());
  return replace_it ? values[0].value_or(Value::text("")) : input;
}

Value attribute(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"name"}, "attr");
  return interpreter.attribute(input, text_or(values[0], "", "attr"));
}

Value to_json_text(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"indent", "ensure_ascii", "separators", "sort_keys"}, "tojson");
  JsonFormat format;
  if (values[0] && !values[0]->is_none()) {
    format.indent = indentation(interpreter, values[0], 0);
    format.item_separator = ",";
  }
  format.ensure_ascii = boolean_or(values[1], false);
  format.sort_keys = boolean_or(values[3], false);
  if (values[2] && !values[2]->is_none()) {
    const List separators = values[2]->iterate();
    if (separators.size() != 2) interpreter.fail("ValueError", "tojson: separators are a pair of strings");
    format.item_separator = separators[0].str();
    format.key_separator = separators[1].str();
  }
  const uint64_t per_item = format.indent ? 4 * (format.indent->size() + 1) : 1;
  interpreter.check_size(input.extent().weight * per_item);
  return interpreter.text(to_json(input, format));
}

Value xml_attributes(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const auto values = bind(arguments, {"autospace"}, "xmlattr");
  if (!input.is_dict()) interpreter.fail("TypeError", "xmlattr: expected a dict");
  std::string out;
  for (const auto& [key, value] : input.as_dict().entries) {
    if (value.is_none() || value.is_undefined()) continue;
    if (!out.empty()) out += ' ';
    out += escape_html(key.str()) + "=\"" + escape_html(value.str()) + "\"";
  }
  return interpreter.text((!out.empty() && boolean_or(values[0], true) ? " " : "") + out);
}

struct FilterRow {
  std::string_view name;
  FilterFunction function;
};
constexpr FilterRow kFilters[] = {
    {"tojson", to_json_text},
    {"trim", trim},
    {"length", length},
    {"count", length},
    {"default", default_value},
    {"d", default_value},
    {"join", join},
    {"string", to_string},
    {"upper", mapped<to_upper>},
    {"lower", mapped<to_lower>},
    {"capitalize", mapped<capitalize>},
    {"title", mapped<title_words>},
    {"replace", replace},
    {"safe", safe},
    {"escape", escape},
    {"e", escape},
    {"forceescape", force_escape},
    {"format", format},
    {"indent", indent},
    {"center", center},
    {"truncate", truncate},
    {"wordcount", word_count},
    {"urlencode", url_encode},
    {"xmlattr", xml_attributes},
    {"abs", absolute},
    {"int", to_integer},
    {"float", to_real},
    {"round", round},
    {"first", first},
    {"last", last},
    {"list", to_list},
    {"reverse", reverse},
    {"sort", sort},
    {"dictsort", dict_sort},
    {"items", dict_items},
    {"unique", unique},
    {"min", extreme<true>},
    {"max", extreme<false>},
    {"sum", sum},
    {"groupby", group_by},
    {"batch", batch},
    {"slice", slice},
    {"map", map},
    {"select", choose<false, true>},
    {"reject", choose<false, false>},
    {"selectattr", choose<true, true>},
    {"rejectattr", choose<true, false>},
    {"attr", attribute},
};

}  // namespace

FilterFunction find_filter(std::string_view name) {
  for (const FilterRow& row : kFilters)
    if (row.name == name) return row.function;
  return nullptr;
}

}  // namespace caravan::chat
