#include "chat/template.h"

#include <utility>

#include "chat/parser.h"

namespace caravan::chat {

std::tm local_time_now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm local{};
  localtime_r(&seconds, &local);
  return local;
}

Template::Template(std::string source)
    : source_(std::move(source)), program_(std::make_unique<const Program>(parse_template(source_))) {}

Template::~Template() = default;
Template::Template(Template&&) noexcept = default;
Template& Template::operator=(Template&&) noexcept = default;

std::string Template::render(const RenderInput& input, const RenderLimits& limits) const {
  DictBuilder variables;
  const auto set = [&](const char* name, Value value) { variables.set(Value::text(name), std::move(value)); };
  set("messages", Value::from_json(input.messages));
  if (!input.tools.is_null()) set("tools", Value::from_json(input.tools));
  set("add_generation_prompt", Value::boolean(input.add_generation_prompt));
  set("bos_token", Value::text(input.bos_token));
  set("eos_token", Value::text(input.eos_token));
  for (const auto& [name, value] : input.extra.items()) set(name.c_str(), Value::from_json(value));
  return Interpreter(*program_, variables.build(), input.now, limits).run();
}

std::string Template::render_variables(const Json& variables, const std::tm& now, const RenderLimits& limits) const {
  return Interpreter(*program_, Value::from_json(variables), now, limits).run();
}

}  // namespace caravan::chat
