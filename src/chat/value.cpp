#include "chat/value.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>

#include "chat/text.h"

namespace caravan::chat {
namespace {

constexpr uint32_t kMaxDepth = 256;        // of nested lists and dicts
constexpr uint64_t kMaxWeight = 64 << 20;  // of one of them, in bytes of its text
constexpr size_t kLargestUnindexed = 8;    // dicts up to this size are searched one by one

[[noreturn]] void type_error(const std::string& message) { throw TemplateError("TypeError", message); }

void check_depth(uint32_t depth) {
  if (depth > kMaxDepth) throw TemplateError("LimitError", fmt::format("values nested more than {} deep", kMaxDepth));
}

// The extent of a container once `part` is in it.
void extend(Value::Extent& whole, const Value& part) {
  const Value::Extent extent = part.extent();
  whole.depth = std::max(whole.depth, extent.depth + 1);
  whole.weight += extent.weight + 2;
  check_depth(whole.depth);
  if (whole.weight > kMaxWeight)
    throw TemplateError("LimitError", fmt::format("a value of more than {} bytes", kMaxWeight));
}

// Equal keys have equal hashes: 1, 1.0 and True are one key.
uint64_t hash_of(const Value& key) {
  if (key.is_string()) return std::hash<std::string_view>()(key.as_string());
  if (key.is_none()) return 1;
  if (key.is_number()) return std::hash<double>()(key.as_real());
  if (key.is_object()) return std::hash<const void*>()(&key.as_object());
  if (key.is_list() && key.list_kind() == ListKind::tuple) {
    uint64_t hash = 7;
    for (const Value& item : key.as_list()) hash = hash * 31 + hash_of(item);
    return hash;
  }
  if (key.is_undefined()) return 2;
  type_error(fmt::format("unhashable type: '{}'", key.type_name()));
}

bool lists_equal(const List& a, const List& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Value& x, const Value& y) { return equal(x, y); });
}

bool dicts_equal(const DictData& a, const DictData& b) {
  if (a.entries.size() != b.entries.size()) return false;
  return std::all_of(a.entries.begin(), a.entries.end(), [&](const DictData::Entry& entry) {
    const Value* other = b.find(entry.first);
    return other != nullptr && equal(entry.second, *other);
  });
}

bool numbers_equal(const Value& a, const Value& b) {
  if (!a.is_real() && !b.is_real()) return a.as_integer() == b.as_integer();
  return a.as_real() == b.as_real();
}

std::string list_repr(const Value& value) {
  const ListKind kind = value.list_kind();
  if (kind == ListKind::generator) return "<generator object>";
  const List& items = value.as_list();
  std::string out = kind == ListKind::tuple ? "(" : kind == ListKind::view ? "dict_view([" : "[";
  for (size_t i = 0; i < items.size(); ++i) out += (i > 0 ? ", " : "") + items[i].repr();
  if (kind == ListKind::tuple) return out + (items.size() == 1 ? ",)" : ")");
  return out + (kind == ListKind::view ? "])" : "]");
}

std::string dict_repr(const DictData& dict) {
  std::string out = "{";
  for (const auto& [key, value] : dict.entries) out += (out.size() > 1 ? ", " : "") + key.repr() + ": " + value.repr();
  return out + "}";
}

class JsonWriter {
 public:
  explicit JsonWriter(const JsonFormat& format) : format_(format) {}

  void write(const Value& value, size_t level) {
    if (value.is_none()) {
      out_ += "null";
    } else if (value.is_boolean()) {
      out_ += value.as_boolean() ? "true" : "false";
    } else if (value.is_number()) {
      out_ += value.is_integer() ? std::to_string(value.as_integer()) : number(value.as_real());
    } else if (value.is_string()) {
      write_string(value.as_string());
    } else if (value.is_list() && value.list_kind() != ListKind::generator && value.list_kind() != ListKind::view) {
      write_list(value.as_list(), level);
    } else if (value.is_dict()) {
      write_dict(value.as_dict(), level);
    } else {
      type_error(fmt::format("Object of type {} is not JSON serializable", value.type_name()));
    }
  }
  std::string take() { return std::move(out_); }

