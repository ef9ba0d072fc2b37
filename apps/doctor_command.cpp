// caravan doctor: looks at backends and the network between them, and says in a line each what is wrong and what to do.
#include <fmt/format.h>

#include <algorithm>
#include <future>

#include "base/log.h"
#include "base/progress.h"
#include "cluster/remote_backend.h"
#include "commands.h"
#include "model_options.h"
#include "remote/backend_link.h"
#include "remote/protocol.h"

namespace caravan::app {
namespace {

using namespace std::chrono_literals;

// Slower than this, loading and prompts wait for the network more than for the processor.
constexpr double kSlowLink = 30e6;  // bytes per second
constexpr double kLongRoundTrip = 0.02;
constexpr auto kClockTolerance = 5s;
constexpr uint64_t kLittleMemory = uint64_t{256} << 20;
constexpr auto kMeasureTimeout = 10s;
constexpr auto kProbeTimeout = 2500ms;
constexpr uint16_t kDefaultPort = 50052;

// Lines of a report: what was found good, and what is wrong with what to do.
class Report {
 public:
  void good(const std::string& who, const std::string& what) { fmt::print("ok       {}: {}\n", who, what); }
  void problem(const std::string& who, const std::string& what, const std::string& remedy) {
    fmt::print("PROBLEM  {}: {}. {}\n", who, what, remedy);
    ++n_problems_;
  }
  int n_problems() const { return n_problems_; }

