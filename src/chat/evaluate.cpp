// What each node of the syntax tree does.
#include <fmt/format.h>

#include <algorithm>

#include "chat/ast.h"
#include "chat/builtins.h"
#include "chat/interpreter.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

// A macro or the block of {% call %}, bound to where it was defined.
class Macro : public Object {
 public:
  Macro(const MacroDefinition& definition, Scope* scope) : definition_(definition), scope_(scope) {}
  std::string type_name() const override { return "Macro"; }
  bool callable() const override { return true; }

  std::optional<Value> attribute(std::string_view name) const override {
    if (name == "name") return Value::text(definition_.name);
    if (name == "caller") return Value::boolean(definition_.uses_caller);
    return std::nullopt;
  }

  Value call(Interpreter& interpreter, Arguments& arguments) const override {
    Interpreter::ScopeGuard scope(interpreter, scope_);
    bind_parameters(interpreter, scope, arguments);
    return interpreter.text(interpreter.capture_body(definition_.body));
  }

 private:
  // Takes the named argument out of the list; false where it was not given.
  static bool take(Arguments& arguments, std::string_view name, Value& value) {
    for (auto it = arguments.named.begin(); it != arguments.named.end(); ++it)
      if (it->first == name) {
        value = std::move(it->second);
        arguments.named.erase(it);
        return true;
      }
    return false;
  }

  void bind_parameters(Interpreter& interpreter, Interpreter::ScopeGuard& scope, Arguments& arguments) const {
    const auto& parameters = definition_.parameters;
    for (size_t i = 0; i < parameters.size(); ++i) {
      Value value;
      const bool named = take(arguments, parameters[i].text, value);
      if (i < arguments.positional.size()) {
        if (named) fail(interpreter, fmt::format("got multiple values for argument '{}'", parameters[i].text));
        value = arguments.positional[i];
      } else if (!named && parameters[i].default_value) {
        value = interpreter.eval(*parameters[i].default_value);
      } else if (!named) {
        value = Value::undefined(fmt::format("parameter '{}' was not provided", parameters[i].text));
      }
      scope.set(parameters[i].name, std::move(value));
    }
    bind_rest(interpreter, scope, arguments);
  }

  void bind_rest(Interpreter& interpreter, Interpreter::ScopeGuard& scope, Arguments& arguments) const {
    const Program& program = interpreter.program();
    if (definition_.uses_caller) {
      Value caller = Value::undefined("No caller defined");
      take(arguments, "caller", caller);
      scope.set(program.caller, std::move(caller));
    }
    if (definition_.uses_kwargs) {
      DictBuilder dict;
      for (auto& [name, value] : arguments.named) dict.set(Value::text(name), std::move(value));
      scope.set(program.kwargs, dict.build());
    } else if (!arguments.named.empty()) {
      fail(interpreter, fmt::format("takes no keyword argument '{}'", arguments.named.front().first));
    }
    const size_t n = definition_.parameters.size();
    if (definition_.uses_varargs) {
      List rest;
      for (size_t i = n; i < arguments.positional.size(); ++i) rest.push_back(arguments.positional[i]);
      scope.set(program.varargs, interpreter.list(std::move(rest), ListKind::tuple));
    } else if (arguments.positional.size() > n) {
      fail(interpreter, fmt::format("takes not more than {} argument(s)", n));
    }
  }

  [[noreturn]] void fail(const Interpreter& interpreter, const std::string& message) const {
    interpreter.fail("TypeError", fmt::format("macro '{}' {}", definition_.name, message));
  }

  const MacroDefinition& definition_;
  Scope* scope_;  // owned by the interpreter, which keeps it
};

// A function made of a callable of C++.
template <typename F>
class NativeFunction : public Object {
 public:
  explicit NativeFunction(F f) : f_(std::move(f)) {}
  std::string type_name() const override { return "method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) const override { return f_(interpreter, arguments); }

 private:
  F f_;
};

template <typename F>
Value native_function(F f) {
  return Value::object(std::make_shared<NativeFunction<F>>(std::move(f)));
}

// The variable `loop`.
class Loop : public Object, public std::enable_shared_from_this<Loop> {
 public:
  Loop(const ForStatement& statement, List items, uint32_t depth)
      : statement_(statement), items_(std::move(items)), depth_(depth) {}

