// caravan backend (rpc-server): offers this machine's memory and processor to servers.
#include <fmt/format.h>

#include <algorithm>

#include "backend_metrics.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/progress.h"
#include "cache_options.h"
#include "commands.h"
#include "device/cpu/cpu_device.h"
#include "model_options.h"
#include "remote/backend_service.h"
#include "signals.h"

namespace caravan::app {
namespace {

struct BackendCommandOptions {
  std::string host = "127.0.0.1", token, log_level = "info", name, advertise;
  int port = 50052, n_threads = 0;
  uint32_t keep_alive_s = 300, drain_timeout_s = 8, poll_ms = stage::kDefaultPoll.count();
  uint64_t mem_mib = 0;
  bool cache = false;
  std::string cache_dir, models_dir;
  uint64_t cache_limit_bytes = uint64_t{64} << 30;
  int metrics_port = -1;  // none
};

// Of the free memory what can be promised: the rest of the process and of the machine needs some.
uint64_t memory_offered_mib(uint64_t available_bytes) {
  constexpr uint64_t kLeastMargin = 256;
  const uint64_t available = available_bytes >> 20;
  const uint64_t margin = std::max(kLeastMargin, available / 10);
  if (available <= margin)
    throw RequestError(fmt::format("only {} MiB are free, and {} MiB of them are kept as a margin", available, margin));
  return available - margin;
}

OptionParser make_parser(BackendCommandOptions& o) {
  OptionParser parser("caravan backend [--host HOST] [--port N] [--mem MIB] [-t N] [--rpc-token TOKEN]",
                      "Holds layers of models for servers and computes them. Also runs under the name rpc-server.");
  parser.add({{"-H", "--host"}, "HOST", "address to listen on (127.0.0.1)", {"APP_BIND"}, into(o.host)});
  parser.add(
      {{"-p", "--port"}, "N", "port to listen on, 0: any free one (50052)", {"APP_PORT"}, into(o.port, 0, 65535)});
  parser.add(
      {{"-m", "--mem"},
       "MIB",
       "most memory for weights, KV cache and scratch together; auto: what is free, less a margin (what is free)",
       {"APP_MEM"},
       [&o](const std::string& value) {
         if (value == "auto") {
           o.mem_mib = memory_offered_mib(available_memory_bytes());
           return;
         }
         if (value.find(',') != std::string::npos)
           throw RequestError("this machine offers one device, the CPU: give one number of MiB, found '" + value + "'");
         o.mem_mib = static_cast<uint64_t>(parse_integer(value, 0, INT32_MAX));
       }});
  parser.add(
      {{"-t", "--threads"}, "N", "threads to compute with (all)", {"APP_THREADS"}, [&o](const std::string& value) {
         o.n_threads = static_cast<int>(parse_integer(value, 1, 512));
       }});
  add_poll_option(parser, o.poll_ms);
  add_token_options(parser, o.token, "secret that servers must share: encrypts and authenticates (TLS 1.3)");
  parser.add({{"--keep-alive"},
              "S",
              "seconds that weights nobody uses stay loaded (300)",
              {},
              into(o.keep_alive_s, 0, 604800)});
  parser.add({{"-c", "--cache"},
              "",
              "keep weights that were pulled on disk, in $XDG_CACHE_HOME/caravan or ~/.cache/caravan",
              {"APP_CACHE"},
              into(o.cache)});
  parser.add({{"--cache-dir"}, "DIR", "the same in this folder", {"APP_CACHE_DIR"}, into(o.cache_dir)});
  parser.add({{"--cache-limit"},
              "SIZE",
              "most that the cache takes, in MiB or with a unit; the longest unused go first (64G)",
              {"APP_CACHE_LIMIT"},
              [&o](const std::string& value) { o.cache_limit_bytes = parse_size(value); }});
  parser.add({{"--models-dir"},
              "DIR",
              "folder of GGUF files, of any name, whose weights need not be sent",
              {"APP_MODELS_DIR"},
              into(o.models_dir)});
  parser.add({{"--metrics-port"},
              "N",
              "serve GET /metrics (Prometheus) and /health on this port (off)",
              {"APP_METRICS_PORT"},
              into(o.metrics_port, 0, 65535)});
  parser.add({{"--drain-timeout"},
              "S",
              "seconds that servers have to move layers elsewhere after SIGTERM (8)",
              {},
              into(o.drain_timeout_s, 0, 3600)});
  parser.add({{"--name"}, "NAME", "name in the servers' logs (the host's name)", {}, into(o.name)});
  parser.add({{"--advertise"},
              "HOST:PORT",
              "where other backends reach this one (where the server does)",
              {"APP_ADVERTISE"},
              [&o](const std::string& value) {
                net::parse_endpoint(value);  // throws for what is none
                o.advertise = value;
              }});
  add_log_options(parser, o.log_level);
  parser.add(
      {{"-d", "--device"}, "DEVICE", "what to compute with: cpu (cpu)", {"APP_DEVICE"}, [](const std::string& value) {
         if (value != "cpu" && value != "CPU")
           throw RequestError("this version computes on the processor only: expected cpu, found '" + value + "'");
       }});
  return parser;
}

// The folder of -c and --cache-dir; empty when there is to be no cache.
std::filesystem::path cache_folder(const BackendCommandOptions& o) {
  if (!o.cache_dir.empty()) return o.cache_dir;
  if (!o.cache) return {};
  std::filesystem::path folder = default_cache_folder();
  if (folder.empty())
    throw RequestError("--cache: neither XDG_CACHE_HOME nor HOME is set; say where with --cache-dir DIR");
  return folder;
}

// Where hashes of files in models-dir are remembered: with the cache, or where it would be.
weights::HashMemory hash_memory(const BackendCommandOptions& o) {
  const std::filesystem::path folder =
      o.cache_dir.empty() ? default_cache_folder() : std::filesystem::path(o.cache_dir);
  return weights::HashMemory(folder.empty() ? folder : folder / "hashes");
}

}  // namespace

int run_backend(int argc, char** argv) {
  BackendCommandOptions options;
  OptionParser parser = make_parser(options);
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.log_level));
  const sigset_t signals = block_stop_signals();

  constexpr uint64_t kMiB = uint64_t{1} << 20;
  std::vector<std::unique_ptr<device::Device>> devices;
  devices.push_back(
      std::make_unique<device::cpu::CpuDevice>(thread_count(options.n_threads), select_isa(), options.mem_mib * kMiB));
  const device::DeviceInfo info = devices.front()->info();
  remote::DeviceSliceHost host(std::move(devices), std::chrono::milliseconds(options.poll_ms));
  std::unique_ptr<weights::ChunkCache> cache;
  if (const auto folder = cache_folder(options); !folder.empty()) {
    cache =
        blaming<SystemError>("-c, --cache-dir, APP_CACHE or APP_CACHE_DIR: a folder that this user can write to",
                             [&] { return std::make_unique<weights::ChunkCache>(folder, options.cache_limit_bytes); });
    const weights::ChunkCacheStatus status = cache->status();
    spdlog::info("cache '{}': {} of {}", folder.string(), format_bytes(status.held_bytes),
                 format_bytes(status.limit_bytes));
  }
  std::unique_ptr<weights::ModelLibrary> library;
  if (!options.models_dir.empty())
    library = blaming<SystemError>("--models-dir or APP_MODELS_DIR: a folder that this user can read", [&] {
      return std::make_unique<weights::ModelLibrary>(options.models_dir, hash_memory(options));
    });
  net::IoThreads io(2);
  remote::BackendOptions service_options;
  service_options.endpoint = {options.host, static_cast<uint16_t>(options.port)};
  service_options.token = options.token;
  service_options.name = options.name;
  service_options.advertise = options.advertise;
  service_options.keep_alive = std::chrono::seconds(options.keep_alive_s);
  service_options.cache = cache.get();
  service_options.library = library.get();
  const auto opened = blaming<Error>(
      "--host or APP_BIND: an address of this machine, 0.0.0.0 for all; --port or APP_PORT: a port that nobody has",
      [&] { return std::make_unique<remote::BackendService>(io, host, service_options); });
  remote::BackendService& service = *opened;
  spdlog::info("backend on {}: {}, {} threads, {} offered{}", service.endpoint().text(), info.description,
               info.n_threads, format_bytes(info.memory_free), options.token.empty() ? "" : ", token required");

  std::unique_ptr<BackendMetricsServer> metrics;
  if (options.metrics_port >= 0) {
    const net::Endpoint endpoint{options.host, static_cast<uint16_t>(options.metrics_port)};
    metrics = blaming<Error>("--metrics-port or APP_METRICS_PORT: a port that nobody has", [&] {
      return std::make_unique<BackendMetricsServer>(io, endpoint, service, cache.get(), library.get());
    });
    spdlog::info("metrics on http://{}:{}/metrics", options.host, metrics->port());
  }

  wait_for_stop_signal(signals);
  spdlog::info("stopping");
  exit_on_next_signal(signals);
  service.drain(std::chrono::seconds(options.drain_timeout_s));
  return 0;
}

}  // namespace caravan::app