 private:
  static std::string number(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
    return real_repr(value);
  }

  void new_line(size_t level) {
    if (!format_.indent) return;
    out_ += '\n';
    for (size_t i = 0; i < level; ++i) out_ += *format_.indent;
  }

  void write_list(const List& items, size_t level) {
    out_ += '[';
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += format_.item_separator;
      new_line(level + 1);
      write(items[i], level + 1);
    }
    if (!items.empty()) new_line(level);
    out_ += ']';
  }

  static std::string key_text(const Value& key) {
    if (key.is_string()) return key.as_string();
    if (key.is_none()) return "null";
    if (key.is_boolean()) return key.as_boolean() ? "true" : "false";
    if (key.is_integer()) return std::to_string(key.as_integer());
    if (key.is_real()) return number(key.as_real());
    type_error(fmt::format("keys must be str, int, float, bool or None, not {}", key.type_name()));
  }

  void write_dict(const DictData& dict, size_t level) {
    std::vector<const DictData::Entry*> entries;
    for (const DictData::Entry& entry : dict.entries) entries.push_back(&entry);
    if (format_.sort_keys) {
      List keys, order;
      for (size_t i = 0; i < entries.size(); ++i) {
        keys.push_back(entries[i]->first);
        order.push_back(Value::integer(static_cast<int64_t>(i)));
      }
      sort_by_keys(order, keys, false);
      for (size_t i = 0; i < order.size(); ++i) entries[i] = &dict.entries[static_cast<size_t>(order[i].as_integer())];
    }
    out_ += '{';
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out_ += format_.item_separator;
      new_line(level + 1);
      write_string(key_text(entries[i]->first));
      out_ += format_.key_separator;
      write(entries[i]->second, level + 1);
    }
    if (!entries.empty()) new_line(level);
    out_ += '}';
  }

  void write_escaped(char32_t c) {
    if (c >= 0x10000) {
      c -= 0x10000;
      out_ += fmt::format("\\u{:04x}\\u{:04x}", static_cast<uint32_t>(0xD800 + (c >> 10)),
                          static_cast<uint32_t>(0xDC00 + (c & 0x3FF)));
    } else {
      out_ += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    }
  }

  void write_string(std::string_view text) {
    out_ += '"';
    for (size_t at = 0; at < text.size();) {
      const unsigned char byte = static_cast<unsigned char>(text[at]);
      if (byte >= 0x80) {
        const CodePoint c = code_point_at(text, at);
        if (format_.ensure_ascii) {
          write_escaped(c.value);
        } else {
          out_ += text.substr(at, c.size);
        }
        at += c.size;
        continue;
      }
      ++at;
      constexpr std::string_view kShort = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
      const size_t found = kShort.find(static_cast<char>(byte));
      if (found != std::string_view::npos) {
        out_ += '\\';
        out_ += kLetters[found];
      } else if (byte < 0x20) {
        write_escaped(byte);
      } else {
        out_ += static_cast<char>(byte);
      }
    }
    out_ += '"';
  }

  const JsonFormat& format_;
  std::string out_;
};

}  // namespace

TemplateError::TemplateError(std::string kind, const std::string& message, uint32_t line)
    : Error(line > 0 ? fmt::format("chat template, line {}: {}: {}", line, kind, message)
                     : fmt::format("chat template: {}: {}", kind, message)),
      kind_(std::move(kind)),
      reason_(message),
      line_(line) {}

std::optional<Value> Object::attribute(std::string_view) const { return std::nullopt; }
Value Object::call(Interpreter&, Arguments&) const { type_error(fmt::format("{} is not callable", type_name())); }
std::string Object::repr() const { return "<" + type_name() + ">"; }

Value Value::text(std::string text) {
  return Value(Data(std::make_shared<StringData>(StringData{std::move(text), false})));
}

