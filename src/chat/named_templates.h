// Chat templates by name, for models that bring none and for --chat-template NAME.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::chat {

// Jinja source of the template that this name means; nullopt for an unknown name.
std::optional<std::string> named_template(std::string_view name);

// All names, sorted.
std::vector<std::string> template_names();

}  // namespace caravan::chat
