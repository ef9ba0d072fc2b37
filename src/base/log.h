// Logging: spdlog's default logger on stderr. A line says what happened and, where it helps, what to do next.
#pragma once

#include <spdlog/spdlog.h>

#include <string_view>

namespace caravan {

// Configures the process-wide logger once, from main(): level (trace, debug, info, warn, error, off) and the pattern
// "HH:MM:SS.mmm LEVEL message" on stderr; colours only on a terminal.
void configure_logging(spdlog::level::level_enum level);

// The level of name, or an error (RequestError) that lists the accepted names.
spdlog::level::level_enum parse_log_level(std::string_view name);

}  // namespace caravan
