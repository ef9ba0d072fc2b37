// Sizes as people read them, and progress counted from several threads.
#include "base/progress.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace caravan {
namespace {

TEST(FormatBytes, PicksTheUnitAPersonWouldUse) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.0 KiB");
  EXPECT_EQ(format_bytes(17 << 10), "17 KiB");
  EXPECT_EQ(format_bytes(uint64_t{1500} << 20), "1.5 GiB");
  EXPECT_EQ(format_bytes(uint64_t{3} << 40), "3.0 TiB");
  EXPECT_EQ(format_bytes(~uint64_t{0}), "16777216 TiB");
}

TEST(Progress, TakesUpdatesFromSeveralThreadsAndEndsTwice) {
  // The default logger of a test writes to stdout; with stderr captured it is no terminal, wherever the test runs.
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  Progress progress("testing", 4000);
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        for (int k = 0; k < 1000; ++k) progress.add(1);
      });
  }
  progress.finish();
  progress.finish();
  const std::string shown = ::testing::internal::GetCapturedStdout();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << "a bar is for terminals";
  EXPECT_NE(shown.find("testing: 3.9 KiB of 3.9 KiB (100%)"), std::string::npos) << shown;
  EXPECT_EQ(shown.find("testing", shown.find("testing") + 1), std::string::npos) << "the end is shown once";
}

}  // namespace
}  // namespace caravan
