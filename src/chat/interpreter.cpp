#include "chat/interpreter.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "chat/builtins.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

constexpr uint32_t kMaxDepth = 1000;  // of nested evaluations; each takes some hundred bytes of stack

// A method together with the value it belongs to.
class BoundMethod : public Object {
 public:
  BoundMethod(Value self, MethodFunction method) : self_(std::move(self)), method_(method) {}
  std::string type_name() const override { return "builtin_function_or_method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) const override {
    return method_(interpreter, self_, arguments);
  }
  uint32_t depth() const override { return self_.extent().depth + 1; }

 private:
  Value self_;
  MethodFunction method_;
};

const char* symbol(BinaryOp op) {
  switch (op) {
    case BinaryOp::add:
      return "+";
    case BinaryOp::subtract:
      return "-";
    case BinaryOp::multiply:
      return "*";
    case BinaryOp::divide:
      return "/";
    case BinaryOp::floor_divide:
      return "//";
    case BinaryOp::modulo:
      return "%";
    case BinaryOp::power:
      return "** or pow()";
  }
  return "?";
}

// Remainder with the sign of the divisor, as in Python.
double real_modulo(double a, double b) {
  const double r = std::fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

Value real_arithmetic(Interpreter& interpreter, BinaryOp op, double a, double b) {
  if (b == 0 && (op == BinaryOp::divide || op == BinaryOp::floor_divide || op == BinaryOp::modulo))
    interpreter.fail("ZeroDivisionError", "division by zero");
  switch (op) {
    case BinaryOp::add:
      return Value::real(a + b);
    case BinaryOp::subtract:
      return Value::real(a - b);
    case BinaryOp::multiply:
      return Value::real(a * b);
    case BinaryOp::divide:
      return Value::real(a / b);
    case BinaryOp::floor_divide:
      return Value::real(std::floor(a / b));
    case BinaryOp::modulo:
      return Value::real(real_modulo(a, b));
    case BinaryOp::power:
      break;
  }
  return Value::real(std::pow(a, b));
}

Value integer_power(Interpreter& interpreter, int64_t base, int64_t exponent) {
  if (exponent < 0)
    return real_arithmetic(interpreter, BinaryOp::power, static_cast<double>(base), static_cast<double>(exponent));
  int64_t result = 1;
  bool overflow = false, base_overflow = false;
  for (uint64_t left = static_cast<uint64_t>(exponent); left > 0; left >>= 1) {
    if ((left & 1) != 0) overflow = overflow || base_overflow || __builtin_mul_overflow(result, base, &result);
    if (left > 1) base_overflow = base_overflow || __builtin_mul_overflow(base, base, &base);
  }
  if (overflow) interpreter.fail("OverflowError", "an integer beyond 64 bits");
  return Value::integer(result);
}

Value integer_arithmetic(Interpreter& interpreter, BinaryOp op, int64_t a, int64_t b) {
  int64_t result = 0;
  bool overflow = false;
  if (b == 0 && (op == BinaryOp::divide || op == BinaryOp::floor_divide || op == BinaryOp::modulo))
    interpreter.fail("ZeroDivisionError", "division by zero");
  switch (op) {
    case BinaryOp::add:
      overflow = __builtin_add_overflow(a, b, &result);
      break;
    case BinaryOp::subtract:
      overflow = __builtin_sub_overflow(a, b, &result);
      break;
    case BinaryOp::multiply:
      overflow = __builtin_mul_overflow(a, b, &result);
      break;
    case BinaryOp::divide:
      return Value::real(static_cast<double>(a) / static_cast<double>(b));
    case BinaryOp::floor_divide:
      overflow = b == -1 && a == std::numeric_limits<int64_t>::min();
      if (!overflow) result = a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
      break;
    case BinaryOp::modulo:
      if (b != -1) result = a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
      break;
    case BinaryOp::power:
      return integer_power(interpreter, a, b);
  }
  if (overflow) interpreter.fail("OverflowError", "an integer beyond 64 bits");
  return Value::integer(result);
}

Value add_strings(Interpreter& interpreter, const Value& a, const Value& b) {
  interpreter.check_size(a.as_string().size() + b.as_string().size());
  if (!a.is_markup() && !b.is_markup()) return interpreter.text(a.as_string() + b.as_string());
  // Markup escapes what is added to it
  const auto safe = [](const Value& v) { return v.is_markup() ? v.as_string() : escape_html(v.as_string()); };
  return interpreter.text_like(a.is_markup() ? a : b, safe(a) + safe(b));
}

Value repeat(Interpreter& interpreter, const Value& value, int64_t times) {
  const auto n = static_cast<uint64_t>(std::max<int64_t>(times, 0));
  const uint64_t size = value.is_string() ? value.as_string().size() : value.as_list().size() * sizeof(Value);
  if (size > 0) interpreter.check_size(n > UINT32_MAX ? UINT64_MAX : n * size);
  if (value.is_string()) {
    std::string text;
    if (size > 0)
      for (uint64_t i = 0; i < n; ++i) text += value.as_string();
    return interpreter.text_like(value, std::move(text));
  }
  List items;
  if (size > 0)
    for (uint64_t i = 0; i < n; ++i) items.insert(items.end(), value.as_list().begin(), value.as_list().end());
  return interpreter.list(std::move(items), value.list_kind());
}

bool is_sequence(const Value& v) {
  return v.is_string() || (v.is_list() && (v.list_kind() == ListKind::list || v.list_kind() == ListKind::tuple));
}

}  // namespace

