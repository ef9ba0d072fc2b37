// The filters, tests, methods and global functions that templates may use, by name.
#pragma once

#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "chat/ast.h"

namespace caravan::chat {

// nullptr where no filter or test has that name.
FilterFunction find_filter(std::string_view name);
TestFunction find_test(std::string_view name);

using MethodFunction = Value (*)(Interpreter& interpreter, const Value& self, Arguments& arguments);
// A method of a string, list, tuple, dict or float; nullptr where the type has none of that name.
MethodFunction find_method(const Value& self, std::string_view name);
// Whether Python has this method for the type and it would change the value: templates may not call it.
bool is_mutating_method(const Value& self, std::string_view name);

// A global function (range, dict, namespace, raise_exception, strftime_now, ...); nullopt where none has that name.
std::optional<Value> find_global(std::string_view name);

// Arguments matched to parameter names, in their order; nullopt where not given. `what` is for the TypeError that too
// many, unknown or doubled arguments cause.
std::vector<std::optional<Value>> bind(Arguments& arguments, std::initializer_list<const char*> parameters,
                                       const char* what);
// The one argument of that name or place, or the default.
int64_t integer_or(const std::optional<Value>& argument, int64_t otherwise, const char* what);
bool boolean_or(const std::optional<Value>& argument, bool otherwise);
std::string text_or(const std::optional<Value>& argument, const char* otherwise, const char* what);

// "text" % arguments
Value percent_format(Interpreter& interpreter, const Value& format, const Value& arguments);
// "text".format(...)
Value brace_format(Interpreter& interpreter, const Value& format, const Arguments& arguments);

}  // namespace caravan::chat