  std::string type_name() const override { return "LoopContext"; }
  bool callable() const override { return statement_.recursive; }

  std::optional<Value> attribute(std::string_view name) const override {
    const auto number = [](size_t n) { return Value::integer(static_cast<int64_t>(n)); };
    const size_t n = items_.size();
    if (name == "index") return number(at_ + 1);
    if (name == "index0") return number(at_);
    if (name == "first") return Value::boolean(at_ == 0);
    if (name == "last") return Value::boolean(at_ + 1 >= n);
    if (name == "length") return number(n);
    if (name == "revindex") return number(n - std::min(at_, n));
    if (name == "revindex0") return number(n - std::min(at_ + 1, n));
    if (name == "depth") return Value::integer(depth_ + 1);
    if (name == "depth0") return Value::integer(depth_);
    if (name == "previtem")
      return at_ > 0 && at_ - 1 < n ? items_[at_ - 1] : Value::undefined("there is no previous item");
    if (name == "nextitem") return at_ + 1 < n ? items_[at_ + 1] : Value::undefined("there is no next item");
    if (name == "cycle" || name == "changed") return function(name == "cycle");
    return std::nullopt;
  }

  // loop(items) in a recursive loop.
  Value call(Interpreter& interpreter, Arguments& arguments) const override {
    if (arguments.positional.size() != 1) interpreter.fail("TypeError", "loop() takes one argument");
    return interpreter.text(statement_.render(interpreter, arguments.positional[0].iterate(), depth_ + 1));
  }

  bool done() const { return at_ >= items_.size(); }
  const Value& item() const { return items_[at_]; }
  void advance() { ++at_; }
  // Called at the end: a loop object that was stored somewhere keeps no items.
  void finish() {
    items_.clear();
    last_.clear();
  }

 private:
  Value function(bool is_cycle) const {
    return native_function([self = shared_from_this(), is_cycle](Interpreter& interpreter, Arguments& arguments) {
      return is_cycle ? self->cycle(interpreter, arguments) : self->changed(interpreter, arguments);
    });
  }

  Value cycle(Interpreter& interpreter, Arguments& arguments) const {
    if (arguments.positional.empty()) interpreter.fail("TypeError", "loop.cycle() needs items");
    return arguments.positional[at_ % arguments.positional.size()];
  }

  Value changed(Interpreter& interpreter, Arguments& arguments) const {
    const Value now = interpreter.list(arguments.positional, ListKind::tuple);
    if (!last_.empty() && equal(last_.front(), now)) return Value::boolean(false);
    last_.assign(1, now);
    return Value::boolean(true);
  }

