#include "chat/parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <unordered_map>

#include "chat/builtins.h"
#include "chat/lexer.h"

namespace caravan::chat {
namespace {

constexpr uint32_t kMaxTreeDepth = 300;    // of one expression
constexpr uint32_t kMaxBlockNesting = 60;  // of statements

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokenize_template(source)) {
    program_.caller = intern("caller");
    program_.varargs = intern("varargs");
    program_.kwargs = intern("kwargs");
    program_.loop = intern("loop");
  }

  Program run() {
    program_.body = parse_body({});
    if (current().kind != TokenKind::end) fail("unexpected end of the template");
    return std::move(program_);
  }

 private:
  // ---- tokens

  const Token& current() const { return tokens_[at_]; }
  const Token& look_ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void advance() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  bool is_op(std::string_view op) const { return current().kind == TokenKind::op && current().text == op; }
  bool is_word(std::string_view word) const { return current().kind == TokenKind::name && current().text == word; }
  bool skip_op(std::string_view op) {
    if (!is_op(op)) return false;
    advance();
    return true;
  }
  bool skip_word(std::string_view word) {
    if (!is_word(word)) return false;
    advance();
    return true;
  }
  [[noreturn]] void fail(const std::string& message) const {
    throw TemplateError("TemplateSyntaxError", message, current().line);
  }
  std::string describe_current() const {
    switch (current().kind) {
      case TokenKind::end:
        return "end of template";
      case TokenKind::block_end:
      case TokenKind::variable_end:
        return "end of tag";
      case TokenKind::block_begin:
        return "begin of a tag";
      case TokenKind::variable_begin:
        return "begin of an output";
      case TokenKind::data:
        return "text";
      default:
        return "'" + current().text.substr(0, 40) + "'";
    }
  }
  void expect_op(std::string_view op) {
    if (!skip_op(op)) fail(fmt::format("expected '{}', found {}", op, describe_current()));
  }
  std::string expect_name(const char* what) {
    if (current().kind != TokenKind::name) fail(fmt::format("expected {}, found {}", what, describe_current()));
    std::string name = current().text;
    advance();
    return name;
  }
  void expect_block_end(const char* statement) {
    if (current().kind != TokenKind::block_end)
      fail(fmt::format("expected the end of '{}', found {}", statement, describe_current()));
    advance();
  }

  NameId intern(const std::string& name) {
    const auto [it, added] = name_ids_.emplace(name, static_cast<NameId>(program_.names.size()));
    if (added) program_.names.push_back(name);
    return it->second;
  }

  // ---- building

  template <typename Node>
  std::unique_ptr<Node> make() const {
    auto node = std::make_unique<Node>();
    node->line = current().line;
    return node;
  }
  // Notes that child hangs below node.
  void below(Expression& node, const Expression* child) const {
    if (child == nullptr) return;
    node.depth = std::max(node.depth, child->depth + 1);
    if (node.depth > kMaxTreeDepth) fail(fmt::format("an expression nested more than {} deep", kMaxTreeDepth));
  }
  void below(Expression& node, const ExpressionPointer& child) const { below(node, child.get()); }
  void below(Expression& node, const CallArguments& arguments) const {
    for (const auto& a : arguments.positional) below(node, a);
    for (const auto& a : arguments.named) below(node, a.second);
    below(node, arguments.unpacked);
    below(node, arguments.unpacked_named);
  }
  ExpressionPointer literal(Value value) const {
    auto node = std::make_unique<LiteralExpression>(std::move(value));
    node->line = current().line;
    return node;
  }

  // Bounds the recursion of the parser itself.
  struct Nesting {
    explicit Nesting(Parser& p) : parser(p) {
      if (++parser.nesting_ > kMaxTreeDepth) parser.fail("an expression nested too deep");
    }
    ~Nesting() { --parser.nesting_; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;
    Parser& parser;
  };

  // ---- statements

