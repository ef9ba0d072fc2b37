#include "cluster/remote_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "base/log.h"
#include "net/endpoint.h"
#include "net/tls.h"
#include "remote/backend_link.h"
#include "remote/remote_stage.h"

namespace caravan::cluster {
namespace {

constexpr uint16_t kDefaultPort = 50052;
constexpr auto kMemoryTimeout = std::chrono::seconds(20);        // a step in progress ends before its stage is freed
constexpr auto kProbeTimeout = std::chrono::milliseconds(2500);  // the backend itself gives up after 2 s
constexpr auto kSurveyTimeout = std::chrono::seconds(20);        // of a machine that is busy
constexpr auto kLinkTestTimeout = std::chrono::seconds(5);
constexpr auto kResolveTimeout = std::chrono::seconds(5);
// A backend's first device holds our layers.
constexpr size_t kDevice = 0;

// What a backend is, but for its process. nullopt: that cannot be told.
std::optional<std::string> description(const remote::BackendInfo& info) {
  if (info.machine.empty()) return std::nullopt;
  const remote::RemoteDevice& device = info.devices.at(kDevice);
  return fmt::format("{}\n{}\n{}\n{}\n{}\n{} threads", info.machine, info.software_version, device.kind,
                     device.description, device.numeric_class, device.n_threads);
}

class RemoteBackend : public Backend {
 public:
  RemoteBackend(std::string name, std::shared_ptr<remote::BackendLink> link, std::optional<Speeds> speeds,
                std::chrono::milliseconds stage_patience)
      : name_(std::move(name)), link_(std::move(link)), speeds_(std::move(speeds)), stage_patience_(stage_patience) {}
  ~RemoteBackend() override { link_->close(); }

  const std::string& name() const override { return name_; }
  std::string id() const override { return link_->info().id; }
  uint64_t memory_free() const override { return link_->refresh_memory_free(kMemoryTimeout).at(kDevice); }
  std::string numeric_class() const override { return link_->info().devices.at(kDevice).numeric_class; }
  std::unique_ptr<stage::Stage> make_stage() override {
    return std::make_unique<remote::RemoteStage>(link_, kDevice, stage_patience_);
  }
  remote::LinkTraffic traffic() const override { return link_->traffic(); }
  const Speeds* speeds() const override { return speeds_ ? &*speeds_ : nullptr; }
  std::optional<stage::PeerRoute> peer_address() const override {
    return stage::PeerRoute{link_->info().advertised, link_->info().id, 0, ""};
  }
  std::chrono::microseconds probe(const stage::PeerRoute& other) const override {
    return link_->probe(other.endpoint, other.backend_id, kProbeTimeout);
  }
  void close() override { link_->close(); }

 private:
  const std::string name_;
  const std::shared_ptr<remote::BackendLink> link_;  // shared with the stages on it
  const std::optional<Speeds> speeds_;
  const std::chrono::milliseconds stage_patience_;
};

class RemoteConnector : public BackendConnector {
 public:
  RemoteConnector(net::IoThreads& io, RemoteOptions options) : io_(io), options_(std::move(options)) {}

  // A name of one machine stays a name, which connect() looks up each time.
  std::vector<std::string> addresses(const std::string& name, const std::stop_token& stop) override {
    const net::Endpoint endpoint = net::parse_endpoint(name, kDefaultPort);
    boost::system::error_code no_address;
    net::asio::ip::make_address(endpoint.host, no_address);
    if (!no_address) return {name};
    std::set<std::string> texts;
    bool elsewhere = false;
    for (const auto& found : net::run_blocking(io_.next_executor(), net::resolve(endpoint, kResolveTimeout), stop)) {
      elsewhere = elsewhere || !found.address().is_loopback();
      texts.insert(net::Endpoint{found.address().to_string(), endpoint.port}.text());
    }
    if (texts.size() == 1 || !elsewhere) return {name};
    return {texts.begin(), texts.end()};
  }