std::optional<Value> Namespace::attribute(std::string_view name) const {
  for (const auto& [key, value] : values_)
    if (key == name) return value;
  return std::nullopt;
}

void Namespace::set(const std::string& name, Value value) const {
  for (auto& [key, old] : values_)
    if (key == name) {
      old = std::move(value);
      return;
    }
  values_.emplace_back(name, std::move(value));
}

Interpreter::Interpreter(const Program& program, const Value& context, const std::tm& now, const RenderLimits& limits)
    : program_(program), now_(now), limits_(limits), globals_(program.names.size()) {
  for (size_t i = 0; i < program.names.size(); ++i) {
    if (const Value* value = context.as_dict().find(program.names[i])) {
      globals_[i] = {true, *value};
    } else if (std::optional<Value> global = find_global(program.names[i])) {
      globals_[i] = {true, std::move(*global)};
    }
  }
}

Interpreter::~Interpreter() {
  for (const auto& space : namespaces_) space->clear();
}

std::string Interpreter::run() {
  try {
    run_body(program_.body);
  } catch (const TemplateError& e) {
    if (e.line() > 0 || line_ == 0) throw;
    throw TemplateError(e.kind(), e.reason(), line_);
  }
  return std::move(output_);
}

Value Interpreter::eval(const Expression& expression) {
  step();
  if (++depth_ > kMaxDepth)
    fail("LimitError", fmt::format("more than {} calls and expressions inside another", kMaxDepth));
  Value value = expression.evaluate(*this);
  --depth_;
  return value;
}

Flow Interpreter::run_body(const Body& body) {
  if (++depth_ > kMaxDepth)
    fail("LimitError", fmt::format("more than {} calls and expressions inside another", kMaxDepth));
  Flow flow = Flow::next;
  for (const auto& statement : body) {
    step();
    line_ = statement->line;
    flow = statement->execute(*this);
    if (flow != Flow::next) break;
  }
  --depth_;
  return flow;
}

std::string Interpreter::capture_body(const Body& body) {
  return capture([&] { run_body(body); });
}

void Interpreter::write(std::string_view text) {
  charge_bytes(text.size());
  if (out_->size() + text.size() > limits_.max_output_bytes)
    fail("LimitError", fmt::format("more than {} bytes of output", limits_.max_output_bytes));
  *out_ += text;
}

Value Interpreter::lookup(NameId name) const {
  for (const Scope* scope = scope_; scope != nullptr; scope = scope->parent)
    for (auto it = scope->variables.rbegin(); it != scope->variables.rend(); ++it)
      if (it->first == name) return it->second;
  if (globals_[name].first) return globals_[name].second;
  return Value::undefined(fmt::format("'{}' is undefined", program_.names[name]));
}

