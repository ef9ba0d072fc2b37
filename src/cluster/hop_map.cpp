#include "cluster/hop_map.h"

#include <fmt/format.h>

#include <future>

#include "base/error.h"
#include "base/log.h"

namespace caravan::cluster {
namespace {

Hop probe(const Backend& from, const Backend& to) {
  const auto address = to.peer_address();
  if (!address) return {std::nullopt, fmt::format("{} takes connections from nobody else", to.name())};
  try {
    const auto rtt = from.probe(*address);
    spdlog::debug("{} reaches {}: {:.2f} ms", from.name(), to.name(),
                  std::chrono::duration<double, std::milli>(rtt).count());
    return {rtt, ""};
  } catch (const Error& error) {
    return {std::nullopt, error.what()};
  }
}

}  // namespace

HopTable HopMap::look(std::span<const Membership::Member> members) {
  const Clock::time_point now = Clock::now();
  std::erase_if(known_, [&](const auto& entry) { return entry.second.until <= now; });
  HopTable hops(members.size(), std::vector<Hop>(members.size(), {std::nullopt, "there was no time to try it"}));
  std::vector<std::string> ids;
  for (const Membership::Member& member : members) ids.push_back(member.backend ? member.backend->id() : "");
  std::vector<std::vector<size_t>> asked(members.size());  // by each
  for (size_t i = 0; i < members.size(); ++i)
    for (size_t j = 0; j < members.size(); ++j) {
      if (!members[i].backend || !members[j].backend || ids[i] == ids[j]) continue;
      const auto known = known_.find({ids[i], ids[j]});
      if (known != known_.end())
        hops[i][j] = known->second.hop;
      else
        asked[i].push_back(j);
    }
  {
    std::vector<std::future<void>> askers;
    for (size_t i = 0; i < members.size(); ++i) {
      if (asked[i].empty()) continue;
      askers.push_back(std::async(std::launch::async, [&, i] {
        size_t n = 0;
        for (; n < asked[i].size() && Clock::now() - now < kLongestLook; ++n)
          hops[i][asked[i][n]] = probe(*members[i].backend, *members[asked[i][n]].backend);
        asked[i].resize(n);
      }));
    }
  }
  const Clock::time_point until = Clock::now() + kRemembered;
  for (size_t i = 0; i < members.size(); ++i)
    for (const size_t j : asked[i]) known_[{ids[i], ids[j]}] = {hops[i][j], until};
  return hops;
}

void HopMap::doubt() {
  std::erase_if(known_, [](const auto& entry) { return entry.second.hop.rtt.has_value(); });
}

}  // namespace caravan::cluster