 private:
  int n_problems_ = 0;
};

struct Backend {
  std::string name;
  std::shared_ptr<remote::BackendLink> link;
};

std::string remedy_for(const Error& error) {
  if (const auto* request = dynamic_cast<const RequestError*>(&error);
      request != nullptr && request->kind() == RequestError::Kind::unauthorized)
    return "Give the same --rpc-token (APP_RPC_TOKEN) on both sides; `caravan token` prints a new one";
  if (dynamic_cast<const NotSupportedError*>(&error) != nullptr)
    return "Update the older side, so that both run the same version";
  return "Is `caravan backend` running there, does it listen on an address other than 127.0.0.1 (--host), and does a "
         "firewall let the port through?";
}

// All machines that a name stands for; none when it does not resolve, which is reported.
std::vector<std::string> addresses_of(const std::string& name, cluster::BackendConnector& connector, Report& report) {
  try {
    return connector.addresses(name, {});
  } catch (const Error& error) {
    report.problem(name, error.what(),
                   "Is the name right, and does this machine's resolver (DNS, /etc/hosts) know it?");
    return {};
  }
}

void check_version(Report& report, const Backend& backend) {
  const remote::BackendInfo& info = backend.link->info();
  if (info.software_version == CARAVAN_VERSION && info.protocol_minor == remote::kProtocolMinor)
    return report.good(backend.name, fmt::format("reachable, the same version ({})", CARAVAN_VERSION));
  report.problem(backend.name,
                 fmt::format("it runs caravan {} (protocol {}.{}), this side {} (protocol {}.{})",
                             remote::printable(info.software_version), remote::kProtocolMajor, info.protocol_minor,
                             CARAVAN_VERSION, remote::kProtocolMajor, remote::kProtocolMinor),
                 "They work together, but update the older side: it lacks what is newer");
}

void check_link(Report& report, const Backend& backend) {
  const stage::LinkProfile link = backend.link->measure(kMeasureTimeout);
  const std::string figures =
      fmt::format("{:.2f} ms round trip, {:.4g} MB/s", 2e3 * link.latency_seconds, link.bytes_per_s / 1e6);
  if (link.bytes_per_s < kSlowLink)
    report.problem(backend.name,
                   fmt::format("the link is slow: {}; loading 1 GiB of weights takes {:.0f} s", figures,
                               static_cast<double>(uint64_t{1} << 30) / link.bytes_per_s),
                   "Use a wired connection of 1 Gbit/s, or keep weights there with --cache or --models-dir");
  else if (2 * link.latency_seconds > kLongRoundTrip)
    report.problem(backend.name, "the way is long: " + figures,
                   "Every token waits for it: use a backend in the same network");
  else
    report.good(backend.name, "link: " + figures);
}

void check_machine(Report& report, const Backend& backend) {
  const remote::BackendLink::Survey survey = backend.link->survey(0, {}, kMeasureTimeout);
  if (std::chrono::abs(survey.clock_ahead) > kClockTolerance)
    report.problem(backend.name,
                   fmt::format("its clock is {} s {} this one's",
                               std::abs(std::chrono::duration_cast<std::chrono::seconds>(survey.clock_ahead).count()),
                               survey.clock_ahead.count() > 0 ? "ahead of" : "behind"),
                   "Logs of the two do not match: run a time service (chrony, systemd-timesyncd) on both");
  for (const std::string& problem : survey.problems)
    report.problem(backend.name, problem,
                   "Free space there, lower --cache-limit or move --cache-dir: until then weights "
                   "are sent again at every start");
}

void check_memory(Report& report, const Backend& backend) {
  const remote::BackendInfo& info = backend.link->info();
  const std::string figures =
      fmt::format("{} of {} free", format_bytes(info.memory_free()), format_bytes(info.memory_total()));
  if (info.memory_free() < kLittleMemory)
    report.problem(backend.name, "little memory: " + figures,
                   info.memory_total() < kLittleMemory ? "Raise its --mem (APP_MEM)"
                                                       : "Another server uses it: stop that one, or add a backend");
  else
    report.good(backend.name, "memory: " + figures);
}

// Whether every backend reaches every other one.
void check_hops(Report& report, const std::vector<Backend>& backends) {
  size_t n_reached = 0;
  double longest = 0;
  for (const Backend& from : backends)
    for (const Backend& to : backends) {
      if (from.link == to.link) continue;
      try {
        const auto rtt = from.link->probe(to.link->info().advertised, to.link->info().id, kProbeTimeout);
        longest = std::max(longest, std::chrono::duration<double, std::milli>(rtt).count());
        ++n_reached;
      } catch (const Error& error) {
        report.problem(from.name, fmt::format("it does not reach {}: {}", to.name, error.what()),
                       "The server relays between the two, which is slower: put them in one network, or say with "
                       "--advertise (APP_ADVERTISE) where it is reached");
      }
    }
  if (n_reached > 0)
    report.good("backends", fmt::format("{} of {} ways between them are direct, {:.2f} ms at most", n_reached,
                                        backends.size() * (backends.size() - 1), longest));
}

void check_classes(Report& report, const std::vector<Backend>& backends) {
  for (const Backend& backend : backends)
    if (backend.link->info().numeric_class() != backends.front().link->info().numeric_class())
      report.problem(backend.name,
                     fmt::format("it computes in class {}, {} in {}", backend.link->info().numeric_class(),
                                 backends.front().name, backends.front().link->info().numeric_class()),
                     "Answers depend on where layers are: nothing to do unless they must be the same after a loss");
}

void check_model(Report& report, const ModelOptions& options) {
  try {
    ModelOptions model = options;
    model.rpc_wait_s = 0;
    OpenedModel opened(model);
    const auto proposal = opened.pipeline().propose();
    report.good(options.model,
                fmt::format("fits, with a context of {} tokens, on {} device(s); `caravan plan` shows how",
                            proposal.placement.n_ctx, proposal.placement.stages.size()));
  } catch (const Error& error) {
    std::string text = error.what();
    if (const size_t end = text.find('\n'); end != std::string::npos) text = text.substr(0, end);
    text.erase(text.find_last_not_of(".: ") + 1);
    const bool memory = dynamic_cast<const ResourceError*>(&error) != nullptr;
    report.problem(options.model, text,
                   memory ? "Add a backend, raise --mem, lower -c, or use a smaller quantisation"
                          : "`caravan inspect` says more about the file");
  }
}

}  // namespace

int run_doctor(int argc, char** argv) {
  ModelOptions options;
  options.log_level = "off";
  OptionParser parser("caravan doctor --rpc HOST:PORT,... [--rpc-token TOKEN] [-m FILE]",
                      "Checks backends, the network to and between them and, with -m, whether a model fits. Prints a\n"
                      "line for each thing it looked at. Exit status: 0 all is well, 1 something is wrong.");
  add_model_options(parser, options);
  add_log_options(parser, options.log_level);
  add_known_model_flags(parser);
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.log_level));
  if (options.rpc.empty()) throw RequestError("no backends: give them with --rpc HOST:PORT,... (or APP_RPC_BACKENDS)");

  net::IoThreads io(1);
  remote::LinkOptions link_options;
  link_options.token = options.rpc_token;
  link_options.name = "caravan doctor";
  link_options.role = remote::LinkOptions::Role::tool;
  Report report;
  std::vector<Backend> backends;
  const auto connector = cluster::make_remote_connector(io, {options.rpc_token});
  for (const std::string& name : options.rpc) {
    const std::vector<std::string> addresses = addresses_of(name, *connector, report);
    for (const std::string& address : addresses) {
      const std::string who = addresses.size() == 1 ? name : fmt::format("{} ({})", name, address);
      try {
        const auto link = remote::BackendLink::connect(io, net::parse_endpoint(address, kDefaultPort), link_options);
        backends.push_back({who, link});
      } catch (const Error& error) {
        report.problem(who, error.what(), remedy_for(error));
      }
    }
  }
  for (const Backend& backend : backends) {
    try {
      check_version(report, backend);
      if (backend.link->knows_surveys()) {
        check_link(report, backend);
        check_machine(report, backend);
      }
      check_memory(report, backend);
    } catch (const Error& error) {
      report.problem(backend.name, error.what(), "Look into its log");
    }
  }
  check_hops(report, backends);
  if (!backends.empty()) check_classes(report, backends);
  if (!options.model.empty() && !backends.empty()) check_model(report, options);
  fmt::print("{}\n", report.n_problems() == 0   ? "all is well"
                     : report.n_problems() == 1 ? "1 problem"
                                                : fmt::format("{} problems", report.n_problems()));
  return report.n_problems() == 0 ? 0 : 1;
}

}  // namespace caravan::app
