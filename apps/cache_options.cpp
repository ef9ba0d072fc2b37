#include "cache_options.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>

#include "base/error.h"

namespace caravan::app {

std::filesystem::path default_cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache == '/') return std::filesystem::path(cache) / "caravan";
  const char* home = std::getenv("HOME");
  if (home != nullptr && *home == '/') return std::filesystem::path(home) / ".cache" / "caravan";
  return {};
}

uint64_t parse_size(const std::string& text) {
  const auto refuse = [&] {
    throw RequestError("expected a size such as 20000 (MiB), 500M, 64G or 1.5T, found '" + text + "'");
  };
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (text.empty() || end == text.c_str() || !std::isfinite(number) || number < 0) refuse();
  std::string unit(end);
  std::transform(unit.begin(), unit.end(), unit.begin(), [](unsigned char c) { return std::tolower(c); });
  int shift = 20;
  if (unit == "k" || unit == "kib" || unit == "kb")
    shift = 10;
  else if (unit == "g" || unit == "gib" || unit == "gb")
    shift = 30;
  else if (unit == "t" || unit == "tib" || unit == "tb")
    shift = 40;
  else if (!unit.empty() && unit != "m" && unit != "mib" && unit != "mb")
    refuse();
  const double bytes = std::ldexp(number, shift);
  if (bytes > 0x1p62) refuse();
  return static_cast<uint64_t>(bytes);
}

}  // namespace caravan::app
