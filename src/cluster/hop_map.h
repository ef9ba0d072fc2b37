// Which backends reach which, and how far they are from each other: found out by having them connect to each other, and
// remembered for a while.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cluster/membership.h"

namespace caravan::cluster {

// From one backend straight to another.
struct Hop {
  std::optional<std::chrono::microseconds> rtt;  // nullopt: it is not reached
  std::string why_not;
};
using HopTable = std::vector<std::vector<Hop>>;  // from each (first index) to each other

// Used by one thread at a time.
class HopMap {
 public:
  using Clock = std::chrono::steady_clock;
  // What was not tried by then counts as out of reach, until the next look().
  static constexpr auto kLongestLook = std::chrono::seconds(5);
  // So that plans that are made one after the other need not wait for those who do not answer.
  static constexpr auto kRemembered = std::chrono::seconds(60);

  // The hops between members. Members without a backend reach nobody and are not reached.
  // Asks those of which nothing is remembered, and waits: one connection after the other per backend, all backends at
  // the same time.
  HopTable look(std::span<const Membership::Member> members);
  // Those who reach each other are asked again: something between them has failed.
  void doubt();

 private:
  struct Known {
    Hop hop;
    Clock::time_point until;
  };
  std::map<std::pair<std::string, std::string>, Known> known_;  // by the ids of the backends
};

}  // namespace caravan::cluster
