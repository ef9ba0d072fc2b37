// Backends in memory: real stages on CPU devices behind connections that a test can refuse, cut and bring back.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu_features.h"
#include "base/error.h"
#include "cluster/backend.h"
#include "device/cpu/cpu_device.h"
#include "stage/local_stage.h"

namespace caravan::cluster::test {

// One connection: alive until the test cuts it.
struct FakeConnection {
  std::mutex mutex;
  bool cut = false;      // under mutex
  BackendEvents events;  // lost is called outside mutex, perhaps late
};

// How all machines and their stages behave; set by the test, read by every stage.
struct StageBehaviour {
  std::mutex mutex;
  std::condition_variable changed;
  bool hold_outputs = false;                              // outputs wait until the stage is destroyed
  size_t n_held = 0;                                      // outputs that wait now
  std::function<void(const std::string& machine)> loads;  // called at the beginning of every load()
  size_t n_opened = 0;
  std::string refuses;        // the machine on which the next load finds no memory
  std::string fails_to_open;  // the machine whose stages cannot be opened
  size_t n_open_failures = 0;
  std::function<void(const std::string& machine)> asks_memory;  // called when a machine is asked for its memory
  std::function<void(const std::string& machine)> ends;         // called when a stage that was opened is destroyed
  std::set<std::string> listens;                                // machines that take connections of others
  std::map<std::pair<std::string, std::string>, std::chrono::microseconds> reached;
  size_t n_probes = 0;
};

// A LocalStage behind a connection: once that is cut, nothing gets in and loading fails. Outputs that are held back
// are delivered when the stage is destroyed, as by a stage that was busy when its plan was lost.
class FakeStage : public stage::Stage, private stage::OutputSink {
 public:
  FakeStage(std::string machine, device::Device& device, std::shared_ptr<FakeConnection> connection,
            StageBehaviour& behaviour)
      : machine_(std::move(machine)),
        connection_(std::move(connection)),
        behaviour_(behaviour),
        inner_(std::make_unique<stage::LocalStage>(device)) {}
  ~FakeStage() override {
    std::function<void(const std::string&)> ends;
    {
      const std::lock_guard lock(behaviour_.mutex);
      ends = behaviour_.ends;
    }
    if (ends && sink_ != nullptr) ends(machine_);
    inner_.reset();
    for (stage::StageOutput& output : held_) sink_->deliver(std::move(output));
    const std::lock_guard lock(behaviour_.mutex);
    behaviour_.n_held -= held_.size();
  }

  void load(const stage::LoadRequest& request, std::span<weights::WeightSource* const> sources,
            const ProgressFunction& on_progress) override {
    std::function<void(const std::string&)> loads;
    bool refused = false;
    {
      const std::lock_guard lock(behaviour_.mutex);
      loads = behaviour_.loads;
      refused = behaviour_.refuses == machine_;
      if (refused) behaviour_.refuses.clear();
    }
    if (refused) throw ResourceError(machine_ + ": another server took the memory");
    if (loads) loads(machine_);
    if (is_cut()) throw Error(machine_ + ": the connection ended while loading");
    inner_->load(request, sources, on_progress);
  }

  void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) override {
    {
      const std::lock_guard lock(behaviour_.mutex);
      behaviour_.n_open_failures += behaviour_.fails_to_open == machine_;
      if (behaviour_.fails_to_open == machine_) throw Error(machine_ + ": the stage cannot be opened");
    }
    sink_ = &sink;
    inner_->open(session, epoch, *this);
    const std::lock_guard lock(behaviour_.mutex);
    ++behaviour_.n_opened;
    behaviour_.changed.notify_all();
  }