Value Value::markup(std::string text) {
  return Value(Data(std::make_shared<StringData>(StringData{std::move(text), true})));
}

Value Value::list(List items, ListKind kind) {
  Extent extent{1, 2};
  for (const Value& item : items) extend(extent, item);
  return Value(Data(std::make_shared<ListData>(ListData{std::move(items), kind, extent})));
}

Value Value::object(std::shared_ptr<const Object> object) {
  check_depth(object->depth());
  return Value(Data(std::move(object)));
}

Value Value::undefined(std::string message, std::string kind) {
  return Value(Data(std::make_shared<UndefinedData>(UndefinedData{std::move(message), std::move(kind)})));
}

namespace {

Value json_value(const nlohmann::ordered_json& json, uint32_t depth) {
  check_depth(depth);
  if (json.is_boolean()) return Value::boolean(json.get<bool>());
  if (json.is_number_unsigned() && json.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
    return Value::real(json.get<double>());
  if (json.is_number_integer()) return Value::integer(json.get<int64_t>());
  if (json.is_number_float()) return Value::real(json.get<double>());
  if (json.is_string()) return Value::text(json.get_ref<const std::string&>());
  if (json.is_array()) {
    List items;
    items.reserve(json.size());
    for (const auto& item : json) items.push_back(json_value(item, depth + 1));
    return Value::list(std::move(items));
  }
  if (!json.is_object()) return {};
  DictBuilder dict;
  for (const auto& [key, value] : json.items()) dict.set(Value::text(key), json_value(value, depth + 1));
  return dict.build();
}

}  // namespace

Value Value::from_json(const nlohmann::ordered_json& json) { return json_value(json, 0); }

bool Value::is_markup() const { return is_string() && std::get<StringPointer>(data_)->markup; }
int64_t Value::as_integer() const { return is_boolean() ? as_boolean() : std::get<int64_t>(data_); }
double Value::as_real() const { return is_real() ? std::get<double>(data_) : static_cast<double>(as_integer()); }
const std::string& Value::as_string() const { return std::get<StringPointer>(data_)->text; }
const List& Value::as_list() const { return std::get<ListPointer>(data_)->items; }
ListKind Value::list_kind() const { return std::get<ListPointer>(data_)->kind; }
const DictData& Value::as_dict() const { return *std::get<DictPointer>(data_); }
const UndefinedData& Value::as_undefined() const { return *std::get<UndefinedPointer>(data_); }

bool Value::truthy() const {
  if (is_none() || is_undefined()) return false;
  if (is_real()) return as_real() != 0;
  if (is_number()) return as_integer() != 0;
  if (is_string()) return !as_string().empty();
  if (is_list()) return list_kind() == ListKind::generator || !as_list().empty();
  if (is_dict()) return !as_dict().entries.empty();
  return true;
}

std::string Value::str() const {
  if (is_string()) return as_string();
  return is_undefined() ? std::string() : repr();
}

std::string Value::repr() const {
  if (is_none()) return "None";
  if (is_boolean()) return as_boolean() ? "True" : "False";
  if (is_integer()) return std::to_string(as_integer());
  if (is_real()) return real_repr(as_real());
  if (is_string()) return is_markup() ? "Markup(" + quote(as_string()) + ")" : quote(as_string());
  if (is_list()) return list_repr(*this);
  if (is_dict()) return dict_repr(as_dict());
  return is_undefined() ? "Undefined" : as_object().repr();
}

std::string Value::type_name() const {
  if (is_none()) return "NoneType";
  if (is_boolean()) return "bool";
  if (is_integer()) return "int";
  if (is_real()) return "float";
  if (is_string()) return is_markup() ? "Markup" : "str";
  if (is_dict()) return "dict";
  if (is_undefined()) return "Undefined";
  if (is_object()) return as_object().type_name();
  switch (list_kind()) {
    case ListKind::tuple:
      return "tuple";
    case ListKind::generator:
      return "generator";
    case ListKind::view:
      return "dict_view";
    case ListKind::list:
      break;
  }
  return "list";
}

Value::Extent Value::extent() const {
  if (is_list()) return std::get<ListPointer>(data_)->extent;
  if (is_dict()) return as_dict().extent;
  if (is_object()) return {as_object().depth(), 64};
  return {0, is_string() ? as_string().size() + 2 : 8};
}

bool Value::iterable() const { return is_list() || is_dict() || is_string() || is_undefined(); }

List Value::iterate() const {
  List items;
  if (is_list()) {
    const ListData& data = *std::get<ListPointer>(data_);
    if (data.kind != ListKind::generator) return data.items;
    items.assign(data.items.begin() + static_cast<ptrdiff_t>(data.n_taken), data.items.end());
    data.n_taken = data.items.size();
  } else if (is_dict()) {
    for (const auto& entry : as_dict().entries) items.push_back(entry.first);
  } else if (is_string()) {
    for (const std::string_view c : split_code_points(as_string())) items.push_back(text(std::string(c)));
  } else if (!is_undefined()) {
    type_error(fmt::format("'{}' object is not iterable", type_name()));
  }
  return items;
}

std::optional<Value> Value::next() const {
  if (is_list()) {
    const ListData& data = *std::get<ListPointer>(data_);
    const size_t at = data.kind == ListKind::generator ? data.n_taken++ : 0;
    if (at < data.items.size()) return data.items[at];
    data.n_taken = std::min(data.n_taken, data.items.size());
    return std::nullopt;
  }
  if (is_dict()) return as_dict().entries.empty() ? std::nullopt : std::optional(as_dict().entries.front().first);
  const List items = iterate();
  return items.empty() ? std::nullopt : std::optional(items.front());
}

std::optional<size_t> Value::length() const {
  if (is_string()) return count_code_points(as_string());
  if (is_list() && list_kind() != ListKind::generator) return as_list().size();
  if (is_dict()) return as_dict().entries.size();
  if (is_undefined()) return 0;
  return std::nullopt;
}

const Value* DictData::find(const Value& key) const {
  if (key.is_string()) return find(key.as_string());
  const uint64_t hash = hash_of(key);
  if (index.empty()) {
    for (const Entry& entry : entries)
      if (equal(entry.first, key)) return &entry.second;
    return nullptr;
  }
  for (auto [it, end] = index.equal_range(hash); it != end; ++it)
    if (equal(entries[it->second].first, key)) return &entries[it->second].second;
  return nullptr;
}

const Value* DictData::find(std::string_view key) const {
  const auto matches = [&](const Entry& entry) { return entry.first.is_string() && entry.first.as_string() == key; };
  if (index.empty()) {
    for (const Entry& entry : entries)
      if (matches(entry)) return &entry.second;
    return nullptr;
  }
  for (auto [it, end] = index.equal_range(std::hash<std::string_view>()(key)); it != end; ++it)
    if (matches(entries[it->second])) return &entries[it->second].second;
  return nullptr;
}

void DictBuilder::set(const Value& key, Value value) {
  const uint64_t hash = hash_of(key);
  DictData& dict = *data_;
  extend(dict.extent, key);
  extend(dict.extent, value);
  if (const Value* known = dict.find(key)) {
    const_cast<Value&>(*known) = std::move(value);  // an entry of our own dict, not yet shared
    return;
  }
  dict.entries.emplace_back(key, std::move(value));
  if (!dict.index.empty()) {
    dict.index.emplace(hash, dict.entries.size() - 1);
  } else if (dict.entries.size() > kLargestUnindexed) {
    for (size_t i = 0; i < dict.entries.size(); ++i) dict.index.emplace(hash_of(dict.entries[i].first), i);
  }
}

Value DictBuilder::build() { return Value(Value::Data(Value::DictPointer(std::exchange(data_, nullptr)))); }

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return numbers_equal(a, b);
  if (a.is_string() && b.is_string()) return a.as_string() == b.as_string();
  if (a.is_none() || b.is_none()) return a.is_none() && b.is_none();
  if (a.is_undefined() && b.is_undefined()) return true;
  if (a.is_list() && b.is_list())
    return a.list_kind() == b.list_kind() && a.list_kind() != ListKind::generator &&
           lists_equal(a.as_list(), b.as_list());
  if (a.is_dict() && b.is_dict()) return dicts_equal(a.as_dict(), b.as_dict());
  return a.is_object() && b.is_object() && &a.as_object() == &b.as_object();
}

