// How text is shown: dimmed on terminals that want colours, as it is elsewhere.
#pragma once

#include <string>
#include <string_view>

namespace caravan::app {

enum class ColorMode { automatic, on, off };

// Throws RequestError unless value is "on", "off", "auto" or "" (on).
ColorMode parse_color_mode(const std::string& value);

// automatic: file_descriptor is a terminal other than a dumb one, and NO_COLOR is unset or empty (no-color.org).
bool uses_colors(ColorMode mode, int file_descriptor);

// The codes that switch to a style and back; empty without colours.
class Style {
 public:
  explicit Style(bool colors) : colors_(colors) {}
  std::string_view dim() const { return colors_ ? "\x1b[2m" : ""; }
  std::string_view plain() const { return colors_ ? "\x1b[0m" : ""; }

 private:
  bool colors_;
};

}  // namespace caravan::app
