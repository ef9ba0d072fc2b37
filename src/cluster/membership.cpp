#include "cluster/membership.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "base/log.h"

namespace caravan::cluster {
namespace {

using Clock = std::chrono::steady_clock;

// How much less often an address is tried that refuses us for good, or leads to a backend that is connected already.
constexpr int kPatience = 10;

// True for failures that trying again cannot mend: another token, another protocol version.
bool is_permanent(const std::exception& error) {
  return dynamic_cast<const NotSupportedError*>(&error) != nullptr ||
         dynamic_cast<const RequestError*>(&error) != nullptr;
}

}  // namespace

class Membership::Connection {
 public:
  std::string why_lost() const {
    const std::lock_guard lock(mutex_);
    return why_lost_;
  }
  bool leaving() const {
    const std::lock_guard lock(mutex_);
    return leaving_;
  }
  // False when it was lost already.
  bool lose(const std::string& reason) {
    const std::lock_guard lock(mutex_);
    if (!why_lost_.empty()) return false;
    why_lost_ = reason.empty() ? "the connection was lost" : reason;
    return true;
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    leaving_ = true;
  }

 private:
  mutable std::mutex mutex_;
  std::string why_lost_;
  bool leaving_ = false;
};

std::string Membership::Member::why_lost() const { return connection ? connection->why_lost() : ""; }
bool Membership::Member::leaving() const { return connection && connection->leaving(); }

// One address. All but the thread is under Shared::mutex.
struct Membership::Seat {
  std::string address;
  size_t configured = 0;
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Connection> connection;
  bool tried = false;
  bool is_alias = false;  // leads to a backend that another seat has
  bool vanished = false;  // the name does not stand for it any more: it is not connected again
  bool ended = false;     // its thread ends
  std::string last_error;
  std::exception_ptr refusal;
  Clock::time_point next_attempt;
  std::thread thread;

  bool stands() const { return backend != nullptr && connection->why_lost().empty(); }
};

struct Membership::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  std::function<void()> hook;                // const
  std::vector<std::unique_ptr<Seat>> seats;  // under mutex; in the order of names
  std::vector<std::string> name_errors;      // under mutex; why a name does not resolve
  std::exception_ptr name_refusal;           // under mutex; what is no name at all
  size_t n_resolved = 0;                     // under mutex; names that were looked up at least once
  uint64_t generation = 1;                   // under mutex
  bool stopping = false;                     // under mutex

  // With mutex held.
  void notify() {
    changed.notify_all();
    hook();
  }
};

Membership::Membership(BackendConnector& connector, MembershipOptions options, std::function<void()> changed)
    : connector_(connector), options_(std::move(options)), shared_(std::make_shared<Shared>()) {
  shared_->hook = std::move(changed);
  shared_->name_errors.resize(options_.names.size());
  resolver_ = std::thread([this] { resolve_names(); });
}

void Membership::stop() {
  std::vector<std::shared_ptr<Backend>> backends;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    for (const auto& seat : shared_->seats)
      if (seat->backend) backends.push_back(seat->backend);
  }
  stop_.request_stop();
  for (const auto& backend : backends) backend->close();
}

Membership::~Membership() {
  stop();
  resolver_.join();
  for (const auto& seat : shared_->seats) seat->thread.join();
  for (const auto& seat : gone_) seat->thread.join();
  shared_->seats.clear();
}

// The thread that looks up names, again and again: addresses come and go.
void Membership::resolve_names() {
  while (true) {
    bool all = true;
    for (size_t i = 0; i < options_.names.size(); ++i) {
      std::string error;
      std::vector<std::string> addresses;
      std::exception_ptr refusal;
      try {
        addresses = connector_.addresses(options_.names[i], stop_.get_token());
      } catch (const Error& failure) {
        error = failure.what();
        if (is_permanent(failure)) refusal = std::current_exception();
      }
      std::unique_lock lock(shared_->mutex);
      if (refusal) shared_->name_refusal = refusal;
      if (shared_->stopping) return;
      if (!error.empty() && error != shared_->name_errors[i]) spdlog::warn("backend {}", error);
      shared_->name_errors[i] = error;
      lock.unlock();
      if (error.empty()) update(i, addresses);
      lock.lock();
      shared_->n_resolved = std::max(shared_->n_resolved, i + 1);
      lock.unlock();
      all = all && error.empty();
    }
    for (const auto& seat : std::exchange(gone_, {})) seat->thread.join();
    std::unique_lock lock(shared_->mutex);
    shared_->hook();
    shared_->changed.wait_for(lock, all ? options_.resolve_interval : options_.retry_interval,
                              [this] { return shared_->stopping; });
    if (shared_->stopping) return;
  }
}