  // Statements up to one of the ending words (not consumed beyond "{% word"), or to the end of the template.
  Body parse_body(std::initializer_list<std::string_view> ends) {
    if (++block_nesting_ > kMaxBlockNesting) fail(fmt::format("blocks nested more than {} deep", kMaxBlockNesting));
    Body body;
    for (;;) {
      if (current().kind == TokenKind::data) {
        auto node = make<TextStatement>();
        node->text = current().text;
        body.push_back(std::move(node));
        advance();
      } else if (current().kind == TokenKind::variable_begin) {
        body.push_back(parse_output());
      } else if (current().kind == TokenKind::block_begin) {
        const Token& word = look_ahead();
        if (word.kind == TokenKind::name && std::find(ends.begin(), ends.end(), word.text) != ends.end()) {
          advance();
          break;
        }
        advance();
        body.push_back(parse_statement());
      } else if (ends.size() == 0) {
        break;
      } else {
        fail(fmt::format("unexpected end of template, expected '{}'", *(ends.end() - 1)));
      }
    }
    --block_nesting_;
    return body;
  }

  // A body that ends with {% word %}, which is consumed.
  Body parse_body_until(std::string_view word, const char* statement) {
    Body body = parse_body({word});
    advance();
    expect_block_end(statement);
    return body;
  }

  std::unique_ptr<const Statement> parse_output() {
    auto node = make<OutputStatement>();
    advance();
    node->value = parse_tuple(Condition::allowed);
    if (current().kind != TokenKind::variable_end)
      fail(fmt::format("expected the end of the output, found {}", describe_current()));
    advance();
    return node;
  }

  std::unique_ptr<const Statement> parse_statement() {
    const uint32_t line = current().line;
    const std::string word = expect_name("the name of a tag");
    std::unique_ptr<Statement> node = parse_tag(word);
    node->line = line;
    return node;
  }

  std::unique_ptr<Statement> parse_tag(const std::string& word) {
    if (word == "if") return parse_if();
    if (word == "for") return parse_for();
    if (word == "set") return parse_set();
    if (word == "macro") return parse_macro();
    if (word == "call") return parse_call_block();
    if (word == "filter") return parse_filter_block();
    if (word == "with") return parse_with();
    if (word == "break" || word == "continue") return parse_jump(word);
    if (word == "generation") {
      auto node = make<GroupStatement>();
      expect_block_end("generation");
      node->body = parse_body_until("endgeneration", "endgeneration");
      return node;
    }
    if (word == "block") return parse_block();
    if (word == "autoescape") return parse_autoescape();
    if (word == "include" || word == "import" || word == "from" || word == "extends")
      fail(fmt::format("'{}' is not supported: a chat template is one text", word));
    fail(fmt::format("unknown tag '{}'", word));
  }

  std::unique_ptr<Statement> parse_if() {
    auto node = make<IfStatement>();
    for (;;) {
      ExpressionPointer condition = parse_tuple(Condition::excluded);
      expect_block_end("if");
      node->branches.emplace_back(std::move(condition), parse_body({"elif", "else", "endif"}));
      if (skip_word("elif")) continue;
      if (skip_word("else")) {
        expect_block_end("else");
        node->otherwise = parse_body({"endif"});
      }
      advance();
      expect_block_end("endif");
      return node;
    }
  }

  std::unique_ptr<Statement> parse_for() {
    auto node = make<ForStatement>();
    node->target = parse_target(TargetUse::loop);
    if (!skip_word("in")) fail(fmt::format("expected 'in', found {}", describe_current()));
    node->iterable = parse_tuple(Condition::excluded);
    if (skip_word("if")) node->condition = parse_expression();
    node->recursive = skip_word("recursive");
    expect_block_end("for");
    ++loop_nesting_;
    node->body = parse_body({"else", "endfor"});
    --loop_nesting_;
    if (skip_word("else")) {
      expect_block_end("else");
      node->otherwise = parse_body({"endfor"});
    }
    advance();
    expect_block_end("endfor");
    return node;
  }

