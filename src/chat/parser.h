// Tokens -> syntax tree. Grammar: Jinja2 3.1 with loop controls and the `generation` block of Hugging Face's templates.
// {% include %}, {% import %}, {% extends %} are refused: a chat template is one text. Nesting is bounded.
#pragma once

#include <string_view>

#include "chat/ast.h"

namespace caravan::chat {

// Throws TemplateError ("TemplateSyntaxError") with the line and what was expected there.
Program parse_template(std::string_view source);

}  // namespace caravan::chat