// Seats for the addresses that a name stands for now; those of others go when they are not connected.
void Membership::update(size_t configured, const std::vector<std::string>& addresses) {
  const std::lock_guard lock(shared_->mutex);
  std::vector<std::unique_ptr<Seat>>& seats = shared_->seats;
  for (const auto& seat : seats) {
    if (seat->configured == configured)
      seat->vanished = std::find(addresses.begin(), addresses.end(), seat->address) == addresses.end();
  }
  for (const std::string& address : addresses) {
    const bool known = std::any_of(seats.begin(), seats.end(), [&](const auto& seat) {
      return seat->configured == configured && seat->address == address;
    });
    if (known) continue;
    auto seat = std::make_unique<Seat>();
    seat->address = address;
    seat->configured = configured;
    seat->thread = std::thread([this, raw = seat.get()] { dial(*raw); });
    const auto place = std::find_if(seats.begin(), seats.end(), [&](const auto& other) {
      return other->configured > configured || (other->configured == configured && other->address > address);
    });
    seats.insert(place, std::move(seat));
  }
  for (auto seat = seats.begin(); seat != seats.end();) {
    if (!(*seat)->vanished || (*seat)->stands()) {
      ++seat;
      continue;
    }
    (*seat)->ended = true;
    gone_.push_back(std::move(*seat));
    seat = seats.erase(seat);
  }
  shared_->changed.notify_all();
}

// The thread of one address.
void Membership::dial(Seat& seat) {
  std::unique_lock lock(shared_->mutex);
  while (!shared_->stopping && !seat.ended) {
    if (seat.stands()) {
      shared_->changed.wait(lock);
      continue;
    }
    if (seat.backend != nullptr) {  // its connection has ended
      seat.last_error = seat.connection->why_lost();
      std::shared_ptr<Backend> old = std::exchange(seat.backend, nullptr);
      seat.connection = nullptr;
      lock.unlock();
      old.reset();  // not under the lock: it may be the last that holds it
      lock.lock();
      continue;
    }
    if (seat.vanished || Clock::now() < seat.next_attempt) {
      shared_->changed.wait_until(lock, seat.vanished ? Clock::now() + options_.resolve_interval : seat.next_attempt);
      continue;
    }
    lock.unlock();
    try_once(seat);
    lock.lock();
  }
}

void Membership::try_once(Seat& seat) {
  const auto connection = std::make_shared<Connection>();
  BackendEvents events;
  events.lost = [shared = shared_, connection](const std::string& reason) {
    const std::lock_guard lock(shared->mutex);
    if (!connection->lose(reason)) return;
    ++shared->generation;
    shared->notify();
  };
  events.leaving = [shared = shared_, connection] {
    const std::lock_guard lock(shared->mutex);
    connection->leave();
    ++shared->generation;
    shared->notify();
  };
  std::shared_ptr<Backend> backend;
  std::string id, error;
  std::exception_ptr refusal;
  try {
    backend = connector_.connect(seat.address, options_.connect_timeout, std::move(events), stop_.get_token());
    id = backend->id();
  } catch (const Error& failure) {
    error = failure.what();
    if (is_permanent(failure)) refusal = std::current_exception();
  }
  std::unique_lock lock(shared_->mutex);
  seat.tried = true;
  seat.refusal = refusal;
  seat.next_attempt = Clock::now() + options_.retry_interval * (refusal ? kPatience : 1);
  if (!error.empty()) {
    if (seat.last_error != error && !shared_->stopping) spdlog::warn("backend {}: {}", seat.address, error);
    seat.last_error = error;
    shared_->notify();
    return;
  }
  seat.is_alias = std::any_of(shared_->seats.begin(), shared_->seats.end(), [&](const auto& other) {
    return other.get() != &seat && other->stands() && other->backend->id() == id;
  });
  if (seat.is_alias) {
    seat.next_attempt = Clock::now() + options_.retry_interval * kPatience;
    connection->lose("another address leads to the same backend");
  } else {
    spdlog::info("backend {}: connected", seat.address);
    seat.backend = backend;
    seat.connection = connection;
    seat.last_error.clear();
    ++shared_->generation;
  }
  shared_->notify();
  lock.unlock();
  backend.reset();  // not under the lock: of an alias it is the last
}

