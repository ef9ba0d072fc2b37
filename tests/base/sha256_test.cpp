// SHA-256 against the vectors of FIPS 180-4.
#include "base/sha256.h"

#include <gtest/gtest.h>

#include <unordered_set>
#include <vector>

#include "base/error.h"

namespace caravan {
namespace {

Digest sha256_of(std::string_view text) { return sha256(std::as_bytes(std::span(text.data(), text.size()))); }

TEST(Sha256, MatchesTheStandardsVectors) {
  EXPECT_EQ(sha256_of("").hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_of("abc").hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq").hex(),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_of(std::string(1000000, 'a')).hex(),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, TakesDigestsFromExactlyThirtyTwoBytes) {
  const Digest digest = sha256_of("abc");
  const std::string_view raw(reinterpret_cast<const char*>(digest.bytes.data()), digest.bytes.size());
  EXPECT_EQ(Digest::from_bytes(raw), digest);
  EXPECT_THROW(Digest::from_bytes(raw.substr(1)), FormatError);
  EXPECT_THROW(Digest::from_bytes(""), FormatError);
}

TEST(Sha256, GivesKeysForOrderedAndHashedContainers) {
  const Digest a = sha256_of("a"), b = sha256_of("b");
  EXPECT_NE(a, b);
  EXPECT_NE(a < b, b < a);
  EXPECT_EQ((std::unordered_set<Digest>{a, b, a}.size()), 2U);
}

}  // namespace
}  // namespace caravan