  std::unique_ptr<Statement> parse_jump(const std::string& word) {
    auto node = make<JumpStatement>();
    if (loop_nesting_ == 0) fail(fmt::format("'{}' outside a loop", word));
    node->flow = word == "break" ? Flow::break_loop : Flow::continue_loop;
    expect_block_end(word.c_str());
    return node;
  }

  FilterChain parse_filter_chain() {
    FilterChain filters;
    do filters.push_back(parse_filter_call(nullptr));
    while (skip_op("|"));
    return filters;
  }

  std::unique_ptr<Statement> parse_set() {
    Target target = parse_target(TargetUse::set);
    if (skip_op("=")) {
      auto node = make<SetStatement>();
      node->target = std::move(target);
      node->value = parse_tuple(Condition::allowed);
      expect_block_end("set");
      return node;
    }
    auto node = make<SetBlockStatement>();
    node->target = std::move(target);
    if (skip_op("|")) node->filters = parse_filter_chain();
    expect_block_end("set");
    node->body = parse_body_until("endset", "endset");
    return node;
  }

  std::unique_ptr<Statement> parse_filter_block() {
    auto node = make<FilterBlockStatement>();
    node->filters = parse_filter_chain();
    expect_block_end("filter");
    node->body = parse_body_until("endfilter", "endfilter");
    return node;
  }

  std::unique_ptr<Statement> parse_with() {
    auto node = make<WithStatement>();
    while (current().kind != TokenKind::block_end) {
      if (!node->assignments.empty()) expect_op(",");
      Target target = parse_target(TargetUse::loop);
      expect_op("=");
      node->assignments.emplace_back(std::move(target), parse_expression());
    }
    expect_block_end("with");
    node->body = parse_body_until("endwith", "endwith");
    return node;
  }

  std::unique_ptr<Statement> parse_block() {
    auto node = make<GroupStatement>();
    const std::string name = expect_name("the name of the block");
    skip_word("scoped");
    skip_word("required");
    expect_block_end("block");
    node->body = parse_body({"endblock"});
    advance();
    if (is_word(name)) advance();
    expect_block_end("endblock");
    return node;
  }

  std::unique_ptr<Statement> parse_autoescape() {
    auto node = make<GroupStatement>();
    if (!skip_word("false") && !skip_word("False")) fail("'autoescape' is supported with false only");
    expect_block_end("autoescape");
    node->body = parse_body_until("endautoescape", "endautoescape");
    return node;
  }

  // "(a, b=1)"
  void parse_parameters(MacroDefinition& macro) {
    expect_op("(");
    while (!is_op(")")) {
      if (!macro.parameters.empty()) expect_op(",");
      if (is_op(")")) break;
      MacroDefinition::Parameter parameter{};
      parameter.text = expect_name("the name of a parameter");
      parameter.name = intern(parameter.text);
      if (skip_op("=")) {
        parameter.default_value = parse_expression();
      } else if (!macro.parameters.empty() && macro.parameters.back().default_value) {
        fail("a parameter without a default follows one that has one");
      }
      macro.parameters.push_back(std::move(parameter));
    }
    expect_op(")");
  }

  void parse_macro_body(MacroDefinition& macro, std::string_view end) {
    MacroDefinition* outer = std::exchange(macro_, &macro);
    const uint32_t outer_loops = std::exchange(loop_nesting_, 0);
    macro.body = parse_body_until(end, "macro");
    loop_nesting_ = outer_loops;
    macro_ = outer;
  }

  std::unique_ptr<Statement> parse_macro() {
    auto node = make<MacroStatement>();
    node->macro.name = expect_name("the name of the macro");
    node->name = intern(node->macro.name);
    parse_parameters(node->macro);
    expect_block_end("macro");
    parse_macro_body(node->macro, "endmacro");
    return node;
  }

  std::unique_ptr<Statement> parse_call_block() {
    auto node = make<CallBlockStatement>();
    node->macro.name = "caller";
    if (is_op("(")) parse_parameters(node->macro);
    ExpressionPointer call = parse_expression();
    const auto* as_call = dynamic_cast<const CallExpression*>(call.get());
    if (as_call == nullptr) fail("expected a call after 'call'");
    call.release();
    node->call.reset(as_call);
    expect_block_end("call");
    parse_macro_body(node->macro, "endcall");
    return node;
  }

