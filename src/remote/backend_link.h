// A connection to a backend, of a server or of another backend (a peer): the handshake, heartbeats, and the messages of
// the stages on it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "net/endpoint.h"
#include "net/io.h"
#include "remote/activity.h"
#include "remote/channel.h"
#include "stage/profile.h"

namespace caravan::remote {

struct LinkOptions {
  enum class Role { server, peer, tool };  // tool: looks only, and is not logged
  Role role = Role::server;
  std::string token;                                // empty: no TLS
  std::string name;                                 // of this side, for the backend's log
  std::string expected_id;                          // not empty: who must be found; another backend is refused
  std::chrono::milliseconds connect_timeout{5000};  // resolving, connecting, TLS and hello, each
  std::chrono::milliseconds heartbeat_interval{1000};
  std::chrono::milliseconds heartbeat_timeout{5000};
  std::stop_token stop;  // connect() gives up soon when it is requested
};

struct RemoteDevice {
  std::string name, kind, description;
  uint64_t memory_total = 0, memory_free = 0;
  uint32_t n_threads = 0;
  std::string numeric_class;
};

// What a backend said about itself.
struct BackendInfo {
  net::Endpoint endpoint;  // as it was connected
  std::string name;
  std::string id;  // 16 random bytes, new at every start of the backend
  std::string software_version;
  uint32_t protocol_minor = 0;
  std::vector<RemoteDevice> devices;
  std::chrono::seconds keep_alive{0};
  std::string advertised;  // host:port by which other backends reach it
  std::string machine;     // the same for backends on one machine; empty: not known

  // Over all devices.
  uint64_t memory_total() const;
  uint64_t memory_free() const;
  // Of the first device.
  const std::string& numeric_class() const { return devices.front().numeric_class; }
};

// Shared by the stages on it and its owner, hence shared_ptr.
class BackendLink {
 public:
  // Connects and greets; blocks. Throws net::ConnectionError (cannot be reached, or left), RequestError (token: says
  // which side lacks it), NotSupportedError (protocol versions), ProtocolError; each message names the backend.
  static std::shared_ptr<BackendLink> connect(net::IoThreads& io, const net::Endpoint& endpoint,
                                              const LinkOptions& options);
  // Closes.
  ~BackendLink();
  BackendLink(const BackendLink&) = delete;
  BackendLink& operator=(const BackendLink&) = delete;

  // As of the hello.
  const BackendInfo& info() const;
  // Free bytes per device, as of the last heartbeat.
  std::vector<uint64_t> memory_free() const;
  // Asks the backend for a sign of life, and waits; false: none came within timeout.
  bool ask(std::chrono::milliseconds timeout);
  // What the backend said at the last heartbeat: batches at a stage on this link.
  StageQueue queue(uint32_t stage) const;
  LinkTraffic traffic() const;

  // Asks the backend and waits, first until it has unloaded what it was told to; falls back to the last heartbeat's
  // when it does not answer within timeout.
  std::vector<uint64_t> refresh_memory_free(std::chrono::milliseconds timeout);

  // Asks the backend to connect to another one, and waits: the round-trip time between the two. Throws Error saying why
  // it cannot be reached from there.
  std::chrono::microseconds probe(const std::string& endpoint, const std::string& backend_id,
                                  std::chrono::milliseconds timeout);

  // Whether it can be asked survey() and measure(): backends of earlier versions cannot.
  bool knows_surveys() const { return info().protocol_minor >= kMinorWithSurveys; }

  // What a backend says of its machine.
  struct Survey {
    std::optional<stage::DeviceProfile> profile;  // with types asked for that it could measure
    std::string error;                            // why there is none
    std::chrono::milliseconds clock_ahead{0};     // of ours; as exact as the round trip is short
    std::vector<std::string> problems;            // what it knows to be wrong, for people
  };
  // Asks the backend how fast one of its devices multiplies by matrices of these types (none: only for the rest), and
  // waits; it may have to measure that, a third of a second for each type. Throws Error when no answer comes in time.
  Survey survey(size_t device, std::span<const tensor::DType> types, std::chrono::milliseconds timeout);
  // Whether it can be asked survey_layer().
  bool knows_layer_surveys() const { return info().protocol_minor >= kMinorWithLayerSurveys; }
  // Asks the backend how long a layer takes on one of its devices (see stage::measure_layer()), and waits. Throws Error
  // when no answer comes in time, or the backend says why there is none.
  stage::LayerTimes survey_layer(size_t device, const stage::LoadRequest& sample, std::chrono::milliseconds timeout);
  // Sends some bytes there and back to measure the connection: up to 2 MiB each way, or what goes in a few
  // milliseconds. Throws Error when it takes longer than timeout.
  stage::LinkProfile measure(std::chrono::milliseconds timeout);

  bool alive() const;
  // "backend 10.0.0.2:50052 closed the connection"; empty while it is alive.
  std::string lost_reason() const;
  // Calls back once, on an I/O thread, when the link is lost; at once, on this thread, when it is lost already. Not
  // when it is closed from this side.
  void on_lost(std::function<void(const std::string& reason)> callback);
  // Calls back once, on an I/O thread, when the backend says that it goes away soon; at once, on this thread, when it
  // has said so already.
  void on_leaving(std::function<void()> callback);
  // Ends the connection; its stages hear that the link is lost.
  void close();

  // What a stage on this link hears. Called on an I/O thread, in order.
  class Listener {
   public:
    virtual ~Listener() = default;
    // Throws ProtocolError or FormatError for a frame that cannot be right: the link is closed.
    virtual void on_frame(net::Frame frame) = 0;
    virtual void on_lost(const std::string& reason) = 0;
    // Longest payload of an Output it expects.
    virtual uint64_t max_output_bytes() const = 0;
  };
  // Gives the listener a stage number, unique on this link. When the link is lost already, on_lost() follows at once.
  uint32_t attach(const std::shared_ptr<Listener>& listener);
  // For a peer: the number that a server has given to the stage.
  void attach(const std::shared_ptr<Listener>& listener, uint32_t stage);
  // Frames of that stage are dropped from now on.
  void detach(uint32_t stage);
  // Tells the backend to free a stage; does not wait.
  void unload(uint32_t stage);

  Channel& channel();

 private:
  class State;
  explicit BackendLink(std::shared_ptr<State> state) : state_(std::move(state)) {}
  const std::shared_ptr<State> state_;  // shared with the coroutines that serve the connection
};

}  // namespace caravan::remote
