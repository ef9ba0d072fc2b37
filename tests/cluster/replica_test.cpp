// When a batch counts as overdue.
#include "cluster/replica.h"

#include <gtest/gtest.h>

#include "cluster/cluster_pipeline.h"

namespace caravan::cluster {
namespace {

using std::chrono::seconds;

TEST(LongestWait, IsThePredictionAndThirtySecondsOrTenTimesIt) {
  const auto patience = ClusterOptions().ticket_patience;
  EXPECT_EQ(longest_wait(0, patience), seconds(30));
  EXPECT_EQ(longest_wait(2, patience), seconds(32));
  EXPECT_EQ(longest_wait(5, patience), seconds(55));
}

}  // namespace
}  // namespace caravan::cluster