  const ForStatement& statement_;
  List items_;
  size_t at_ = 0;
  uint32_t depth_;
  mutable List last_;  // what changed() was last asked about
};

std::string apply_filters(Interpreter& interpreter, const FilterChain& filters, Value value) {
  for (const auto& filter : filters) value = filter->apply(interpreter, value);
  return value.str();
}

struct SliceBounds {
  int64_t begin, end, step;
};

// Python's slice.indices(n).
SliceBounds slice_bounds(Interpreter& interpreter, const Value& begin, const Value& end, const Value& step, int64_t n) {
  const auto integer = [&](const Value& v, int64_t otherwise) {
    if (v.is_none()) return otherwise;
    if (!v.is_integer() && !v.is_boolean()) {
      interpreter.require_defined(v);
      interpreter.fail("TypeError", "slice indices must be integers or None");
    }
    return v.as_integer();
  };
  SliceBounds bounds{};
  bounds.step = integer(step, 1);
  if (bounds.step == 0) interpreter.fail("ValueError", "slice step cannot be zero");
  bounds.step = std::clamp<int64_t>(bounds.step, -n - 1, n + 1);  // the same items, and no overflow below
  const bool backward = bounds.step < 0;
  const int64_t low = backward ? -1 : 0, high = backward ? n - 1 : n;
  const auto place = [&](const Value& v, int64_t otherwise) {
    int64_t at = integer(v, otherwise);
    if (v.is_none()) return at;
    if (at < 0) at = at < -n ? -n - 1 + n : at + n;
    return std::clamp(at, low, high);
  };
  bounds.begin = place(begin, backward ? high : low);
  bounds.end = place(end, backward ? low : high);
  return bounds;
}

template <typename F>
void for_each_index(const SliceBounds& bounds, F&& f) {
  for (int64_t i = bounds.begin; bounds.step > 0 ? i < bounds.end : i > bounds.end; i += bounds.step)
    f(static_cast<size_t>(i));
}

std::string slice_text(const std::string& text, const SliceBounds& bounds) {
  std::string out;
  if (bounds.step == 1) {  // a run of bytes
    size_t at = 0;
    for (int64_t i = 0; i < bounds.begin && at < text.size(); ++i) at += code_point_at(text, at).size;
    const size_t begin = at;
    for (int64_t i = bounds.begin; i < bounds.end && at < text.size(); ++i) at += code_point_at(text, at).size;
    return text.substr(begin, at - begin);
  }
  const auto parts = split_code_points(text);
  for_each_index(bounds, [&](size_t i) { out += parts[i]; });
  return out;
}

}  // namespace

// ---- expressions

Value NameExpression::evaluate(Interpreter& interpreter) const { return interpreter.lookup(name); }

Value ListExpression::evaluate(Interpreter& interpreter) const {
  List values;
  values.reserve(items.size());
  for (const auto& item : items) values.push_back(interpreter.eval(*item));
  return interpreter.list(std::move(values), kind);
}

Value DictExpression::evaluate(Interpreter& interpreter) const {
  DictBuilder dict;
  interpreter.charge_bytes(entries.size() * sizeof(DictData::Entry));
  for (const auto& [key, value] : entries) {
    const Value evaluated_key = interpreter.eval(*key);
    dict.set(evaluated_key, interpreter.eval(*value));
  }
  return dict.build();
}

Value AttributeExpression::evaluate(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*object);
  interpreter.at_line(line);
  return interpreter.attribute(value, name);
}

Value SubscriptExpression::evaluate(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*object);
  const Value at = interpreter.eval(*key);
  interpreter.at_line(line);
  return interpreter.subscript(value, at);
}

Value SliceExpression::evaluate(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*object);
  const Value b = begin ? interpreter.eval(*begin) : Value(), e = end ? interpreter.eval(*end) : Value(),
              s = step ? interpreter.eval(*step) : Value();
  interpreter.at_line(line);
  interpreter.require_defined(value);
  if (value.is_string()) {
    const std::string& text = value.as_string();
    interpreter.step(text.size() / 64);
    const auto n = static_cast<int64_t>(count_code_points(text));
    return interpreter.text_like(value, slice_text(text, slice_bounds(interpreter, b, e, s, n)));
  }
  if (!value.is_list() || value.list_kind() == ListKind::generator || value.list_kind() == ListKind::view)
    return Value::undefined(fmt::format("'{}' object cannot be sliced", value.type_name()));
  const List& items = value.as_list();
  List chosen;
  for_each_index(slice_bounds(interpreter, b, e, s, static_cast<int64_t>(items.size())),
                 [&](size_t i) { chosen.push_back(items[i]); });
  return interpreter.list(std::move(chosen), value.list_kind());
}

Value CallExpression::evaluate(Interpreter& interpreter) const { return call(interpreter, nullptr); }

Value CallExpression::call(Interpreter& interpreter, const Value* caller) const {
  if (const auto* member = dynamic_cast<const AttributeExpression*>(callee.get())) {
    // object.method(...): without a value for the bound method
    const Value self = interpreter.eval(*member->object);
    const MethodFunction method = find_method(self, member->name);
    interpreter.at_line(line);
    const Value function = method != nullptr ? Value() : interpreter.attribute(self, member->name);
    Arguments values = interpreter.evaluate(arguments);
    if (caller != nullptr) values.named.emplace_back("caller", *caller);
    interpreter.at_line(line);
    return method != nullptr ? method(interpreter, self, values) : interpreter.call(function, values);
  }
  const Value function = interpreter.eval(*callee);
  Arguments values = interpreter.evaluate(arguments);
  if (caller != nullptr) values.named.emplace_back("caller", *caller);
  interpreter.at_line(line);
  return interpreter.call(function, values);
}

