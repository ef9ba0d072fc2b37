#include "support/kit.h"

#include <unistd.h>

#include <cstring>

namespace caravan::testing {

std::optional<std::filesystem::path> kit_directory() {
  const char* chosen = std::getenv("CARAVAN_KIT_DIR");
  const std::filesystem::path path = chosen != nullptr ? chosen : CARAVAN_SOURCE_DIR "/../shared/kit";
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return std::nullopt;
  return path;
}

std::filesystem::path test_data_directory() { return CARAVAN_SOURCE_DIR "/tests/data"; }

bool kit_required() {
  const char* value = std::getenv("CARAVAN_KIT");
  return value != nullptr && std::strcmp(value, "required") == 0;
}

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "caravan-test-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace caravan::testing
