// The values that a template computes with: Python's None, bool, int, float, str, list, tuple, dict, and what Jinja
// adds (undefined, namespaces, macros). Strings, lists and dicts never change after they were built, so values are
// cheap to copy. Integers have 64 bits: a result beyond them is an OverflowError, where Python goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"

namespace caravan::chat {

// A template is malformed, or raised while it ran. kind() is the class that Jinja or Python names:
// "TemplateSyntaxError", "UndefinedError", "TypeError", "TemplateError" (raise_exception), ...; "LimitError" is ours.
class TemplateError : public Error {
 public:
  TemplateError(std::string kind, const std::string& message, uint32_t line = 0);
  const std::string& kind() const { return kind_; }
  // What the template or the interpreter said, without kind and line.
  const std::string& reason() const { return reason_; }
  uint32_t line() const { return line_; }  // 0: not known yet

 private:
  std::string kind_, reason_;
  uint32_t line_;
};

class Interpreter;
class Value;

// Arguments of a call.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// What is neither plain data nor a string: namespaces, loops, macros, functions.
class Object {
 public:
  virtual ~Object() = default;
  // What type(x).__name__ says.
  virtual std::string type_name() const = 0;
  // An attribute; nullopt where there is none.
  virtual std::optional<Value> attribute(std::string_view name) const;
  virtual bool callable() const { return false; }
  // Only where callable().
  virtual Value call(Interpreter& interpreter, Arguments& arguments) const;
  virtual std::string repr() const;
  // How deep the values nest that it owns; 0 for none.
  virtual uint32_t depth() const { return 0; }
};

// What a list-like value is in Python; it decides what may be done with it.
enum class ListKind {
  list,
  tuple,
  generator,  // can be walked through once, has no length
  view        // of a dict: has a length, cannot be indexed
};

struct StringData;
struct ListData;
struct DictData;
struct UndefinedData;

using List = std::vector<Value>;

class Value {
 public:
  Value() = default;  // None
  static Value boolean(bool value) { return Value(Data(value)); }
  static Value integer(int64_t value) { return Value(Data(value)); }
  static Value real(double value) { return Value(Data(value)); }
  static Value text(std::string text);
  // A string that says of itself that it is safe HTML (Markup): what is added to it gets escaped.
  static Value markup(std::string text);
  // Throws LimitError when values are nested too deep or weigh too much.
  static Value list(List items, ListKind kind = ListKind::list);
  // Throws LimitError when it owns values that are nested too deep.
  static Value object(std::shared_ptr<const Object> object);
  // message: what the error says when the value is used; kind: the error's.
  static Value undefined(std::string message, std::string kind = "UndefinedError");
  // Throws LimitError when the JSON is nested too deep.
  static Value from_json(const nlohmann::ordered_json& json);

  bool is_none() const { return std::holds_alternative<std::monostate>(data_); }
  bool is_boolean() const { return std::holds_alternative<bool>(data_); }
  bool is_integer() const { return std::holds_alternative<int64_t>(data_); }  // not for booleans
  bool is_real() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_integer() || is_real() || is_boolean(); }
  bool is_string() const { return std::holds_alternative<StringPointer>(data_); }
  bool is_markup() const;
  bool is_list() const { return std::holds_alternative<ListPointer>(data_); }  // any ListKind
  bool is_dict() const { return std::holds_alternative<DictPointer>(data_); }
  bool is_object() const { return std::holds_alternative<ObjectPointer>(data_); }
  bool is_undefined() const { return std::holds_alternative<UndefinedPointer>(data_); }

  // Each only for a value of that type.
  bool as_boolean() const { return std::get<bool>(data_); }
  int64_t as_integer() const;  // of an integer or boolean
  double as_real() const;      // of any number
  const std::string& as_string() const;
  // Items without regard to what was walked through before.
  const List& as_list() const;
  ListKind list_kind() const;
  const DictData& as_dict() const;
  const Object& as_object() const { return *std::get<ObjectPointer>(data_); }
  const std::shared_ptr<const Object>& object_pointer() const { return std::get<ObjectPointer>(data_); }
  const UndefinedData& as_undefined() const;

  // bool(x)
  bool truthy() const;
  // str(x); undefined gives "".
  std::string str() const;
  // repr(x)
  std::string repr() const;
  // "str", "list", ... as Python's type names.
  std::string type_name() const;
  // How deep lists and dicts are nested in this value, 0 for a scalar, and about how many bytes str() makes of it.
  // Shared parts count as often as they are reached.
  struct Extent {
    uint32_t depth = 0;
    uint64_t weight = 1;
  };
  Extent extent() const;
  // What iter(x) goes through: items, keys, characters. A generator gives what is left, and then is empty.
  // Throws TypeError where Python does.
  List iterate() const;
  bool iterable() const;
  // The next item of a generator, or the first of another iterable; nullopt where there is none.
  std::optional<Value> next() const;
  // len(x); nullopt where Python raises.
  std::optional<size_t> length() const;

 private:
  using StringPointer = std::shared_ptr<const StringData>;
  using ListPointer = std::shared_ptr<const ListData>;
  using DictPointer = std::shared_ptr<const DictData>;
  using ObjectPointer = std::shared_ptr<const Object>;
  using UndefinedPointer = std::shared_ptr<const UndefinedData>;
  using Data = std::variant<std::monostate, bool, int64_t, double, StringPointer, ListPointer, DictPointer,
                            ObjectPointer, UndefinedPointer>;
  explicit Value(Data data) : data_(std::move(data)) {}
  friend class DictBuilder;
  Data data_;
};

struct StringData {
  std::string text;
  bool markup = false;
};

struct ListData {
  List items;
  ListKind kind = ListKind::list;
  Value::Extent extent{1, 2};
  mutable size_t n_taken = 0;  // of a generator
};

struct UndefinedData {
  std::string message, kind;
};

// An insertion-ordered dict.
struct DictData {
  using Entry = std::pair<Value, Value>;
  std::vector<Entry> entries;
  Value::Extent extent{1, 2};
  std::unordered_multimap<uint64_t, size_t> index;  // by hash; only for larger dicts

  // nullptr where the key is absent.
  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
};

// Collects the entries of a dict; a key that comes again replaces the value and keeps its place.
class DictBuilder {
 public:
  // Throws TypeError for a key that Python cannot hash, LimitError as Value::list() does.
  void set(const Value& key, Value value);
  size_t size() const { return data_->entries.size(); }
  Value build();

 private:
  std::shared_ptr<DictData> data_ = std::make_shared<DictData>();
};

// a == b
bool equal(const Value& a, const Value& b);
// a < b; throws TypeError where Python does.
bool less(const Value& a, const Value& b);
// item in container; throws TypeError where Python does.
bool contains(const Value& container, const Value& item);

// Sorts in place, stable, with less() on keys[i] for items[i].
void sort_by_keys(List& items, List& keys, bool reverse);

struct JsonFormat {
  bool ensure_ascii = false, sort_keys = false;
  std::optional<std::string> indent;  // per level; set: one item per line
  std::string item_separator = ", ", key_separator = ": ";
};
// json.dumps; throws TypeError for what has no JSON form.
std::string to_json(const Value& value, const JsonFormat& format = {});

// repr of a float.
std::string real_repr(double value);

}  // namespace caravan::chat
