// Whose question is answered when.
#include "remote/question_desk.h"

#include <gtest/gtest.h>

#include <future>

#include "fake_host.h"
#include "net/memory_connection.h"

namespace caravan::remote {
namespace {

using testing::eventually;
using testing::Gate;

class QuestionDesks : public ::testing::Test {
 protected:
  std::shared_ptr<Channel> connect() {
    auto [here, there] = net::make_memory_pair(io_.next_executor());
    others_.push_back(std::move(there));
    return std::make_shared<Channel>(std::move(here), [](uint16_t) { return net::FrameLimits{}; });
  }
  QuestionDesk::Answer note(std::string name) {
    return [this, name](const std::stop_token&) {
      const std::lock_guard lock(mutex_);
      answered_.push_back(name);
    };
  }
  std::vector<std::string> answered() {
    const std::lock_guard lock(mutex_);
    return answered_;
  }
  // A question whose answer takes until stop is requested.
  QuestionDesk::Answer endless() {
    return [this](const std::stop_token& stop) {
      ++n_endless_;
      std::promise<void> end;
      const std::stop_callback callback(stop, [&] { end.set_value(); });
      end.get_future().wait();
      --n_endless_;
    };
  }

  net::IoThreads io_{1};
  std::vector<std::unique_ptr<net::Connection>> others_;
  std::mutex mutex_;
  std::vector<std::string> answered_;
  std::atomic<int> n_endless_{0};
};

TEST_F(QuestionDesks, AnswerConnectionsInTurns) {
  const auto greedy = connect(), modest = connect();
  Gate gate;
  gate.close();
  QuestionDesk desk(1, 8);
  ASSERT_TRUE(desk.post(greedy, [&](const std::stop_token&) { gate.pass(); }));
  gate.wait_for_visitor();
  for (const char* name : {"greedy 1", "greedy 2", "greedy 3"}) ASSERT_TRUE(desk.post(greedy, note(name)));
  for (const char* name : {"modest 1", "modest 2"}) ASSERT_TRUE(desk.post(modest, note(name)));
  gate.open();
  EXPECT_TRUE(eventually([&] { return answered().size() == 5; }));
  EXPECT_EQ(answered(), (std::vector<std::string>{"modest 1", "greedy 1", "modest 2", "greedy 2", "greedy 3"}));
}

TEST_F(QuestionDesks, LimitEachConnectionByItself) {
  const auto greedy = connect(), modest = connect();
  QuestionDesk desk(1, 3);
  ASSERT_TRUE(desk.post(greedy, endless()));
  EXPECT_TRUE(eventually([&] { return n_endless_ == 1; }));
  EXPECT_TRUE(desk.post(greedy, note("2")));
  EXPECT_TRUE(desk.post(greedy, note("3")));
  EXPECT_FALSE(desk.post(greedy, note("4")));
  EXPECT_TRUE(desk.post(modest, note("modest")));
}

TEST_F(QuestionDesks, AnswerManyConnectionsAtATimeButOfEachOneQuestion) {
  const auto first = connect(), second = connect(), third = connect();
  QuestionDesk desk(2, 8);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(desk.post(first, endless()));
  ASSERT_TRUE(desk.post(second, note("second")));
  EXPECT_TRUE(eventually([&] { return answered().size() == 1; }));
  EXPECT_EQ(n_endless_, 1);
  ASSERT_TRUE(desk.post(second, endless()));
  EXPECT_TRUE(eventually([&] { return n_endless_ == 2; }));
  ASSERT_TRUE(desk.post(third, note("third")));  // no thread is left
  desk.leave(first);
  EXPECT_TRUE(eventually([&] { return answered().size() == 2; }));
}

TEST_F(QuestionDesks, ForgetWhatAConnectionAskedThatHasEnded) {
  const auto gone = connect(), other = connect();
  QuestionDesk desk(1, 8);
  ASSERT_TRUE(desk.post(gone, endless()));
  EXPECT_TRUE(eventually([&] { return n_endless_ == 1; }));
  ASSERT_TRUE(desk.post(gone, note("gone")));
  ASSERT_TRUE(desk.post(other, note("other")));
  desk.leave(gone);
  EXPECT_TRUE(eventually([&] { return !answered().empty(); }));
  EXPECT_EQ(answered(), std::vector<std::string>{"other"});
  EXPECT_EQ(n_endless_, 0);
}

TEST_F(QuestionDesks, GiveUpWhatWaitsWhenTheyStop) {
  const auto channel = connect();
  QuestionDesk desk(1, 8);
  ASSERT_TRUE(desk.post(channel, endless()));
  EXPECT_TRUE(eventually([&] { return n_endless_ == 1; }));
  ASSERT_TRUE(desk.post(channel, note("never")));
  desk.stop();
  EXPECT_EQ(n_endless_, 0);
  EXPECT_TRUE(answered().empty());
  EXPECT_FALSE(desk.post(channel, note("late")));
}

}  // namespace
}  // namespace caravan::remote
