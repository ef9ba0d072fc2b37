#include "cluster/remote_backend.h"

#include <algorithm>
#include <set>

#include "net/endpoint.h"
#include "net/tls.h"
#include "remote/backend_link.h"
#include "remote/remote_stage.h"

namespace caravan::cluster {
namespace {

constexpr uint16_t kDefaultPort = 50052;
constexpr auto kMemoryTimeout = std::chrono::seconds(20);        // a step in progress ends before its stage is freed
constexpr auto kProbeTimeout = std::chrono::milliseconds(2500);  // the backend itself gives up after 2 s
constexpr auto kResolveTimeout = std::chrono::seconds(5);
// A backend's first device holds our layers.
constexpr size_t kDevice = 0;

class RemoteBackend : public Backend {
 public:
  RemoteBackend(std::string name, std::shared_ptr<remote::BackendLink> link)
      : name_(std::move(name)), link_(std::move(link)) {}
  ~RemoteBackend() override { link_->close(); }

  const std::string& name() const override { return name_; }
  std::string id() const override { return link_->info().id; }
  uint64_t memory_free() const override { return link_->refresh_memory_free(kMemoryTimeout).at(kDevice); }
  std::string numeric_class() const override { return link_->info().devices.at(kDevice).numeric_class; }
  std::unique_ptr<stage::Stage> make_stage() override { return std::make_unique<remote::RemoteStage>(link_, kDevice); }
  remote::LinkTraffic traffic() const override { return link_->traffic(); }
  std::optional<stage::PeerRoute> peer_address() const override {
    return stage::PeerRoute{link_->info().advertised, link_->info().id, 0, ""};
  }
  std::chrono::microseconds probe(const stage::PeerRoute& other) const override {
    return link_->probe(other.endpoint, other.backend_id, kProbeTimeout);
  }

 private:
  const std::string name_;
  const std::shared_ptr<remote::BackendLink> link_;  // shared with the stages on it
};

class RemoteConnector : public BackendConnector {
 public:
  RemoteConnector(net::IoThreads& io, RemoteOptions options) : io_(io), options_(std::move(options)) {}

  // A name of one machine stays a name, which connect() looks up each time.
  std::vector<std::string> addresses(const std::string& name) override {
    const net::Endpoint endpoint = net::parse_endpoint(name, kDefaultPort);
    boost::system::error_code no_address;
    net::asio::ip::make_address(endpoint.host, no_address);
    if (!no_address) return {name};
    std::set<std::string> texts;
    bool elsewhere = false;
    for (const auto& found : net::run_blocking(io_.make_strand(), net::resolve(endpoint, kResolveTimeout))) {
      elsewhere = elsewhere || !found.address().is_loopback();
      texts.insert(net::Endpoint{found.address().to_string(), endpoint.port}.text());
    }
    if (texts.size() == 1 || !elsewhere) return {name};
    return {texts.begin(), texts.end()};
  }

  std::unique_ptr<Backend> connect(const std::string& name, std::chrono::milliseconds timeout,
                                   BackendEvents events) override {
    remote::LinkOptions link_options;
    link_options.token = options_.token;
    link_options.connect_timeout = timeout;
    link_options.heartbeat_timeout = options_.heartbeat_timeout;
    link_options.heartbeat_interval =
        std::min<std::chrono::milliseconds>(link_options.heartbeat_interval, options_.heartbeat_timeout / 5);
    auto link = remote::BackendLink::connect(io_, net::parse_endpoint(name, kDefaultPort), link_options);
    if (link->info().devices.empty()) throw Error("backend " + name + " offers no device");
    link->on_lost([lost = std::move(events.lost)](const std::string& reason) { lost(reason); });
    link->on_leaving(std::move(events.leaving));
    return std::make_unique<RemoteBackend>(name, std::move(link));
  }

 private:
  net::IoThreads& io_;
  const RemoteOptions options_;
};

}  // namespace

std::unique_ptr<BackendConnector> make_remote_connector(net::IoThreads& io, RemoteOptions options) {
  if (!options.token.empty()) net::check_token(options.token);
  return std::make_unique<RemoteConnector>(io, std::move(options));
}

}  // namespace caravan::cluster
