// Two JSON schemas as one that accepts what both accept.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace caravan::engine {

// The two accept nothing together.
class ContradictionError : public RequestError {
 public:
  using RequestError::RequestError;
};

// False for keywords that only describe (title, default, ...) or hold definitions; a keyword that no standard knows is
// taken for one.
bool is_constraint(std::string_view keyword);

// Whether schema holds a constraint other than keyword.
bool constrains_beside(const nlohmann::ordered_json& schema, std::string_view keyword);

// Neither has $ref or allOf at its top. path: of b, for errors. Throws ContradictionError, and RequestError where the
// two cannot be combined.
nlohmann::ordered_json merge_schemas(const nlohmann::ordered_json& a, const nlohmann::ordered_json& b,
                                     const std::string& path);

}  // namespace caravan::engine