  enum class TargetUse { set, loop };

  Target parse_single_target(TargetUse use) {
    Target target;
    if (skip_op("(")) {
      target = parse_target(use);
      expect_op(")");
      return target;
    }
    const std::string name = expect_name("a name to assign to");
    for (const char* word : {"true", "false", "none", "True", "False", "None", "not", "and", "or", "if", "else", "is"})
      if (name == word) fail(fmt::format("cannot assign to '{}'", name));
    target.name = intern(name);
    if (use == TargetUse::set && skip_op(".")) {
      target.kind = Target::Kind::attribute;
      target.attribute = expect_name("the name of an attribute");
    }
    return target;
  }

  Target parse_target(TargetUse use) {
    const Nesting nesting(*this);
    Target first = parse_single_target(use);
    if (!is_op(",")) return first;
    Target tuple;
    tuple.kind = Target::Kind::tuple;
    tuple.parts.push_back(std::move(first));
    while (skip_op(",")) {
      if (is_op("=") || is_op(")") || is_word("in")) break;
      tuple.parts.push_back(parse_single_target(use));
    }
    return tuple;
  }

  // ---- expressions

  enum class Condition { allowed, excluded };  // whether "a if b else c" may stand here

  ExpressionPointer parse_one(Condition condition) {
    return condition == Condition::allowed ? parse_expression() : parse_or();
  }

  bool at_tuple_end() const {
    return current().kind == TokenKind::variable_end || current().kind == TokenKind::block_end || is_op(")") ||
           is_word("recursive");
  }

  // One expression, or a tuple of those with commas between.
  ExpressionPointer parse_tuple(Condition condition) {
    ExpressionPointer first = parse_one(condition);
    if (!is_op(",")) return first;
    auto tuple = make<ListExpression>();
    tuple->kind = ListKind::tuple;
    below(*tuple, first);
    tuple->items.push_back(std::move(first));
    while (skip_op(",")) {
      if (at_tuple_end()) break;
      tuple->items.push_back(parse_one(condition));
      below(*tuple, tuple->items.back());
    }
    return tuple;
  }

  ExpressionPointer parse_expression() {
    const Nesting nesting(*this);
    ExpressionPointer value = parse_or();
    while (is_word("if")) {
      auto node = make<ConditionalExpression>();
      advance();
      node->condition = parse_or();
      if (skip_word("else")) node->otherwise = parse_expression();
      node->then = std::move(value);
      below(*node, node->condition);
      below(*node, node->then);
      below(*node, node->otherwise);
      value = std::move(node);
    }
    return value;
  }

  ExpressionPointer parse_logic(const char* word, ExpressionPointer (Parser::*operand)()) {
    ExpressionPointer left = (this->*operand)();
    while (is_word(word)) {
      auto node = make<LogicExpression>();
      advance();
      node->is_and = word[0] == 'a';
      node->left = std::move(left);
      node->right = (this->*operand)();
      below(*node, node->left);
      below(*node, node->right);
      left = std::move(node);
    }
    return left;
  }
  ExpressionPointer parse_or() { return parse_logic("or", &Parser::parse_and); }
  ExpressionPointer parse_and() { return parse_logic("and", &Parser::parse_not); }

  ExpressionPointer parse_not() {
    if (!is_word("not")) return parse_compare();
    const Nesting nesting(*this);
    auto node = make<UnaryExpression>();
    advance();
    node->op = UnaryOp::logical_not;
    node->operand = parse_not();
    below(*node, node->operand);
    return node;
  }