bool less(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number())
    return a.is_real() || b.is_real() ? a.as_real() < b.as_real() : a.as_integer() < b.as_integer();
  if (a.is_string() && b.is_string()) return a.as_string() < b.as_string();  // UTF-8 keeps the order of code points
  for (const Value* v : {&a, &b})
    if (v->is_undefined()) throw TemplateError(v->as_undefined().kind, v->as_undefined().message);
  if (a.is_list() && b.is_list() && a.list_kind() == b.list_kind() &&
      (a.list_kind() == ListKind::list || a.list_kind() == ListKind::tuple)) {
    const List &x = a.as_list(), &y = b.as_list();
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i)
      if (!equal(x[i], y[i])) return less(x[i], y[i]);
    return x.size() < y.size();
  }
  type_error(fmt::format("'<' not supported between instances of '{}' and '{}'", a.type_name(), b.type_name()));
}

bool contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    if (!item.is_string())
      type_error(fmt::format("'in <string>' requires string as left operand, not {}", item.type_name()));
    return container.as_string().find(item.as_string()) != std::string::npos;
  }
  if (container.is_dict()) return container.as_dict().find(item) != nullptr;
  if (!container.iterable()) type_error(fmt::format("argument of type '{}' is not iterable", container.type_name()));
  if (container.is_list() && container.list_kind() != ListKind::generator) {
    const List& items = container.as_list();
    return std::any_of(items.begin(), items.end(), [&](const Value& x) { return equal(x, item); });
  }
  while (container.is_list()) {
    const auto next = container.next();
    if (!next) break;
    if (equal(*next, item)) return true;
  }
  return false;
}

