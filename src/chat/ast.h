// The syntax tree of a template. Nodes evaluate themselves (evaluate.cpp); the tree is const once parsed, so one
// template may render on several threads at once. Names are numbers: positions in Program::names.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chat/value.h"

namespace caravan::chat {

class Interpreter;
using NameId = uint32_t;
using FilterFunction = Value (*)(Interpreter& interpreter, const Value& input, Arguments& arguments);
using TestFunction = bool (*)(Interpreter& interpreter, const Value& input, Arguments& arguments);

// What follows a statement: the next one, or the loop around it is left or continued.
enum class Flow { next, break_loop, continue_loop };

class Expression {
 public:
  virtual ~Expression() = default;
  virtual Value evaluate(Interpreter& interpreter) const = 0;
  uint32_t line = 0;
  uint32_t depth = 0;  // of the tree below; bounded, so that recursion over it is
};
using ExpressionPointer = std::unique_ptr<const Expression>;

class Statement {
 public:
  virtual ~Statement() = default;
  virtual Flow execute(Interpreter& interpreter) const = 0;
  uint32_t line = 0;
};
using Body = std::vector<std::unique_ptr<const Statement>>;

// ---- expressions

struct LiteralExpression : Expression {
  explicit LiteralExpression(Value v) : value(std::move(v)) {}
  Value evaluate(Interpreter&) const override { return value; }
  Value value;
};

struct NameExpression : Expression {
  explicit NameExpression(NameId n) : name(n) {}
  Value evaluate(Interpreter& interpreter) const override;
  NameId name;
};

struct ListExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  std::vector<ExpressionPointer> items;
  ListKind kind = ListKind::list;
};

struct DictExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  std::vector<std::pair<ExpressionPointer, ExpressionPointer>> entries;
};

struct AttributeExpression : Expression {  // object.name
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer object;
  std::string name;
};

struct SubscriptExpression : Expression {  // object[key]
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer object, key;
};

struct SliceExpression : Expression {  // object[begin:end:step]; null where left out
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer object, begin, end, step;
};

struct CallArguments {
  std::vector<ExpressionPointer> positional;
  std::vector<std::pair<std::string, ExpressionPointer>> named;
  ExpressionPointer unpacked, unpacked_named;  // *args and **kwargs
};

struct CallExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  // With `caller` (may be none) as one more named argument.
  Value call(Interpreter& interpreter, const Value* caller) const;
  ExpressionPointer callee;
  CallArguments arguments;
};

struct FilterExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  Value apply(Interpreter& interpreter, const Value& input) const;
  ExpressionPointer input;  // null in a filter block
  std::string name;
  FilterFunction function = nullptr;  // null: no filter has that name, an error once it is used
  CallArguments arguments;
};

struct TestExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer input;
  std::string name;
  TestFunction function = nullptr;  // null as for filters
  CallArguments arguments;
  bool negated = false;
};

struct ConditionalExpression : Expression {  // then if condition else otherwise
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer condition, then, otherwise;
};

struct LogicExpression : Expression {  // and, or
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer left, right;
  bool is_and = false;
};

enum class UnaryOp { logical_not, minus, plus };
struct UnaryExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  UnaryOp op = UnaryOp::plus;
  ExpressionPointer operand;
};

enum class BinaryOp { add, subtract, multiply, divide, floor_divide, modulo, power };
struct BinaryExpression : Expression {
  Value evaluate(Interpreter& interpreter) const override;
  BinaryOp op = BinaryOp::add;
  ExpressionPointer left, right;
};

struct ConcatExpression : Expression {  // a ~ b ~ c
  Value evaluate(Interpreter& interpreter) const override;
  std::vector<ExpressionPointer> parts;
};

enum class CompareOp { equal, not_equal, less, less_equal, greater, greater_equal, in, not_in };
struct CompareExpression : Expression {  // a < b <= c, as in Python
  Value evaluate(Interpreter& interpreter) const override;
  ExpressionPointer first;
  std::vector<std::pair<CompareOp, ExpressionPointer>> rest;
};

// ---- what is assigned to

struct Target {
  enum class Kind { name, attribute, tuple } kind = Kind::name;
  NameId name = 0;
  std::string attribute;  // of the namespace `name`
  std::vector<Target> parts;
};

// ---- statements

struct TextStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  std::string text;
};

struct OutputStatement : Statement {  // {{ value }}
  Flow execute(Interpreter& interpreter) const override;
  ExpressionPointer value;
};

struct IfStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  std::vector<std::pair<ExpressionPointer, Body>> branches;
  Body otherwise;
};

struct ForStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  Flow loop(Interpreter& interpreter, List items, uint32_t depth) const;
  // What the loop writes, for loop(items).
  std::string render(Interpreter& interpreter, List items, uint32_t depth) const;
  Target target;
  ExpressionPointer iterable, condition;  // condition may be null
  Body body, otherwise;
  bool recursive = false;
};

struct SetStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  Target target;
  ExpressionPointer value;
};

// Filters in the order in which they apply.
using FilterChain = std::vector<std::unique_ptr<const FilterExpression>>;

struct SetBlockStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  Target target;
  FilterChain filters;
  Body body;
};

struct FilterBlockStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  FilterChain filters;
  Body body;
};

struct MacroDefinition {
  struct Parameter {
    NameId name;
    std::string text;
    ExpressionPointer default_value;  // null where there is none
  };
  std::string name;
  std::vector<Parameter> parameters;
  Body body;
  bool uses_caller = false, uses_varargs = false, uses_kwargs = false;
};

struct MacroStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  NameId name = 0;
  MacroDefinition macro;
};

struct CallBlockStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  std::unique_ptr<const CallExpression> call;
  MacroDefinition macro;  // the block, as `caller`
};

struct WithStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  std::vector<std::pair<Target, ExpressionPointer>> assignments;
  Body body;
};

// A block that only groups: {% block %}, {% autoescape false %}, {% generation %}.
struct GroupStatement : Statement {
  Flow execute(Interpreter& interpreter) const override;
  Body body;
};

struct JumpStatement : Statement {
  Flow execute(Interpreter&) const override { return flow; }
  Flow flow = Flow::next;
};

// A parsed template.
struct Program {
  Body body;
  std::vector<std::string> names;
  // The numbers of the names that every macro may ask for.
  NameId caller = 0, varargs = 0, kwargs = 0, loop = 0;
};

}  // namespace caravan::chat
