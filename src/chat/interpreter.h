// One rendering of a template: scopes, output, and the limits that keep a hostile template from running or growing
// without end.
#pragma once

#include <ctime>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chat/ast.h"
#include "chat/value.h"

namespace caravan::chat {

// Bounds of one rendering; beyond them it ends with a LimitError.
struct RenderLimits {
  uint64_t max_steps = 20'000'000;       // expressions and statements
  uint64_t max_bytes = 256ull << 20;     // of all strings and lists built on the way
  uint64_t max_output_bytes = 32 << 20;  // of the result
};

// Variables of a macro call, a loop iteration or another block with its own names.
struct Scope {
  Scope* parent = nullptr;
  std::vector<std::pair<NameId, Value>> variables;
  bool captured = false;  // a macro was defined inside: it must outlive its block
};

// namespace(): the one kind of object that a template changes.
class Namespace : public Object {
 public:
  std::string type_name() const override { return "Namespace"; }
  std::optional<Value> attribute(std::string_view name) const override;
  void set(const std::string& name, Value value) const;
  void clear() const { values_.clear(); }

 private:
  mutable std::vector<std::pair<std::string, Value>> values_;
};

class Interpreter {
 public:
  // context: a dict of the template's variables. now: for strftime_now.
  Interpreter(const Program& program, const Value& context, const std::tm& now, const RenderLimits& limits);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  // The rendered text. Throws TemplateError with the line where it happened. Once per object.
  std::string run();

  // ---- for the nodes
  Value eval(const Expression& expression);
  Flow run_body(const Body& body);
  // What the body, or f(), writes, as a string.
  std::string capture_body(const Body& body);
  template <typename F>
  std::string capture(F&& f) {
    std::string text;
    std::string* const outer = std::exchange(out_, &text);
    f();  // what it throws ends the rendering
    out_ = outer;
    return text;
  }
  void write(std::string_view text);
  Value lookup(NameId name) const;
  void assign(const Target& target, const Value& value);
  Arguments evaluate(const CallArguments& arguments);
  const Program& program() const { return program_; }

  // A scope from construction to destruction; a captured one is kept until the rendering ends.
  class ScopeGuard {
   public:
    // parent: null means the current scope.
    explicit ScopeGuard(Interpreter& interpreter, Scope* parent = nullptr);
    ~ScopeGuard();
    ScopeGuard(const ScopeGuard&) = delete;
    ScopeGuard& operator=(const ScopeGuard&) = delete;
    // As if destroyed and constructed again.
    void renew();
    void set(NameId name, Value value) { scope_->variables.emplace_back(name, std::move(value)); }

   private:
    Interpreter& interpreter_;
    Scope* previous_;
    Scope* parent_;
    std::unique_ptr<Scope> scope_;
  };
  // The current scope, which must live on with all around it.
  Scope* capture_scope();

  // ---- Python's and Jinja's operations
  Value attribute(const Value& object, const std::string& name);
  Value subscript(const Value& object, const Value& key);
  Value call(const Value& callee, Arguments& arguments);
  Value new_namespace();
  Value binary(BinaryOp op, const Value& left, const Value& right);

  // A string value; counts its bytes.
  Value text(std::string text);
  Value text_like(const Value& model, std::string text);  // Markup where model is
  Value list(List items, ListKind kind = ListKind::list);
  // Counts work or memory; throws LimitError beyond the limits.
  void charge_bytes(uint64_t n);
  void step(uint64_t n = 1);
  // Throws LimitError before something of n bytes is built.
  void check_size(uint64_t n_bytes) const;
  [[noreturn]] void fail(const char* kind, const std::string& message) const;
  // Throws when the value is undefined, as every use of it does but output and tests.
  void require_defined(const Value& value) const;
  const std::tm& now() const { return now_; }
  void at_line(uint32_t line) { line_ = line; }

 private:
  const Program& program_;
  std::tm now_;
  RenderLimits limits_;
  std::vector<std::pair<bool, Value>> globals_;  // by NameId: the outermost scope; first: it is set
  Scope outermost_;                              // holds nothing itself: its variables are globals_
  Scope* scope_ = &outermost_;
  std::deque<std::unique_ptr<Scope>> kept_scopes_;
  std::vector<std::shared_ptr<const Namespace>> namespaces_;  // emptied at the end: they may hold themselves
  std::string output_;
  std::string* out_ = &output_;
  uint64_t n_steps_ = 0, n_bytes_ = 0;
  uint32_t depth_ = 0, line_ = 0;
};

}  // namespace caravan::chat