Value FilterExpression::apply(Interpreter& interpreter, const Value& value) const {
  interpreter.at_line(line);
  if (function == nullptr) interpreter.fail("TemplateAssertionError", fmt::format("no filter named '{}'", name));
  Arguments values = interpreter.evaluate(arguments);
  interpreter.at_line(line);
  return function(interpreter, value, values);
}

Value FilterExpression::evaluate(Interpreter& interpreter) const {
  return apply(interpreter, interpreter.eval(*input));
}

Value TestExpression::evaluate(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*input);
  interpreter.at_line(line);
  if (function == nullptr) interpreter.fail("TemplateAssertionError", fmt::format("no test named '{}'", name));
  Arguments values = interpreter.evaluate(arguments);
  return Value::boolean(function(interpreter, value, values) != negated);
}

Value ConditionalExpression::evaluate(Interpreter& interpreter) const {
  if (interpreter.eval(*condition).truthy()) return interpreter.eval(*then);
  if (otherwise) return interpreter.eval(*otherwise);
  return Value::undefined("the inline if-expression evaluated to false and no else section was defined");
}

Value LogicExpression::evaluate(Interpreter& interpreter) const {
  Value first = interpreter.eval(*left);
  return first.truthy() == is_and ? interpreter.eval(*right) : first;
}

Value UnaryExpression::evaluate(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*operand);
  if (op == UnaryOp::logical_not) return Value::boolean(!value.truthy());
  interpreter.at_line(line);
  interpreter.require_defined(value);
  if (!value.is_number())
    interpreter.fail("TypeError", fmt::format("bad operand type for unary {}: '{}'", op == UnaryOp::minus ? '-' : '+',
                                              value.type_name()));
  if (op == UnaryOp::plus) return value.is_real() ? value : Value::integer(value.as_integer());
  if (value.is_real()) return Value::real(-value.as_real());
  return interpreter.binary(BinaryOp::subtract, Value::integer(0), value);
}

Value BinaryExpression::evaluate(Interpreter& interpreter) const {
  const Value a = interpreter.eval(*left);
  const Value b = interpreter.eval(*right);
  interpreter.at_line(line);
  return interpreter.binary(op, a, b);
}

Value ConcatExpression::evaluate(Interpreter& interpreter) const {
  std::string text;
  for (const auto& part : parts) {
    const Value value = interpreter.eval(*part);
    interpreter.check_size(text.size() + value.extent().weight);
    text += value.str();
  }
  return interpreter.text(std::move(text));
}

