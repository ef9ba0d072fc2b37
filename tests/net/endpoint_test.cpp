// Endpoints as users write them, and the names they stand for.
#include "net/endpoint.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "net/connection.h"

namespace caravan::net {
namespace {

TEST(ParseEndpoint, ReadsNamesAddressesAndBracketedIpv6) {
  EXPECT_EQ(parse_endpoint("backend-1:50052"), (Endpoint{"backend-1", 50052}));
  EXPECT_EQ(parse_endpoint("10.0.0.2:1"), (Endpoint{"10.0.0.2", 1}));
  EXPECT_EQ(parse_endpoint("[::1]:65535"), (Endpoint{"::1", 65535}));
  EXPECT_EQ(parse_endpoint("[fe80::1]", 80), (Endpoint{"fe80::1", 80}));
  EXPECT_EQ(parse_endpoint("host", 80), (Endpoint{"host", 80}));
  EXPECT_EQ(parse_endpoint("host:81", 80), (Endpoint{"host", 81}));
}

TEST(ParseEndpoint, WritesWhatItReads) {
  for (const char* text : {"a:1", "[::1]:50052", "10.1.2.3:80"}) EXPECT_EQ(parse_endpoint(text).text(), text);
}

TEST(ParseEndpoint, RefusesWhatIsNotAnEndpointAndQuotesIt) {
  for (const char* text : {"", ":80", "host", "host:", "host:x", "host:65536", "host:-1", "host:1x", "::1", "[::1",
                           "[::1]80", "a b:1", "http://a:80", "[]:1"}) {
    try {
      parse_endpoint(text);
      FAIL() << "accepted '" << text << "'";
    } catch (const RequestError& error) {
      EXPECT_NE(std::string(error.what()).find(std::string("'") + text + "'"), std::string::npos) << error.what();
    }
  }
}

TEST(Resolve, FindsLocalhostAndNamesWhatDoesNotResolve) {
  IoThreads io(1);
  const auto addresses = run_blocking(io.next_executor(), resolve({"localhost", 7}, std::chrono::seconds(5)));
  ASSERT_FALSE(addresses.empty());
  EXPECT_TRUE(addresses[0].address().is_loopback());
  EXPECT_EQ(addresses[0].port(), 7);
  try {
    run_blocking(io.next_executor(), resolve({"no-such-host.invalid", 7}, std::chrono::seconds(5)));
    FAIL() << "resolved";
  } catch (const ConnectionError& error) {
    EXPECT_NE(std::string(error.what()).find("no-such-host.invalid"), std::string::npos) << error.what();
  }
}

TEST(IsLoopback, KnowsTheLoopbackAddresses) {
  EXPECT_TRUE(is_loopback({"127.0.0.1", 1}));
  EXPECT_TRUE(is_loopback({"127.8.0.1", 1}));
  EXPECT_TRUE(is_loopback({"::1", 1}));
  EXPECT_TRUE(is_loopback({"localhost", 1}));
  EXPECT_FALSE(is_loopback({"0.0.0.0", 1}));
  EXPECT_FALSE(is_loopback({"::", 1}));
  EXPECT_FALSE(is_loopback({"example.org", 1}));
}

}  // namespace
}  // namespace caravan::net
