#include "base/error.h"

#include <cstdio>
#include <cstdlib>
#include <system_error>

namespace caravan {

SystemError::SystemError(std::string_view what, int error_number)
    : Error(std::string(what) + ": " + std::generic_category().message(error_number)), error_number_(error_number) {}

void assertion_failed(const char* condition, const char* why, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: assertion failed: %s (%s)\n", file, line, condition, why);
  std::abort();
}

}  // namespace caravan
