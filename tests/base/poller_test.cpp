// How a thread waits: awake for what is near, asleep for the rest.
#include "base/poller.h"

#include <gtest/gtest.h>

namespace caravan {
namespace {

using std::chrono::milliseconds;

Poller::Clock::time_point time_now;
milliseconds time_per_look;

// Time passes with every look at it.
Poller::Clock::time_point fake_now() { return time_now += time_per_look; }

class PollerTest : public testing::Test {
 protected:
  PollerTest() {
    time_now = {};
    time_per_look = milliseconds(0);
  }
  // An event that came after a time, whether or not it was waited for awake.
  void event_after(Poller& poller, milliseconds time) {
    poller.wait([] { return true; });
    time_now += time;
    poller.arrived();
  }
  Poller poller_{milliseconds(50), fake_now};
};

TEST_F(PollerTest, SleepsForTheFirstEvent) {
  EXPECT_FALSE(poller_.wait([] { return true; }));
}

TEST_F(PollerTest, StaysAwakeAfterAShortWait) {
  event_after(poller_, milliseconds(40));
  int n_looks = 0;
  EXPECT_TRUE(poller_.wait([&] { return ++n_looks == 10000; }));
}

TEST_F(PollerTest, SleepsAfterALongWait) {
  event_after(poller_, milliseconds(51));
  EXPECT_FALSE(poller_.wait([] { return true; }));
  poller_.arrived();
  EXPECT_TRUE(poller_.wait([] { return true; })) << "the wait before was short again";
}

TEST_F(PollerTest, SleepsWhenTheEventTakesLongerThanItMay) {
  event_after(poller_, milliseconds(1));
  time_per_look = milliseconds(1);
  const auto begin = time_now;
  EXPECT_FALSE(poller_.wait([] { return false; }));
  EXPECT_GE(time_now - begin, milliseconds(50));
  EXPECT_LE(time_now - begin, milliseconds(53));
}

TEST_F(PollerTest, LeavesACoreThatOthersWantToThem) {
  event_after(poller_, milliseconds(1));
  time_per_look = milliseconds(3);  // what another thread takes that was let in
  int n_looks = 0;
  EXPECT_FALSE(poller_.wait([&] { return ++n_looks < 0; }));
  EXPECT_LE(n_looks, 2000) << "one round";
  time_per_look = milliseconds(0);
  int n_asleep = 0;
  for (; n_asleep < 1000; ++n_asleep) {
    poller_.arrived();
    if (poller_.wait([] { return true; })) break;
  }
  EXPECT_EQ(n_asleep, 32);
}

TEST_F(PollerTest, ZeroSleepsAlways) {
  Poller poller(milliseconds(0), fake_now);
  event_after(poller, milliseconds(0));
  EXPECT_FALSE(poller.wait([] { return true; }));
}

}  // namespace
}  // namespace caravan
