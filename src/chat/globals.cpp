// Global functions, and how arguments are matched to parameters.
#include <fmt/format.h>

#include <algorithm>
#include <ctime>

#include "chat/builtins.h"
#include "chat/interpreter.h"

namespace caravan::chat {
namespace {

using GlobalFunction = Value (*)(Interpreter& interpreter, Arguments& arguments);

class Function : public Object {
 public:
  Function(const char* name, GlobalFunction function) : name_(name), function_(function) {}
  std::string type_name() const override { return "function"; }
  std::string repr() const override { return fmt::format("<function {}>", name_); }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) const override {
    return function_(interpreter, arguments);
  }

 private:
  const char* name_;
  GlobalFunction function_;
};

Value range(Interpreter& interpreter, Arguments& arguments) {
  constexpr int64_t kMaxLength = 100'000;  // as in Jinja's sandbox
  const auto n = arguments.positional.size();
  if (n < 1 || n > 3 || !arguments.named.empty()) interpreter.fail("TypeError", "range() takes 1 to 3 arguments");
  int64_t bounds[3] = {0, 0, 1};
  for (size_t i = 0; i < n; ++i) {
    const Value& v = arguments.positional[i];
    interpreter.require_defined(v);
    if (!v.is_integer() && !v.is_boolean())
      interpreter.fail("TypeError", fmt::format("'{}' object cannot be interpreted as an integer", v.type_name()));
    bounds[n == 1 ? 1 : i] = v.as_integer();
  }
  const auto [begin, end, step] = bounds;
  if (step == 0) interpreter.fail("ValueError", "range() arg 3 must not be zero");
  List items;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (static_cast<int64_t>(items.size()) >= kMaxLength)
      interpreter.fail("OverflowError", fmt::format("range of more than {} items", kMaxLength));
    items.push_back(Value::integer(i));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return interpreter.list(std::move(items));
}

Value make_dict(Interpreter& interpreter, Arguments& arguments) {
  DictBuilder dict;
  for (const Value& source : arguments.positional) {
    interpreter.require_defined(source);
    interpreter.charge_bytes(source.extent().weight);
    if (source.is_dict()) {
      for (const auto& [key, value] : source.as_dict().entries) dict.set(key, value);
    } else {
      for (const Value& item : source.iterate()) {
        const List pair = item.iterate();
        if (pair.size() != 2) interpreter.fail("ValueError", "dict() needs pairs of key and value");
        dict.set(pair[0], pair[1]);
      }
    }
  }
  for (auto& [name, value] : arguments.named) dict.set(Value::text(name), std::move(value));
  return dict.build();
}

Value make_namespace(Interpreter& interpreter, Arguments& arguments) {
  Value space = interpreter.new_namespace();
  const auto& as_namespace = dynamic_cast<const Namespace&>(space.as_object());
  const Value initial = make_dict(interpreter, arguments);
  for (const auto& [key, value] : initial.as_dict().entries) as_namespace.set(key.str(), value);
  return space;
}

Value raise_exception(Interpreter& interpreter, Arguments& arguments) {
  interpreter.fail("TemplateError", arguments.positional.empty() ? "raise_exception()" : arguments.positional[0].str());
}

Value strftime_now(Interpreter& interpreter, Arguments& arguments) {
  const auto values = bind(arguments, {"format"}, "strftime_now");
  std::string format = text_or(values[0], "%Y-%m-%d", "strftime_now");
  if (format.empty()) return interpreter.text("");
  format += ' ';  // an empty result cannot be told from one that did not fit
  for (std::string text(256, '\0'); text.size() <= (1 << 16); text.resize(text.size() * 4)) {
    const size_t n = strftime(text.data(), text.size(), format.c_str(), &interpreter.now());
    if (n == 0) continue;
    text.resize(n - 1);
    return interpreter.text(std::move(text));
  }
  interpreter.fail("ValueError", "strftime_now: the format gives a text that is too long");
}

// cycler(...): next(), reset(), current.
class Cycler : public Object, public std::enable_shared_from_this<Cycler> {
 public:
  explicit Cycler(Value items) : items_(std::move(items)) {}
  std::string type_name() const override { return "Cycler"; }
  uint32_t depth() const override { return items_.extent().depth + 1; }
  std::optional<Value> attribute(std::string_view name) const override;
  Value current() const { return items_.as_list()[at_]; }
  void advance() const { at_ = (at_ + 1) % items_.as_list().size(); }
  void reset() const { at_ = 0; }

