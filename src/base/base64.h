// Base64 with padding, RFC 4648 section 4.
#pragma once

#include <string>
#include <string_view>

namespace caravan {

// The base64 text of bytes.
std::string base64_encode(std::string_view bytes);

}  // namespace caravan
