// Nobody takes all connections for himself, whether he shakes hands or only says that he will.
#include "remote/connection_quota.h"

#include <gtest/gtest.h>

namespace caravan::remote {
namespace {

using State = ConnectionQuota::State;

TEST(QuotaAddress, IsThatOfTheMachine) {
  EXPECT_EQ(quota_address("10.0.0.2:4711"), "10.0.0.2");
  EXPECT_EQ(quota_address("[::ffff:10.0.0.2]:4711"), "10.0.0.2");
  EXPECT_EQ(quota_address("[2001:db8:1:2:3:4:5:6]:80"), quota_address("[2001:db8:1:2::9]:81"));
  EXPECT_NE(quota_address("[2001:db8:1:2::]:80"), quota_address("[2001:db8:1:3::]:80"));
  EXPECT_EQ(quota_address("somebody"), "somebody");
}

TEST(ConnectionQuota, LeavesRoomForOtherAddresses) {
  ConnectionQuota quota({4, 2, 6, 3});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(quota.begin("a"), "");
  EXPECT_NE(quota.begin("a").find("3 peers at a"), std::string::npos);
  EXPECT_EQ(quota.begin("b"), "");
  EXPECT_TRUE(quota.is_crowded());
  for (int i = 0; i < 2; ++i) EXPECT_EQ(quota.admit("a"), "");
  EXPECT_NE(quota.admit("a").find("2 of them from a"), std::string::npos);
  EXPECT_EQ(quota.admit("b"), "");
  quota.end("a", State::shaking_hands);
  EXPECT_NE(quota.begin("a").find("2 connections from a"), std::string::npos);
  EXPECT_FALSE(quota.is_crowded());
  quota.end("a", State::served);
  EXPECT_EQ(quota.begin("a"), "");
  EXPECT_EQ(quota.admit("a"), "");
}

TEST(ConnectionQuota, HoldsInAll) {
  ConnectionQuota quota({2, 2, 2, 2});
  EXPECT_EQ(quota.begin("a"), "");
  EXPECT_EQ(quota.begin("b"), "");
  EXPECT_NE(quota.begin("c"), "");
  EXPECT_EQ(quota.admit("a"), "");
  EXPECT_EQ(quota.begin("c"), "");
  EXPECT_EQ(quota.admit("c"), "");
  EXPECT_NE(quota.admit("b"), "");
  quota.end("b", State::shaking_hands);
  EXPECT_NE(quota.begin("d").find("2 connections are open"), std::string::npos);
  quota.end("c", State::served);
  EXPECT_EQ(quota.begin("d"), "");
}

}  // namespace
}  // namespace caravan::remote
