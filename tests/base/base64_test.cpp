// Base64 against the vectors of RFC 4648.
#include "base/base64.h"

#include <gtest/gtest.h>

namespace caravan {
namespace {

TEST(Base64, MatchesTheStandardsVectors) {
  EXPECT_EQ(base64_encode(""), "");
  EXPECT_EQ(base64_encode("f"), "Zg==");
  EXPECT_EQ(base64_encode("fo"), "Zm8=");
  EXPECT_EQ(base64_encode("foo"), "Zm9v");
  EXPECT_EQ(base64_encode("foob"), "Zm9vYg==");
  EXPECT_EQ(base64_encode("fooba"), "Zm9vYmE=");
  EXPECT_EQ(base64_encode("foobar"), "Zm9vYmFy");
  EXPECT_EQ(base64_encode(std::string_view("\xff\xfe\x00\x80", 4)), "//4AgA==");
}

}  // namespace
}  // namespace caravan