void sort_by_keys(List& items, List& keys, bool reverse) {
  // A merge sort of positions: stable, and no order of the keys can break it, not even that of a NaN.
  std::vector<size_t> order(items.size()), merged(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t width = 1; width < order.size(); width *= 2) {
    for (size_t begin = 0; begin < order.size(); begin += 2 * width) {
      const size_t middle = std::min(begin + width, order.size()), end = std::min(begin + 2 * width, order.size());
      size_t left = begin, right = middle;
      for (size_t out = begin; out < end; ++out) {
        bool take_right = left == middle;
        if (!take_right && right < end) {
          const Value &l = keys[order[left]], &r = keys[order[right]];
          take_right = reverse ? less(l, r) : less(r, l);
        }
        merged[out] = take_right ? order[right++] : order[left++];
      }
    }
    order.swap(merged);
  }
  List sorted;
  sorted.reserve(items.size());
  for (const size_t i : order) sorted.push_back(std::move(items[i]));
  items = std::move(sorted);
}

std::string to_json(const Value& value, const JsonFormat& format) {
  JsonWriter writer(format);
  writer.write(value, 0);
  return writer.take();
}

std::string real_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char digits[64];
  // The shortest digits that read back; Python changes to an exponent below 1e-4 and from 1e16 on.
  const double magnitude = std::fabs(value);
  const bool exponent = magnitude != 0 && (magnitude < 1e-4 || magnitude >= 1e16);
  const auto format = exponent ? std::chars_format::scientific : std::chars_format::fixed;
  const auto end = std::to_chars(digits, digits + sizeof digits, value, format);
  std::string text(digits, end.ptr);
  if (!exponent && text.find('.') == std::string::npos) text += ".0";
  return text;
}

}  // namespace caravan::chat
