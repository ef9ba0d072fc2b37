// Tool calls written as Python: [name(key="value", other=[1, 2]), ...].
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace caravan::chat {

// Name and arguments (a JSON object) of each call; nullopt where the text is not such a list of calls with literal
// keyword arguments.
std::optional<std::vector<std::pair<std::string, std::string>>> parse_python_calls(std::string_view text);

}  // namespace caravan::chat