Value CompareExpression::evaluate(Interpreter& interpreter) const {
  Value left = interpreter.eval(*first);
  for (const auto& [op, operand] : rest) {
    Value right = interpreter.eval(*operand);
    interpreter.at_line(line);
    interpreter.step((std::min(left.extent().weight, right.extent().weight)) / 64);
    bool holds = false;
    switch (op) {
      case CompareOp::equal:
      case CompareOp::not_equal:
        holds = equal(left, right) == (op == CompareOp::equal);
        break;
      case CompareOp::less:
        holds = less(left, right);
        break;
      case CompareOp::greater:
        holds = less(right, left);
        break;
      case CompareOp::less_equal:  // not "not greater": NaN is neither
        holds = less(left, right) || equal(left, right);
        break;
      case CompareOp::greater_equal:
        holds = less(right, left) || equal(left, right);
        break;
      case CompareOp::in:
      case CompareOp::not_in:
        interpreter.step(right.extent().weight / 64);
        holds = contains(right, left) == (op == CompareOp::in);
        break;
    }
    if (!holds) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

// ---- statements

Flow TextStatement::execute(Interpreter& interpreter) const {
  interpreter.write(text);
  return Flow::next;
}

Flow OutputStatement::execute(Interpreter& interpreter) const {
  const Value result = interpreter.eval(*value);
  interpreter.at_line(line);
  if (result.is_string()) {
    interpreter.write(result.as_string());
  } else {
    interpreter.charge_bytes(result.extent().weight);
    interpreter.write(result.str());
  }
  return Flow::next;
}

Flow IfStatement::execute(Interpreter& interpreter) const {
  for (const auto& [condition, body] : branches)
    if (interpreter.eval(*condition).truthy()) return interpreter.run_body(body);
  return interpreter.run_body(otherwise);
}

Flow ForStatement::execute(Interpreter& interpreter) const {
  const Value value = interpreter.eval(*iterable);
  interpreter.at_line(line);
  List items = value.iterate();
  interpreter.charge_bytes(items.size() * sizeof(Value));
  return loop(interpreter, std::move(items), 0);
}

std::string ForStatement::render(Interpreter& interpreter, List items, uint32_t depth) const {
  return interpreter.capture([&] { loop(interpreter, std::move(items), depth); });
}

Flow ForStatement::loop(Interpreter& interpreter, List items, uint32_t depth) const {
  if (condition) {
    List chosen;
    for (Value& item : items) {
      Interpreter::ScopeGuard scope(interpreter);
      interpreter.assign(target, item);
      if (interpreter.eval(*condition).truthy()) chosen.push_back(std::move(item));
    }
    items = std::move(chosen);
  }
  if (items.empty()) {
    const Interpreter::ScopeGuard scope(interpreter);
    return interpreter.run_body(otherwise);
  }
  const auto state = std::make_shared<Loop>(*this, std::move(items), depth);
  const Value state_value = Value::object(state);
  Interpreter::ScopeGuard scope(interpreter);
  for (; !state->done(); state->advance()) {
    scope.set(interpreter.program().loop, state_value);
    interpreter.at_line(line);
    interpreter.assign(target, state->item());
    if (interpreter.run_body(body) == Flow::break_loop) break;
    scope.renew();
  }
  state->finish();
  return Flow::next;
}

Flow SetStatement::execute(Interpreter& interpreter) const {
  const Value result = interpreter.eval(*value);
  interpreter.at_line(line);
  interpreter.assign(target, result);
  return Flow::next;
}

Flow SetBlockStatement::execute(Interpreter& interpreter) const {
  Value value;
  {
    const Interpreter::ScopeGuard scope(interpreter);
    value = interpreter.text(interpreter.capture_body(body));
    for (const auto& filter : filters) value = filter->apply(interpreter, value);
  }
  interpreter.assign(target, value);
  return Flow::next;
}

Flow FilterBlockStatement::execute(Interpreter& interpreter) const {
  const Interpreter::ScopeGuard scope(interpreter);
  Value text = interpreter.text(interpreter.capture_body(body));
  interpreter.write(apply_filters(interpreter, filters, std::move(text)));
  return Flow::next;
}

Flow MacroStatement::execute(Interpreter& interpreter) const {
  Target where;
  where.name = name;
  interpreter.assign(where, Value::object(std::make_shared<Macro>(macro, interpreter.capture_scope())));
  return Flow::next;
}

Flow CallBlockStatement::execute(Interpreter& interpreter) const {
  const Value caller = Value::object(std::make_shared<Macro>(macro, interpreter.capture_scope()));
  interpreter.write(call->call(interpreter, &caller).str());
  return Flow::next;
}

Flow WithStatement::execute(Interpreter& interpreter) const {
  std::vector<Value> values;
  for (const auto& assignment : assignments) values.push_back(interpreter.eval(*assignment.second));
  const Interpreter::ScopeGuard scope(interpreter);
  for (size_t i = 0; i < values.size(); ++i) interpreter.assign(assignments[i].first, values[i]);
  return interpreter.run_body(body);
}

Flow GroupStatement::execute(Interpreter& interpreter) const { return interpreter.run_body(body); }

}  // namespace caravan::chat