  void enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch,
               std::vector<float> input) override {
    if (!is_cut()) inner_->enqueue(fence, std::move(batch), std::move(input));
  }

  std::string numeric_class() const override { return inner_->numeric_class(); }

 private:
  bool is_cut() const {
    const std::lock_guard lock(connection_->mutex);
    return connection_->cut;
  }

  void deliver(stage::StageOutput output) noexcept override {
    {
      const std::lock_guard lock(behaviour_.mutex);
      if (behaviour_.hold_outputs) {
        held_.push_back(std::move(output));
        ++behaviour_.n_held;
        behaviour_.changed.notify_all();
        return;
      }
    }
    if (!is_cut()) sink_->deliver(std::move(output));
  }

  const std::string machine_;
  const std::shared_ptr<FakeConnection> connection_;  // shared with the test, which cuts it
  StageBehaviour& behaviour_;
  stage::OutputSink* sink_ = nullptr;
  std::vector<stage::StageOutput> held_;  // by the stage's thread, then by the destructor
  std::unique_ptr<stage::LocalStage> inner_;
};

// The machines of a test and the connector to them. Functions may be called from any thread.
class FakeMachines : public BackendConnector {
 public:
  enum class State { up, down, refuses };  // refuses: trying again is of no use

  void add(const std::string& name, State state = State::up, uint64_t memory = uint64_t{1} << 30) {
    const std::lock_guard lock(mutex_);
    machines_[name] = {state, memory, {}, 0, std::make_unique<device::cpu::CpuDevice>(1, select_isa(), memory), {}};
  }

  void set_state(const std::string& name, State state) {
    const std::lock_guard lock(mutex_);
    machines_.at(name).state = state;
  }

  // Ends the machine's latest connection; further attempts find it in `state`.
  void cut(const std::string& name, State state = State::down) { cut(name, n_connections(name) - 1, state); }

  // Reports the end of an earlier connection, counted from 0.
  void cut(const std::string& name, size_t connection, State state) {
    std::shared_ptr<FakeConnection> cut_one;
    {
      const std::lock_guard lock(mutex_);
      machines_.at(name).state = state;
      cut_one = machines_.at(name).connections.at(connection);
    }
    std::function<void(std::string)> lost;
    {
      const std::lock_guard lock(cut_one->mutex);
      cut_one->cut = true;
      lost = std::exchange(cut_one->events.lost, nullptr);
    }
    if (lost) lost("backend " + name + ": connection lost");
  }

  // The machine says that it goes away soon.
  void leave(const std::string& name) {
    std::shared_ptr<FakeConnection> leaving;
    {
      const std::lock_guard lock(mutex_);
      leaving = machines_.at(name).connections.back();
    }
    leaving->events.leaving();
  }

  // From now on the name stands for these machines; none: it does not resolve.
  void name(const std::string& name, std::vector<std::string> machines) {
    const std::lock_guard lock(mutex_);
    names_[name] = std::move(machines);
  }

  std::vector<std::string> addresses(const std::string& name, const std::stop_token&) override {
    const std::lock_guard lock(mutex_);
    const auto found = names_.find(name);
    if (found == names_.end()) return {name};
    if (found->second.empty()) throw Error(name + ": the name does not resolve");
    return found->second;
  }

  // Another address of the same process.
  void alias(const std::string& address, const std::string& machine) {
    const std::lock_guard lock(mutex_);
    aliases_[address] = machine;
  }

  void set_memory(const std::string& name, uint64_t memory) {
    const std::lock_guard lock(mutex_);
    machines_.at(name).memory = memory;
  }

  // From now on one machine reaches another, which takes connections of others at all.
  void let_reach(const std::string& from, const std::string& to, std::chrono::microseconds rtt) {
    const std::lock_guard lock(behaviour_.mutex);
    behaviour_.reached[{from, to}] = rtt;
    behaviour_.listens.insert(to);
  }

  // What connections made from now on say of the machine.
  void set_speeds(const std::string& name, const Backend::Speeds& speeds) {
    const std::lock_guard lock(mutex_);
    machines_.at(name).speeds = speeds;
  }

