// A chat template: Jinja source in, prompts out.
#pragma once

#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "chat/interpreter.h"
#include "chat/value.h"

namespace caravan::chat {

using Json = nlohmann::ordered_json;

// What a chat template renders.
struct RenderInput {
  Json messages = Json::array();      // OpenAI's messages, as the template shall see them
  Json tools;                         // an array, or null: the template sees none
  bool add_generation_prompt = true;  // end with what opens the assistant's answer
  std::string bos_token, eos_token;
  Json extra = Json::object();  // more variables, such as enable_thinking; they win over the ones above
  std::tm now{};                // for strftime_now
};

// The local time, for RenderInput::now.
std::tm local_time_now();

// Parsed once, rendered often, from several threads at once if need be.
class Template {
 public:
  // Throws TemplateError ("TemplateSyntaxError") with the line where the source is malformed.
  explicit Template(std::string source);
  ~Template();
  Template(Template&&) noexcept;
  Template& operator=(Template&&) noexcept;

  const std::string& source() const { return source_; }
  // Throws TemplateError for what the template raises, and beyond the limits.
  std::string render(const RenderInput& input, const RenderLimits& limits = {}) const;
  // The same with the variables given directly, as one JSON object.
  std::string render_variables(const Json& variables, const std::tm& now, const RenderLimits& limits = {}) const;

 private:
  std::string source_;
  std::unique_ptr<const Program> program_;
};

}  // namespace caravan::chat
