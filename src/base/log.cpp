#include "base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

#include <string>

#include "base/error.h"

namespace caravan {

void configure_logging(spdlog::level::level_enum level) {
  auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>("caravan", sink);
  logger->set_pattern("%H:%M:%S.%e %^%-5l%$ %v");
  logger->set_level(level);
  logger->flush_on(spdlog::level::trace);
  spdlog::set_default_logger(std::move(logger));
}

spdlog::level::level_enum parse_log_level(std::string_view name) {
  for (const auto level :
       {spdlog::level::trace, spdlog::level::debug, spdlog::level::info, spdlog::level::err, spdlog::level::off}) {
    const auto text = spdlog::level::to_string_view(level);
    if (std::string_view(text.data(), text.size()) == name) return level;
  }
  if (name == "warn" || name == "warning") return spdlog::level::warn;
  throw RequestError("log level '" + std::string(name) +
                     "' is not known; accepted: trace, debug, info, warn, error, off");
}

}  // namespace caravan