  size_t n_connections(const std::string& name) const {
    const std::lock_guard lock(mutex_);
    return machines_.at(name).connections.size();
  }

  // Waits until n more attempts were made to connect to the machine.
  void wait_for_attempts(const std::string& name, size_t n) {
    std::unique_lock lock(mutex_);
    const size_t goal = machines_.at(name).n_attempts + n;
    attempted_.wait(lock, [&] { return machines_.at(name).n_attempts >= goal; });
  }

  StageBehaviour& stages() { return behaviour_; }

  std::unique_ptr<Backend> connect(const std::string& name, std::chrono::milliseconds, BackendEvents events,
                                   std::stop_token) override {
    const std::lock_guard lock(mutex_);
    const auto alias = aliases_.find(name);
    const std::string& id = alias != aliases_.end() ? alias->second : name;
    Machine& machine = machines_.at(id);
    ++machine.n_attempts;
    attempted_.notify_all();
    if (machine.state == State::down) throw Error(name + ": connection refused");
    if (machine.state == State::refuses) throw NotSupportedError(name + ": speaks another protocol version");
    auto connection = std::make_shared<FakeConnection>();
    connection->events = std::move(events);
    machine.connections.push_back(connection);
    return std::make_unique<Connected>(id, machine.memory, machine.speeds, *machine.device, std::move(connection),
                                       behaviour_);
  }

 private:
  class Connected : public Backend {
   public:
    Connected(std::string name, uint64_t memory, std::optional<Speeds> speeds, device::Device& device,
              std::shared_ptr<FakeConnection> connection, StageBehaviour& behaviour)
        : name_(std::move(name)),
          memory_(memory),
          speeds_(std::move(speeds)),
          device_(device),
          connection_(std::move(connection)),
          behaviour_(behaviour) {}
    const std::string& name() const override { return name_; }
    std::string id() const override { return name_; }
    uint64_t memory_free() const override {
      std::function<void(const std::string&)> asks_memory;
      {
        const std::lock_guard lock(behaviour_.mutex);
        asks_memory = behaviour_.asks_memory;
      }
      if (asks_memory) asks_memory(name_);
      return memory_;
    }
    const Speeds* speeds() const override { return speeds_ ? &*speeds_ : nullptr; }
    std::string numeric_class() const override { return device_.info().numeric_class; }
    std::optional<stage::PeerRoute> peer_address() const override {
      const std::lock_guard lock(behaviour_.mutex);
      if (!behaviour_.listens.contains(name_)) return std::nullopt;
      return stage::PeerRoute{name_, name_, 0, ""};
    }
    std::chrono::microseconds probe(const stage::PeerRoute& other) const override {
      const std::lock_guard lock(behaviour_.mutex);
      ++behaviour_.n_probes;
      const auto found = behaviour_.reached.find({name_, other.endpoint});
      if (found == behaviour_.reached.end()) throw Error(name_ + " does not reach " + other.endpoint);
      return found->second;
    }
    std::unique_ptr<stage::Stage> make_stage() override {
      return std::make_unique<FakeStage>(name_, device_, connection_, behaviour_);
    }

   private:
    const std::string name_;
    const uint64_t memory_;
    const std::optional<Speeds> speeds_;
    device::Device& device_;
    const std::shared_ptr<FakeConnection> connection_;
    StageBehaviour& behaviour_;
  };

  struct Machine {
    State state = State::up;
    uint64_t memory = 0;
    std::optional<Backend::Speeds> speeds;
    size_t n_attempts = 0;
    std::unique_ptr<device::cpu::CpuDevice> device;
    std::vector<std::shared_ptr<FakeConnection>> connections;
  };

  mutable std::mutex mutex_;
  std::condition_variable attempted_;
  std::map<std::string, Machine> machines_;
  std::map<std::string, std::vector<std::string>> names_;
  std::map<std::string, std::string> aliases_;
  StageBehaviour behaviour_;
};

}  // namespace caravan::cluster::test