 private:
  Value items_;
  mutable size_t at_ = 0;
};

class CyclerMethod : public Object {
 public:
  CyclerMethod(std::shared_ptr<const Cycler> cycler, bool is_next) : cycler_(std::move(cycler)), is_next_(is_next) {}
  std::string type_name() const override { return "method"; }
  bool callable() const override { return true; }
  uint32_t depth() const override { return cycler_->depth() + 1; }
  Value call(Interpreter&, Arguments&) const override {
    const Value value = is_next_ ? cycler_->current() : Value();
    is_next_ ? cycler_->advance() : cycler_->reset();
    return value;
  }

 private:
  std::shared_ptr<const Cycler> cycler_;
  bool is_next_;
};

std::optional<Value> Cycler::attribute(std::string_view name) const {
  if (name == "current") return current();
  if (name == "next" || name == "reset")
    return Value::object(std::make_shared<CyclerMethod>(shared_from_this(), name == "next"));
  return std::nullopt;
}

Value make_cycler(Interpreter& interpreter, Arguments& arguments) {
  if (arguments.positional.empty()) interpreter.fail("TypeError", "at least one item has to be provided to cycler()");
  return Value::object(std::make_shared<Cycler>(interpreter.list(std::move(arguments.positional))));
}

// joiner(sep): nothing the first time, sep from then on.
class Joiner : public Object {
 public:
  explicit Joiner(Value separator) : separator_(std::move(separator)) {}
  std::string type_name() const override { return "Joiner"; }
  bool callable() const override { return true; }
  Value call(Interpreter&, Arguments&) const override {
    return std::exchange(used_, true) ? separator_ : Value::text("");
  }

 private:
  Value separator_;
  mutable bool used_ = false;
};

Value make_joiner(Interpreter&, Arguments& arguments) {
  const auto values = bind(arguments, {"sep"}, "joiner");
  return Value::object(std::make_shared<Joiner>(Value::text(text_or(values[0], ", ", "joiner"))));
}

struct GlobalRow {
  const char* name;
  GlobalFunction function;
};
constexpr GlobalRow kGlobals[] = {
    {"range", range},
    {"dict", make_dict},
    {"namespace", make_namespace},
    {"raise_exception", raise_exception},
    {"strftime_now", strftime_now},
    {"cycler", make_cycler},
    {"joiner", make_joiner},
};

}  // namespace

std::optional<Value> find_global(std::string_view name) {
  for (const GlobalRow& row : kGlobals)
    if (name == row.name) return Value::object(std::make_shared<Function>(row.name, row.function));
  return std::nullopt;
}

std::vector<std::optional<Value>> bind(Arguments& arguments, std::initializer_list<const char*> parameters,
                                       const char* what) {
  std::vector<std::optional<Value>> values(parameters.size());
  if (arguments.positional.size() > parameters.size())
    throw TemplateError("TypeError", fmt::format("{}: takes at most {} arguments, {} were given", what,
                                                 parameters.size(), arguments.positional.size()));
  for (size_t i = 0; i < arguments.positional.size(); ++i) values[i] = std::move(arguments.positional[i]);
  for (auto& [name, value] : arguments.named) {
    const auto found = std::find(parameters.begin(), parameters.end(), name);
    if (found == parameters.end())
      throw TemplateError("TypeError", fmt::format("{}: got an unexpected keyword argument '{}'", what, name));
    auto& slot = values[static_cast<size_t>(found - parameters.begin())];
    if (slot) throw TemplateError("TypeError", fmt::format("{}: got multiple values for argument '{}'", what, name));
    slot = std::move(value);
  }
  return values;
}

int64_t integer_or(const std::optional<Value>& argument, int64_t otherwise, const char* what) {
  if (!argument) return otherwise;
  if (argument->is_integer() || argument->is_boolean()) return argument->as_integer();
  throw TemplateError("TypeError", fmt::format("{}: expected an integer, found {}", what, argument->type_name()));
}

bool boolean_or(const std::optional<Value>& argument, bool otherwise) {
  return argument ? argument->truthy() : otherwise;
}

std::string text_or(const std::optional<Value>& argument, const char* otherwise, const char* what) {
  if (!argument) return otherwise;
  if (argument->is_string()) return argument->as_string();
  throw TemplateError("TypeError", fmt::format("{}: expected a string, found {}", what, argument->type_name()));
}

}  // namespace caravan::chat
