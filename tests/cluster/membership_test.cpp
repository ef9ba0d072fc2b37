// Which backends are there: names of several machines, names that change, and machines that come and go.
#include "cluster/membership.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <condition_variable>

#include "base/error.h"
#include "cluster/fake_backends.h"

namespace caravan::cluster {
namespace {

using std::chrono::milliseconds;
using test::FakeMachines;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr auto kForever = std::chrono::seconds(30);  // a defect ends the test, it does not hang it

class MembershipTest : public ::testing::Test {
 protected:
  MembershipTest() {
    spdlog::set_level(spdlog::level::off);
    options_.retry_interval = options_.resolve_interval = milliseconds(2);
  }
  ~MembershipTest() override { spdlog::set_level(spdlog::level::info); }

  void start(std::vector<std::string> names) {
    options_.names = std::move(names);
    membership_.emplace(machines_, options_, [this] {
      const std::lock_guard lock(mutex_);
      signalled_ = true;
      changed_.notify_all();
    });
  }
  void wait_until(const std::function<bool()>& condition) {
    const auto end = std::chrono::steady_clock::now() + kForever;
    while (!condition()) {
      std::unique_lock lock(mutex_);
      ASSERT_TRUE(changed_.wait_until(lock, end, [this] { return signalled_; })) << "it did not happen";
      signalled_ = false;
    }
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Membership::Member& member : membership_->members()) names.push_back(member.name);
    return names;
  }
  void wait_for(const std::vector<std::string>& wanted) {
    wait_until([&] { return names() == wanted; });
  }

  FakeMachines machines_;
  MembershipOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool signalled_ = false;
  std::optional<Membership> membership_;
};

TEST_F(MembershipTest, ANameStandsForAllItsAddresses) {
  for (const char* machine : {"first", "pod1", "pod2", "pod3"}) machines_.add(machine);
  machines_.name("pods", {"pod2", "pod1"});
  start({"first", "pods"});
  wait_for({"first", "pod1", "pod2"});
  EXPECT_EQ(membership_->members()[1].configured, 1u);
  EXPECT_EQ(membership_->members()[2].configured, 1u);
  // Scaled up and down while running: what vanished stays until it is lost, and is not connected again.
  machines_.name("pods", {"pod1", "pod3"});
  wait_for({"first", "pod1", "pod2", "pod3"});
  machines_.cut("pod2", FakeMachines::State::up);
  wait_for({"first", "pod1", "pod3"});
  EXPECT_EQ(machines_.n_connections("pod2"), 1u);
  machines_.name("pods", {"pod2", "pod3"});
  wait_for({"first", "pod1", "pod2", "pod3"});
}

TEST_F(MembershipTest, ANameThatDoesNotResolveYetIsRetried) {
  machines_.add("pod");
  machines_.name("pods", {});
  start({"pods"});
  wait_until([&] { return membership_->tried(); });
  EXPECT_THAT(membership_->missing(), ElementsAre("pods"));
  EXPECT_THAT(membership_->reasons(), HasSubstr("pods: the name does not resolve"));
  EXPECT_FALSE(membership_->complete());
  machines_.name("pods", {"pod"});
  wait_for({"pod"});
  EXPECT_TRUE(membership_->complete());
  EXPECT_THAT(membership_->missing(), IsEmpty());
}

TEST_F(MembershipTest, AwaitsTheOtherMachinesOfAName) {
  for (const char* machine : {"single", "pod1"}) machines_.add(machine);
  machines_.add("pod2", FakeMachines::State::down);
  machines_.name("pods", {"pod1", "pod2"});
  start({"single", "pods"});
  wait_for({"single", "pod1"});
  wait_until([&] { return membership_->tried(); });
  EXPECT_THAT(membership_->missing(), IsEmpty());
  EXPECT_THAT(membership_->awaited(), ElementsAre("pods (pod2)"));
  EXPECT_EQ(membership_->reasons(), "\n  pods (pod2): pod2: connection refused");
  machines_.set_state("pod2", FakeMachines::State::up);
  wait_for({"single", "pod1", "pod2"});
  EXPECT_THAT(membership_->awaited(), ElementsAre("pods")) << "it may stand for more later";
}

TEST_F(MembershipTest, TwoAddressesOfOneBackendAreOneMember) {
  machines_.add("machine");
  machines_.alias("same machine", "machine");
  start({"machine", "same machine"});
  machines_.wait_for_attempts("machine", 2);
  wait_until([&] { return membership_->tried(); });
  EXPECT_EQ(names().size(), 1u);
}

TEST_F(MembershipTest, AwaitsNobodyForANameOfOneMachineWithTwoAddresses) {
  machines_.add("machine");
  machines_.alias("same machine", "machine");
  machines_.name("name", {"machine", "same machine"});
  start({"name"});
  machines_.wait_for_attempts("machine", 2);
  wait_until([&] { return membership_->tried(); });
  EXPECT_THAT(membership_->awaited(), IsEmpty());
}

TEST_F(MembershipTest, CountsEveryChangeAndTellsWhyAConnectionEnded) {
  machines_.add("a");
  start({"a"});
  wait_for({"a"});
  const uint64_t generation = membership_->generation();
  const Membership::Member member = membership_->members().front();
  EXPECT_EQ(member.why_lost(), "");
  machines_.leave("a");
  EXPECT_TRUE(member.leaving());
  EXPECT_GT(membership_->generation(), generation);
  machines_.cut("a");
  EXPECT_EQ(member.why_lost(), "backend a: connection lost");
  EXPECT_THAT(membership_->members(), IsEmpty());
  machines_.set_state("a", FakeMachines::State::up);
  wait_for({"a"});
  EXPECT_EQ(membership_->members().front().why_lost(), "");
  EXPECT_FALSE(membership_->members().front().leaving());
}

TEST_F(MembershipTest, ADroppedConnectionIsMadeAnew) {
  machines_.add("a");
  start({"a"});
  wait_for({"a"});
  const Membership::Member member = membership_->members().front();
  membership_->drop(member, "it does not answer");
  EXPECT_EQ(member.why_lost(), "it does not answer");
  wait_for({"a"});
  EXPECT_NE(membership_->members().front().connection, member.connection);
}

TEST_F(MembershipTest, TellsWhoRefusesForGood) {
  machines_.add("a");
  machines_.add("b", FakeMachines::State::refuses);
  start({"a", "b"});
  wait_until([&] { return membership_->refusal() != nullptr; });
  EXPECT_THROW(std::rethrow_exception(membership_->refusal()), NotSupportedError);
}

}  // namespace
}  // namespace caravan::cluster