void Interpreter::assign(const Target& target, const Value& value) {
  switch (target.kind) {
    case Target::Kind::name: {
      if (scope_ == &outermost_) {
        globals_[target.name] = {true, value};
        return;
      }
      for (auto& [name, old] : scope_->variables)
        if (name == target.name) {
          old = value;
          return;
        }
      scope_->variables.emplace_back(target.name, value);
      return;
    }
    case Target::Kind::attribute: {
      const Value space = lookup(target.name);
      const auto* as_namespace = space.is_object() ? dynamic_cast<const Namespace*>(&space.as_object()) : nullptr;
      if (as_namespace == nullptr) fail("TemplateRuntimeError", "cannot assign attribute on non-namespace object");
      as_namespace->set(target.attribute, value);
      return;
    }
    case Target::Kind::tuple:
      break;
  }
  require_defined(value);
  const List items = value.iterate();
  charge_bytes(items.size() * sizeof(Value));
  if (items.size() != target.parts.size())
    fail("ValueError", fmt::format("{} values to unpack (expected {})", items.size(), target.parts.size()));
  for (size_t i = 0; i < items.size(); ++i) assign(target.parts[i], items[i]);
}

Arguments Interpreter::evaluate(const CallArguments& arguments) {
  Arguments values;
  values.positional.reserve(arguments.positional.size());
  for (const auto& argument : arguments.positional) values.positional.push_back(eval(*argument));
  for (const auto& [name, argument] : arguments.named) values.named.emplace_back(name, eval(*argument));
  if (arguments.unpacked) {
    const List more = eval(*arguments.unpacked).iterate();
    charge_bytes(more.size() * sizeof(Value));
    values.positional.insert(values.positional.end(), more.begin(), more.end());
  }
  if (arguments.unpacked_named) {
    const Value more = eval(*arguments.unpacked_named);
    if (!more.is_dict()) fail("TypeError", "argument after ** must be a mapping");
    charge_bytes(more.extent().weight);
    for (const auto& [name, value] : more.as_dict().entries) values.named.emplace_back(name.str(), value);
  }
  return values;
}

Interpreter::ScopeGuard::ScopeGuard(Interpreter& interpreter, Scope* parent)
    : interpreter_(interpreter), previous_(interpreter.scope_), parent_(parent != nullptr ? parent : previous_) {
  scope_ = std::make_unique<Scope>();
  scope_->parent = parent_;
  interpreter_.scope_ = scope_.get();
}

Interpreter::ScopeGuard::~ScopeGuard() {
  if (scope_->captured) interpreter_.kept_scopes_.push_back(std::move(scope_));
  interpreter_.scope_ = previous_;
}

void Interpreter::ScopeGuard::renew() {
  if (!scope_->captured) {
    scope_->variables.clear();
    return;
  }
  interpreter_.charge_bytes(sizeof(Scope) + scope_->variables.capacity() * sizeof(std::pair<NameId, Value>));
  interpreter_.kept_scopes_.push_back(std::move(scope_));
  scope_ = std::make_unique<Scope>();
  scope_->parent = parent_;
  interpreter_.scope_ = scope_.get();
}

Scope* Interpreter::capture_scope() {
  for (Scope* scope = scope_; scope != nullptr && !scope->captured; scope = scope->parent) scope->captured = true;
  return scope_;
}

Value Interpreter::attribute(const Value& object, const std::string& name) {
  require_defined(object);
  if (object.is_object()) {
    if (const std::optional<Value> value = object.as_object().attribute(name)) return *value;
  } else {
    if (const MethodFunction method = find_method(object, name))
      return Value::object(std::make_shared<BoundMethod>(object, method));
    if (is_mutating_method(object, name) || (name.starts_with("__") && name.ends_with("__")))
      return Value::undefined(
          fmt::format("access to attribute '{}' of '{}' object is unsafe", name, object.type_name()), "SecurityError");
    if (object.is_dict())
      if (const Value* value = object.as_dict().find(name)) return *value;
    if (object.is_list() && object.list_kind() == ListKind::tuple && object.as_list().size() == 2) {
      // what groupby yields are tuples with names
      if (name == "grouper") return object.as_list()[0];
      if (name == "list") return object.as_list()[1];
    }
  }
  return Value::undefined(fmt::format("'{} object' has no attribute '{}'", object.type_name(), name));
}

