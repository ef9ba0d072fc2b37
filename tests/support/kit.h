// Access to the conformance kit, a folder of reference models and values that is not part of the repository.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace caravan::testing {

// The kit's folder: $CARAVAN_KIT_DIR, else ../shared/kit from the repository's root; nullopt where it is absent.
std::optional<std::filesystem::path> kit_directory();

// The repository's own folder of test data, tests/data.
std::filesystem::path test_data_directory();

// True when CARAVAN_KIT=required: a test that needs the kit then fails where the kit is absent.
bool kit_required();

// A new empty folder that is removed when the object goes.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace caravan::testing

// Declares `kit` (std::filesystem::path) or skips the test, saying so; fails instead when CARAVAN_KIT=required.
#define CARAVAN_REQUIRE_KIT(kit)                                                                                     \
  const auto kit##_or_none = ::caravan::testing::kit_directory();                                                    \
  if (!kit##_or_none && ::caravan::testing::kit_required()) FAIL() << "CARAVAN_KIT=required, but the kit is absent"; \
  if (!kit##_or_none) GTEST_SKIP() << "the conformance kit is absent";                                               \
  const std::filesystem::path kit = *kit##_or_none