  bool read_compare_op(CompareOp& op) {
    static constexpr std::pair<std::string_view, CompareOp> kOps[] = {
        {"==", CompareOp::equal},      {"!=", CompareOp::not_equal}, {"<", CompareOp::less},
        {"<=", CompareOp::less_equal}, {">", CompareOp::greater},    {">=", CompareOp::greater_equal}};
    for (const auto& [text, value] : kOps)
      if (skip_op(text)) {
        op = value;
        return true;
      }
    if (skip_word("in")) {
      op = CompareOp::in;
      return true;
    }
    if (is_word("not") && look_ahead().kind == TokenKind::name && look_ahead().text == "in") {
      advance();
      advance();
      op = CompareOp::not_in;
      return true;
    }
    return false;
  }

  ExpressionPointer parse_compare() {
    ExpressionPointer first = parse_sum();
    CompareOp op{};
    auto node = make<CompareExpression>();
    while (read_compare_op(op)) {
      node->rest.emplace_back(op, parse_sum());
      below(*node, node->rest.back().second);
    }
    if (node->rest.empty()) return first;
    below(*node, first);
    node->first = std::move(first);
    return node;
  }

  // A chain of left-associative operators.
  ExpressionPointer parse_chain(std::initializer_list<std::pair<std::string_view, BinaryOp>> ops,
                                ExpressionPointer (Parser::*operand)()) {
    ExpressionPointer left = (this->*operand)();
    for (;;) {
      const auto op = std::find_if(ops.begin(), ops.end(), [&](const auto& o) { return is_op(o.first); });
      if (op == ops.end()) return left;
      auto node = make<BinaryExpression>();
      advance();
      node->op = op->second;
      node->left = std::move(left);
      node->right = (this->*operand)();
      below(*node, node->left);
      below(*node, node->right);
      left = std::move(node);
    }
  }

  ExpressionPointer parse_sum() {
    return parse_chain({{"+", BinaryOp::add}, {"-", BinaryOp::subtract}}, &Parser::parse_concat);
  }

  ExpressionPointer parse_concat() {
    ExpressionPointer first = parse_product();
    if (!is_op("~")) return first;
    auto node = make<ConcatExpression>();
    below(*node, first);
    node->parts.push_back(std::move(first));
    while (skip_op("~")) {
      node->parts.push_back(parse_product());
      below(*node, node->parts.back());
    }
    return node;
  }

  ExpressionPointer parse_product() {
    return parse_chain(
        {{"*", BinaryOp::multiply}, {"/", BinaryOp::divide}, {"//", BinaryOp::floor_divide}, {"%", BinaryOp::modulo}},
        &Parser::parse_power);
  }
  ExpressionPointer parse_power() { return parse_chain({{"**", BinaryOp::power}}, &Parser::parse_filtered_unary); }
  ExpressionPointer parse_filtered_unary() { return parse_unary(true); }

  ExpressionPointer parse_unary(bool with_filters) {
    const Nesting nesting(*this);
    ExpressionPointer value;
    if (is_op("-") || is_op("+")) {
      auto node = make<UnaryExpression>();
      node->op = is_op("-") ? UnaryOp::minus : UnaryOp::plus;
      advance();
      node->operand = parse_unary(false);
      below(*node, node->operand);
      value = std::move(node);
    } else {
      value = parse_primary();
    }
    value = parse_postfix(std::move(value));
    return with_filters ? parse_filters(std::move(value)) : std::move(value);
  }

  ExpressionPointer parse_primary() {
    const Token& token = current();
    switch (token.kind) {
      case TokenKind::name:
        return parse_name();
      case TokenKind::string: {
        std::string text;
        ExpressionPointer node;
        while (current().kind == TokenKind::string) {  // adjacent strings are one
          text += current().text;
          advance();
        }
        return literal(Value::text(std::move(text)));
      }
      case TokenKind::integer:
      case TokenKind::real: {
        ExpressionPointer node = literal(parse_number(token));
        advance();
        return node;
      }
      default:
        break;
    }
    if (is_op("(")) return parse_parenthesis();
    if (is_op("[")) return parse_list();
    if (is_op("{")) return parse_dict();
    fail(fmt::format("expected an expression, found {}", describe_current()));
  }