std::vector<Membership::Member> Membership::members() const {
  const std::lock_guard lock(shared_->mutex);
  std::vector<Member> members;
  for (const auto& seat : shared_->seats) {
    if (seat->stands()) members.push_back({seat->address, seat->configured, seat->backend, seat->connection});
  }
  return members;
}

uint64_t Membership::generation() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->generation;
}

std::vector<std::string> Membership::missing() const {
  const std::lock_guard lock(shared_->mutex);
  std::vector<std::string> names;
  for (size_t i = 0; i < options_.names.size(); ++i) {
    const bool there = std::any_of(shared_->seats.begin(), shared_->seats.end(),
                                   [i](const auto& seat) { return seat->configured == i && seat->stands(); });
    if (!there) names.push_back(options_.names[i]);
  }
  return names;
}

bool Membership::complete() const { return tried() && missing().empty(); }

bool Membership::tried() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->n_resolved == options_.names.size() &&
         std::all_of(shared_->seats.begin(), shared_->seats.end(), [](const auto& seat) { return seat->tried; });
}

// Names without a member, and addresses that are not connected of those that stand for several and have one.
std::vector<Membership::Absent> Membership::absent() const {
  const std::lock_guard lock(shared_->mutex);
  std::vector<Absent> absent;
  for (size_t i = 0; i < options_.names.size(); ++i) {
    bool there = false;
    std::string why = shared_->name_errors[i];
    std::vector<Absent> addresses;
    for (const auto& seat : shared_->seats) {
      if (seat->configured != i) continue;
      there = there || seat->stands();
      if (seat->stands() || seat->is_alias || seat->vanished) continue;
      if (!seat->last_error.empty()) why = seat->last_error;
      addresses.push_back({options_.names[i] + " (" + seat->address + ")", seat->last_error});
    }
    if (!there) addresses = {{options_.names[i], why}};
    absent.insert(absent.end(), addresses.begin(), addresses.end());
  }
  return absent;
}

std::vector<std::string> Membership::awaited() const {
  std::vector<std::string> awaited;
  for (Absent& one : absent()) awaited.push_back(std::move(one.who));
  if (!awaited.empty()) return awaited;
  std::map<size_t, size_t> n_machines;  // by name
  for (const Member& member : members())
    if (++n_machines[member.configured] == 2) awaited.push_back(options_.names[member.configured]);
  return awaited;
}

std::string Membership::reasons() const {
  std::string text;
  for (const auto& [who, why] : absent()) text += "\n  " + who + ": " + (why.empty() ? "no answer yet" : why);
  return text;
}

std::exception_ptr Membership::refusal() const {
  const std::lock_guard lock(shared_->mutex);
  for (const auto& seat : shared_->seats) {
    if (seat->refusal) return seat->refusal;
  }
  return shared_->name_refusal;
}

void Membership::drop(const Member& member, const std::string& reason) {
  const std::lock_guard lock(shared_->mutex);
  for (const auto& seat : shared_->seats) {
    if (seat->connection != member.connection || !seat->connection->lose(reason)) continue;
    ++shared_->generation;
    shared_->notify();
  }
}

}  // namespace caravan::cluster
