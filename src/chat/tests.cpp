// Tests: {{ x is name }}.
#include <fmt/format.h>

#include "chat/builtins.h"
#include "chat/interpreter.h"
#include "chat/text.h"

namespace caravan::chat {
namespace {

const Value& only(Interpreter& interpreter, Arguments& arguments, const char* what) {
  if (arguments.positional.size() != 1 || !arguments.named.empty())
    interpreter.fail("TypeError", fmt::format("test '{}' takes one argument", what));
  return arguments.positional[0];
}

int64_t integer(Interpreter& interpreter, const Value& value, const char* what) {
  interpreter.require_defined(value);
  if (!value.is_integer() && !value.is_boolean())
    interpreter.fail("TypeError", fmt::format("test '{}' needs an integer, found {}", what, value.type_name()));
  return value.as_integer();
}

bool is_defined(Interpreter&, const Value& v, Arguments&) { return !v.is_undefined(); }
bool is_undefined(Interpreter&, const Value& v, Arguments&) { return v.is_undefined(); }
bool is_none(Interpreter&, const Value& v, Arguments&) { return v.is_none(); }
bool is_string(Interpreter&, const Value& v, Arguments&) { return v.is_string(); }
bool is_number(Interpreter&, const Value& v, Arguments&) { return v.is_number(); }
bool is_integer(Interpreter&, const Value& v, Arguments&) { return v.is_integer(); }
bool is_float(Interpreter&, const Value& v, Arguments&) { return v.is_real(); }
bool is_boolean(Interpreter&, const Value& v, Arguments&) { return v.is_boolean(); }
bool is_true(Interpreter&, const Value& v, Arguments&) { return v.is_boolean() && v.as_boolean(); }
bool is_false(Interpreter&, const Value& v, Arguments&) { return v.is_boolean() && !v.as_boolean(); }
bool is_mapping(Interpreter&, const Value& v, Arguments&) { return v.is_dict(); }
bool is_iterable(Interpreter&, const Value& v, Arguments&) { return v.iterable(); }
bool is_sequence(Interpreter&, const Value& v, Arguments&) {
  return v.length().has_value() && !(v.is_list() && v.list_kind() == ListKind::view);
}
bool is_callable(Interpreter&, const Value& v, Arguments&) { return v.is_object() && v.as_object().callable(); }
bool is_escaped(Interpreter&, const Value& v, Arguments&) { return v.is_markup(); }

bool is_odd(Interpreter& i, const Value& v, Arguments&) { return integer(i, v, "odd") % 2 != 0; }
bool is_even(Interpreter& i, const Value& v, Arguments&) { return integer(i, v, "even") % 2 == 0; }
bool is_divisible(Interpreter& i, const Value& v, Arguments& a) {
  const int64_t by = integer(i, only(i, a, "divisibleby"), "divisibleby");
  if (by == 0) i.fail("ZeroDivisionError", "division by zero");
  return by == -1 || integer(i, v, "divisibleby") % by == 0;
}

bool is_equal(Interpreter& i, const Value& v, Arguments& a) { return equal(v, only(i, a, "eq")); }
bool is_not_equal(Interpreter& i, const Value& v, Arguments& a) { return !equal(v, only(i, a, "ne")); }
bool is_less(Interpreter& i, const Value& v, Arguments& a) { return less(v, only(i, a, "lt")); }
bool is_greater(Interpreter& i, const Value& v, Arguments& a) { return less(only(i, a, "gt"), v); }
bool is_less_equal(Interpreter& i, const Value& v, Arguments& a) {
  const Value& other = only(i, a, "le");
  return less(v, other) || equal(v, other);
}
bool is_greater_equal(Interpreter& i, const Value& v, Arguments& a) {
  const Value& other = only(i, a, "ge");
  return less(other, v) || equal(v, other);
}
bool is_in(Interpreter& i, const Value& v, Arguments& a) {
  const Value& container = only(i, a, "in");
  i.step(container.extent().weight / 64);
  return contains(container, v);
}

bool is_same(Interpreter& i, const Value& v, Arguments& a) {
  const Value& other = only(i, a, "sameas");
  if (v.is_number() && other.is_number())
    return v.is_boolean() == other.is_boolean() && v.is_real() == other.is_real() && equal(v, other);
  return equal(v, other);
}

bool is_lower(Interpreter&, const Value& v, Arguments&) { return consists_of(v.str(), CharacterClass::lower); }
bool is_upper(Interpreter&, const Value& v, Arguments&) { return consists_of(v.str(), CharacterClass::upper); }
bool is_filter(Interpreter&, const Value& v, Arguments&) {
  return v.is_string() && find_filter(v.as_string()) != nullptr;
}
bool is_test(Interpreter&, const Value& v, Arguments&) { return v.is_string() && find_test(v.as_string()) != nullptr; }

struct TestRow {
  const char* name;
  TestFunction function;
};
constexpr TestRow kTests[] = {
    {"defined", is_defined},   {"undefined", is_undefined},
    {"none", is_none},         {"string", is_string},
    {"number", is_number},     {"integer", is_integer},
    {"float", is_float},       {"boolean", is_boolean},
    {"true", is_true},         {"false", is_false},
    {"mapping", is_mapping},   {"iterable", is_iterable},
    {"sequence", is_sequence}, {"callable", is_callable},
    {"escaped", is_escaped},   {"odd", is_odd},
    {"even", is_even},         {"divisibleby", is_divisible},
    {"eq", is_equal},          {"equalto", is_equal},
    {"==", is_equal},          {"ne", is_not_equal},
    {"!=", is_not_equal},      {"lt", is_less},
    {"lessthan", is_less},     {"<", is_less},
    {"le", is_less_equal},     {"<=", is_less_equal},
    {"gt", is_greater},        {"greaterthan", is_greater},
    {">", is_greater},         {"ge", is_greater_equal},
    {">=", is_greater_equal},  {"in", is_in},
    {"sameas", is_same},       {"lower", is_lower},
    {"upper", is_upper},       {"filter", is_filter},
    {"test", is_test},
};

}  // namespace

TestFunction find_test(std::string_view name) {
  for (const TestRow& row : kTests)
    if (name == row.name) return row.function;
  return nullptr;
}

}  // namespace caravan::chat