  Value parse_number(const Token& token) const {
    const char *begin = token.text.data(), *end = begin + token.text.size();
    if (token.kind == TokenKind::real) {
      double value = 0;
      std::from_chars(begin, end, value);
      return Value::real(value);
    }
    std::string digits = token.text;
    std::erase(digits, '_');
    int base = 10;
    if (digits.size() > 2 && digits[0] == '0' && digits[1] > '9') {
      base = (digits[1] | 0x20) == 'x' ? 16 : (digits[1] | 0x20) == 'o' ? 8 : 2;
      digits.erase(0, 2);
    }
    int64_t value = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size())
      fail(fmt::format("'{}' is not an integer of 64 bits", token.text.substr(0, 40)));
    return Value::integer(value);
  }

  ExpressionPointer parse_name() {
    const std::string& name = current().text;
    ExpressionPointer node;
    if (name == "true" || name == "True" || name == "false" || name == "False") {
      node = literal(Value::boolean(name[0] == 't' || name[0] == 'T'));
    } else if (name == "none" || name == "None") {
      node = literal(Value());
    } else {
      if (macro_ != nullptr) {
        if (name == "caller") macro_->uses_caller = true;
        if (name == "varargs") macro_->uses_varargs = true;
        if (name == "kwargs") macro_->uses_kwargs = true;
      }
      auto reference = std::make_unique<NameExpression>(intern(name));
      reference->line = current().line;
      node = std::move(reference);
    }
    advance();
    return node;
  }

  ExpressionPointer parse_parenthesis() {
    advance();
    if (is_op(")")) {
      auto empty = make<ListExpression>();
      empty->kind = ListKind::tuple;
      advance();
      return empty;
    }
    ExpressionPointer inner = parse_tuple(Condition::allowed);
    expect_op(")");
    return inner;
  }

  ExpressionPointer parse_list() {
    auto node = make<ListExpression>();
    advance();
    while (!is_op("]")) {
      if (!node->items.empty()) expect_op(",");
      if (is_op("]")) break;
      node->items.push_back(parse_expression());
      below(*node, node->items.back());
    }
    expect_op("]");
    return node;
  }

  ExpressionPointer parse_dict() {
    auto node = make<DictExpression>();
    advance();
    while (!is_op("}")) {
      if (!node->entries.empty()) expect_op(",");
      if (is_op("}")) break;
      ExpressionPointer key = parse_expression();
      expect_op(":");
      ExpressionPointer value = parse_expression();
      below(*node, key);
      below(*node, value);
      node->entries.emplace_back(std::move(key), std::move(value));
    }
    expect_op("}");
    return node;
  }

  ExpressionPointer parse_postfix(ExpressionPointer value) {
    for (;;) {
      if (is_op(".")) {
        value = parse_attribute(std::move(value));
      } else if (is_op("[")) {
        value = parse_subscript(std::move(value));
      } else if (is_op("(")) {
        value = parse_call(std::move(value));
      } else {
        return value;
      }
    }
  }

  // Filters, tests and calls behind a value.
  ExpressionPointer parse_filters(ExpressionPointer value) {
    for (;;) {
      if (is_op("|")) {
        advance();
        value = parse_filter_call(std::move(value));
      } else if (is_word("is")) {
        value = parse_test(std::move(value));
      } else if (is_op("(")) {
        value = parse_call(std::move(value));
      } else {
        return value;
      }
    }
  }

  ExpressionPointer parse_attribute(ExpressionPointer object) {
    advance();
    if (current().kind == TokenKind::integer) {
      auto node = make<SubscriptExpression>();
      node->key = literal(parse_number(current()));
      advance();
      node->object = std::move(object);
      below(*node, node->object);
      return node;
    }
    auto node = make<AttributeExpression>();
    node->name = expect_name("the name of an attribute");
    node->object = std::move(object);
    below(*node, node->object);
    return node;
  }

