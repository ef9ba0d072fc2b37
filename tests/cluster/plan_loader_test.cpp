// Who is asked for weights when a plan is loaded.
#include "cluster/plan_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <thread>

#include "cluster/fake_backends.h"

namespace caravan::cluster {
namespace {

using ::testing::ElementsAre;

TEST(WeightGivers, AreTheOthersThatAreLikelyToAnswer) {
  spdlog::set_level(spdlog::level::off);
  test::FakeMachines machines;
  for (const char* name : {"failed", "giver", "leaves", "receiver"}) machines.add(name);
  MembershipOptions options;
  options.names = {"failed", "giver", "leaves", "receiver"};
  Membership membership(machines, options, [] {});
  const auto leaves = [&] {
    const auto members = membership.members();
    return members.size() == 4 && members[2].leaving();
  };
  while (membership.members().size() < 4) std::this_thread::yield();
  machines.leave("leaves");
  while (!leaves()) std::this_thread::yield();
  const auto members = membership.members();
  std::vector<std::string> givers;
  for (const auto& member : weight_givers(members, members[3], {"failed"})) givers.push_back(member.name);
  EXPECT_THAT(givers, ElementsAre("giver"));
  membership.stop();
  spdlog::set_level(spdlog::level::info);
}

}  // namespace
}  // namespace caravan::cluster
