#include "terminal.h"

#include <unistd.h>

#include <cstdlib>

#include "base/error.h"

namespace caravan::app {

ColorMode parse_color_mode(const std::string& value) {
  if (value == "auto") return ColorMode::automatic;
  if (value == "on" || value.empty()) return ColorMode::on;
  if (value == "off") return ColorMode::off;
  throw RequestError("expected on, off or auto, found '" + value + "'");
}

bool uses_colors(ColorMode mode, int file_descriptor) {
  if (mode != ColorMode::automatic) return mode == ColorMode::on;
  const char* no_color = std::getenv("NO_COLOR");
  if (no_color != nullptr && *no_color != '\0') return false;
  const char* terminal = std::getenv("TERM");
  if (terminal == nullptr || std::string_view(terminal) == "dumb") return false;
  return isatty(file_descriptor) == 1;
}

}  // namespace caravan::app