  ExpressionPointer parse_subscript(ExpressionPointer object) {
    const uint32_t line = current().line;
    advance();
    ExpressionPointer begin, end, step;
    if (!is_op(":")) begin = parse_tuple(Condition::allowed);
    if (skip_op("]")) {
      auto node = make<SubscriptExpression>();
      node->line = line;
      node->object = std::move(object);
      node->key = std::move(begin);
      below(*node, node->object);
      below(*node, node->key);
      return node;
    }
    expect_op(":");
    if (!is_op(":") && !is_op("]")) end = parse_expression();
    if (skip_op(":") && !is_op("]")) step = parse_expression();
    expect_op("]");
    auto node = make<SliceExpression>();
    node->line = line;
    for (const ExpressionPointer* part : {&object, &begin, &end, &step}) below(*node, *part);
    node->object = std::move(object);
    node->begin = std::move(begin);
    node->end = std::move(end);
    node->step = std::move(step);
    return node;
  }

  // "(a, *b, c=1, **d)"
  CallArguments parse_arguments() {
    CallArguments arguments;
    expect_op("(");
    bool first = true;
    while (!is_op(")")) {
      if (!std::exchange(first, false)) expect_op(",");
      if (is_op(")")) break;
      if (skip_op("**")) {
        if (arguments.unpacked_named) fail("'**' twice in one call");
        arguments.unpacked_named = parse_expression();
      } else if (skip_op("*")) {
        if (arguments.unpacked || arguments.unpacked_named) fail("'*' in an unexpected place of a call");
        arguments.unpacked = parse_expression();
      } else if (current().kind == TokenKind::name && look_ahead().kind == TokenKind::op && look_ahead().text == "=") {
        std::string name = expect_name("the name of an argument");
        advance();
        arguments.named.emplace_back(std::move(name), parse_expression());
      } else {
        if (!arguments.named.empty() || arguments.unpacked_named) fail("a positional argument after a named one");
        arguments.positional.push_back(parse_expression());
      }
    }
    expect_op(")");
    return arguments;
  }

  ExpressionPointer parse_call(ExpressionPointer callee) {
    auto node = make<CallExpression>();
    node->arguments = parse_arguments();
    node->callee = std::move(callee);
    below(*node, node->callee);
    below(*node, node->arguments);
    return node;
  }

  std::string parse_dotted_name(const char* what) {
    std::string name = expect_name(what);
    while (skip_op(".")) name += "." + expect_name(what);
    return name;
  }

  std::unique_ptr<const FilterExpression> parse_filter_call(ExpressionPointer input) {
    auto node = make<FilterExpression>();
    node->name = parse_dotted_name("the name of a filter");
    node->function = find_filter(node->name);
    if (is_op("(")) node->arguments = parse_arguments();
    node->input = std::move(input);
    below(*node, node->input);
    below(*node, node->arguments);
    return node;
  }

  bool at_test_argument() const {
    switch (current().kind) {
      case TokenKind::name:
        return !is_word("else") && !is_word("or") && !is_word("and");
      case TokenKind::string:
      case TokenKind::integer:
      case TokenKind::real:
        return true;
      default:
        return is_op("[") || is_op("{");
    }
  }

  ExpressionPointer parse_test(ExpressionPointer input) {
    auto node = make<TestExpression>();
    advance();
    node->negated = skip_word("not");
    node->name = parse_dotted_name("the name of a test");
    node->function = find_test(node->name);
    if (is_op("(")) {
      node->arguments = parse_arguments();
    } else if (at_test_argument()) {
      if (is_word("is")) fail("tests cannot be chained with 'is'");
      node->arguments.positional.push_back(parse_postfix(parse_primary()));
    }
    node->input = std::move(input);
    below(*node, node->input);
    below(*node, node->arguments);
    return node;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  Program program_;
  std::unordered_map<std::string, NameId> name_ids_;
  MacroDefinition* macro_ = nullptr;  // whose body is being parsed
  uint32_t nesting_ = 0, block_nesting_ = 0, loop_nesting_ = 0;
};

}  // namespace

Program parse_template(std::string_view source) { return Parser(source).run(); }

}  // namespace caravan::chat