  std::unique_ptr<Backend> connect(const std::string& name, std::chrono::milliseconds timeout, BackendEvents events,
                                   std::stop_token stop) override {
    remote::LinkOptions link_options;
    link_options.stop = stop;
    link_options.token = options_.token;
    link_options.connect_timeout = timeout;
    link_options.heartbeat_timeout = options_.heartbeat_timeout;
    link_options.heartbeat_interval =
        std::min<std::chrono::milliseconds>(link_options.heartbeat_interval, options_.heartbeat_timeout / 5);
    auto link = remote::BackendLink::connect(io_, net::parse_endpoint(name, kDefaultPort), link_options);
    if (link->info().devices.empty()) throw Error("backend " + name + " offers no device");
    link->on_lost([lost = std::move(events.lost)](const std::string& reason) { lost(reason); });
    link->on_leaving(std::move(events.leaving));
    const std::stop_callback close_link(stop, [&link] { link->close(); });
    std::optional<Backend::Speeds> speeds = speeds_of(*link);
    return std::make_unique<RemoteBackend>(name, link, std::move(speeds), options_.stage_patience);
  }

 private:
  // As measured when this backend was connected first, be its process another one now; else measured now. nullopt: not
  // wanted, or not to be had.
  std::optional<Backend::Speeds> speeds_of(remote::BackendLink& link) {
    if (options_.questions.all_types.empty()) return std::nullopt;
    const std::string address = link.info().endpoint.text();
    const std::optional<std::string> what = description(link.info());
    if (what) {
      const std::lock_guard lock(mutex_);
      const auto known = known_.find(address);
      if (known != known_.end() && known->second.what == *what) return known->second.speeds;
    }
    std::optional<Backend::Speeds> speeds = measure(link);
    const bool complete =
        speeds && (speeds->device.layers.size() == options_.questions.layers.size() || !link.knows_layer_surveys());
    if (what && complete) {
      const std::lock_guard lock(mutex_);
      known_.insert_or_assign(address, Known{*what, *speeds});
    }
    return speeds;
  }

  // nullopt: not to be had.
  std::optional<Backend::Speeds> measure(remote::BackendLink& link) {
    const std::string who = link.info().endpoint.text();
    if (!link.knows_surveys()) {
      spdlog::warn("backend {} is of an earlier version: how fast it computes is not known", who);
      return std::nullopt;
    }
    // Those on one machine would slow each other down.
    const std::shared_ptr<std::mutex> machine = machine_of(link.info());
    const std::lock_guard alone(*machine);
    try {
      const stage::LinkProfile connection = link.measure(kLinkTestTimeout);
      const auto layers = measure_layers(link);
      const bool all = layers.size() == options_.questions.layers.size();
      const auto& others = options_.questions.other_types;
      remote::BackendLink::Survey survey =
          link.survey(kDevice, all && !others.empty() ? others : options_.questions.all_types, kSurveyTimeout);
      if (survey.profile) {
        survey.profile->layers = layers;
        return Backend::Speeds{std::move(*survey.profile), connection};
      }
      spdlog::warn("backend {}: how fast it computes is not known: {}", who, survey.error);
    } catch (const Error& error) {
      if (!link.alive()) throw;
      spdlog::warn("{}; how fast it is counts as unknown", error.what());
    }
    return std::nullopt;
  }

  std::map<uint32_t, stage::LayerTimes> measure_layers(remote::BackendLink& link) const {
    std::map<uint32_t, stage::LayerTimes> layers;
    if (!link.knows_layer_surveys()) return layers;
    for (const auto& [kind, sample] : options_.questions.layers) {
      try {
        layers[kind] = link.survey_layer(kDevice, sample, kSurveyTimeout);
      } catch (const Error& error) {
        if (!link.alive()) throw;
        spdlog::info("{}; it is estimated from products of matrices", error.what());
        break;
      }
    }
    return layers;
  }

  std::shared_ptr<std::mutex> machine_of(const remote::BackendInfo& info) {
    const std::lock_guard lock(mutex_);
    auto& machine = machines_[info.machine.empty() ? info.endpoint.host : info.machine];
    if (!machine) machine = std::make_shared<std::mutex>();
    return machine;
  }

  net::IoThreads& io_;
  const RemoteOptions options_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<std::mutex>> machines_;  // under mutex_: held while a backend there measures
  // What the backend at an address is, and measured.
  struct Known {
    std::string what;
    Backend::Speeds speeds;
  };
  std::map<std::string, Known> known_;  // under mutex_; so that one that is started again counts in plans at once
};

}  // namespace

std::unique_ptr<BackendConnector> make_remote_connector(net::IoThreads& io, RemoteOptions options) {
  if (!options.token.empty()) net::check_token(options.token);
  return std::make_unique<RemoteConnector>(io, std::move(options));
}

}  // namespace caravan::cluster
