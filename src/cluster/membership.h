// Which backends are there: finds the addresses of configured names, connects them, notices when they go, and connects
// them again. Knows nothing of plans.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "cluster/backend.h"

namespace caravan::cluster {

struct MembershipOptions {
  std::vector<std::string> names;                    // as the user wrote them, in the order of layers
  std::chrono::milliseconds connect_timeout{5000};   // of one attempt
  std::chrono::milliseconds retry_interval{500};     // between attempts to connect
  std::chrono::milliseconds resolve_interval{5000};  // between looks at the addresses of names
};

// One thread for each address connects it, so that one that does not answer delays no other.
class Membership {
 public:
  // One connection. It outlives its end for whoever still holds it.
  class Connection;
  struct Member {
    std::string name;                              // its address as it was connected
    size_t configured = 0;                         // index of the name that it goes by
    std::shared_ptr<Backend> backend;              // shared with the plans that use it
    std::shared_ptr<const Connection> connection;  // shared with the backend's callbacks
    // Why the connection ended; empty while it stands.
    std::string why_lost() const;
    // The backend said that it goes away soon.
    bool leaving() const;
  };

  // Begins to connect. changed is called from any thread after a backend came, went or said that it leaves, and after a
  // failed attempt; it must only signal. connector outlives this.
  Membership(BackendConnector& connector, MembershipOptions options, std::function<void()> changed);
  // stop(), and waits for attempts in progress.
  ~Membership();
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;

  // Those whose connection stands, in the order of names, then of addresses.
  std::vector<Member> members() const;
  // Grows whenever members() or a leaving() changes.
  uint64_t generation() const;

  // True when every name was looked up, and every address of them was tried.
  bool tried() const;
  // True when every name has a member, too.
  bool complete() const;
  // Names without a member.
  std::vector<std::string> missing() const;
  // Those who may come yet: names without a member; of names that stand for several machines the addresses that are not
  // connected, or else the name: it may stand for more later.
  std::vector<std::string> awaited() const;
  // "\n  NAME: REASON" for each that is not connected.
  std::string reasons() const;
  // The error of a backend for which trying again is of no use; null: none.
  std::exception_ptr refusal() const;

  // Nobody is connected any more, attempts in progress are given up, and all connections end: whoever waits for an
  // answer of a member waits no more.
  void stop();

  // Gives a connection up; it counts as lost, and the address is connected anew.
  void drop(const Member& member, const std::string& reason);

 private:
  struct Seat;
  struct Shared;
  struct Absent {
    std::string who, why;
  };
  std::vector<Absent> absent() const;
  void resolve_names();
  void update(size_t configured, const std::vector<std::string>& addresses);
  void dial(Seat& seat);
  void try_once(Seat& seat);

  BackendConnector& connector_;
  const MembershipOptions options_;
  std::stop_source stop_;
  const std::shared_ptr<Shared> shared_;     // with callbacks that may come late
  std::vector<std::unique_ptr<Seat>> gone_;  // used by the resolving thread, then by the destructor
  std::thread resolver_;
};

}  // namespace caravan::cluster