Value Interpreter::subscript(const Value& object, const Value& key) {
  require_defined(object);
  if (object.is_dict() && !(key.is_list() && key.list_kind() != ListKind::tuple) && !key.is_dict())
    if (const Value* value = object.as_dict().find(key)) return *value;
  if ((key.is_integer() || key.is_boolean()) && is_sequence(object)) {
    step(object.is_string() ? object.as_string().size() / 64 : 0);
    const auto n = static_cast<int64_t>(*object.length());
    const int64_t at = key.as_integer() < 0 ? key.as_integer() + n : key.as_integer();
    if (at >= 0 && at < n) {
      if (object.is_list()) return object.as_list()[static_cast<size_t>(at)];
      const std::string& s = object.as_string();
      size_t begin = 0;
      for (int64_t i = 0; i < at; ++i) begin += code_point_at(s, begin).size;
      return text_like(object, s.substr(begin, code_point_at(s, begin).size));
    }
    return Value::undefined(fmt::format("'{} object' has no element {}", object.type_name(), key.as_integer()));
  }
  if (key.is_string()) {
    if (object.is_dict()) {  // the key is absent; Jinja then looks at attributes
      if (find_method(object, key.as_string()) == nullptr && !is_mutating_method(object, key.as_string()))
        return Value::undefined(fmt::format("'dict object' has no attribute '{}'", key.as_string()));
    }
    return attribute(object, key.as_string());
  }
  return Value::undefined(fmt::format("'{} object' has no such element", object.type_name()));
}

Value Interpreter::call(const Value& callee, Arguments& arguments) {
  require_defined(callee);
  if (!callee.is_object() || !callee.as_object().callable())
    fail("TypeError", fmt::format("'{}' object is not callable", callee.type_name()));
  return callee.as_object().call(*this, arguments);
}

Value Interpreter::new_namespace() {
  charge_bytes(256);
  namespaces_.push_back(std::make_shared<Namespace>());
  return Value::object(namespaces_.back());
}

Value Interpreter::binary(BinaryOp op, const Value& left, const Value& right) {
  require_defined(left);
  require_defined(right);
  if (left.is_number() && right.is_number()) {
    if (left.is_real() || right.is_real()) return real_arithmetic(*this, op, left.as_real(), right.as_real());
    return integer_arithmetic(*this, op, left.as_integer(), right.as_integer());
  }
  if (op == BinaryOp::modulo && left.is_string()) return percent_format(*this, left, right);
  if (op == BinaryOp::add && left.is_string() && right.is_string()) return add_strings(*this, left, right);
  if (op == BinaryOp::add && left.is_list() && right.is_list() && is_sequence(left) &&
      left.list_kind() == right.list_kind()) {
    List items = left.as_list();
    items.insert(items.end(), right.as_list().begin(), right.as_list().end());
    return list(std::move(items), left.list_kind());
  }
  if (op == BinaryOp::multiply && is_sequence(left) && right.is_number() && !right.is_real())
    return repeat(*this, left, right.as_integer());
  if (op == BinaryOp::multiply && is_sequence(right) && left.is_number() && !left.is_real())
    return repeat(*this, right, left.as_integer());
  if (op == BinaryOp::add && left.is_string())
    fail("TypeError", fmt::format("can only concatenate str (not \"{}\") to str", right.type_name()));
  fail("TypeError", fmt::format("unsupported operand type(s) for {}: '{}' and '{}'", symbol(op), left.type_name(),
                                right.type_name()));
}

Value Interpreter::text(std::string text) {
  charge_bytes(text.size() + 16);
  return Value::text(std::move(text));
}

Value Interpreter::text_like(const Value& model, std::string text) {
  if (!model.is_markup()) return this->text(std::move(text));
  charge_bytes(text.size() + 16);
  return Value::markup(std::move(text));
}

Value Interpreter::list(List items, ListKind kind) {
  charge_bytes(items.size() * sizeof(Value) + 32);
  return Value::list(std::move(items), kind);
}

void Interpreter::charge_bytes(uint64_t n) {
  n_bytes_ += n;
  if (n_bytes_ > limits_.max_bytes)
    fail("LimitError", fmt::format("more than {} bytes of strings and lists", limits_.max_bytes));
}

void Interpreter::step(uint64_t n) {
  n_steps_ += n;
  if (n_steps_ > limits_.max_steps) fail("LimitError", fmt::format("more than {} steps", limits_.max_steps));
}

void Interpreter::check_size(uint64_t n_bytes) const {
  if (n_bytes > limits_.max_bytes) fail("LimitError", fmt::format("a value of more than {} bytes", limits_.max_bytes));
}

void Interpreter::fail(const char* kind, const std::string& message) const {
  throw TemplateError(kind, message, line_);
}

void Interpreter::require_defined(const Value& value) const {
  if (value.is_undefined()) fail(value.as_undefined().kind.c_str(), value.as_undefined().message);
}

}  // namespace caravan::chat
