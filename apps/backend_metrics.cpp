#include "backend_metrics.h"

#include <fmt/format.h>

#include "base/error.h"

namespace caravan::app {
namespace {

// Builds the text metric by metric.
class Exposition {
 public:
  // Begins a metric; type is "counter" or "gauge".
  void begin(std::string_view type, std::string_view name, std::string_view help) {
    name_ = name;
    text_ += fmt::format("# HELP caravan_{0} {2}\n# TYPE caravan_{0} {1}\n", name, type, help);
  }
  // labels: "a=\"b\"", or empty.
  template <typename Number>
  void value(Number number, std::string_view labels = {}) {
    if (labels.empty())
      text_ += fmt::format("caravan_{} {}\n", name_, number);
    else
      text_ += fmt::format("caravan_{}{{{}}} {}\n", name_, labels, number);
  }
  template <typename Number>
  void single(std::string_view type, std::string_view name, std::string_view help, Number number) {
    begin(type, name, help);
    value(number);
  }
  std::string release() { return std::move(text_); }

 private:
  std::string name_, text_;
};

void write_stages(Exposition& out, const remote::BackendStatus& status) {
  const auto row = [&](std::string_view type, std::string_view name, std::string_view help, auto field) {
    out.begin(type, name, help);
    for (const remote::StageStatus& stage : status.stages)
      out.value(field(stage), fmt::format("peer=\"{}\",stage=\"{}\",layers=\"{}-{}\"", stage.peer, stage.stage,
                                          stage.layer_begin, stage.layer_end));
  };
  row("counter", "stage_compute_seconds_total", "Seconds spent computing, per stage of a server.",
      [](const auto& s) { return s.activity.compute_seconds; });
  row("counter", "stage_tickets_total", "Batches computed.", [](const auto& s) { return s.activity.n_tickets; });
  row("gauge", "stage_queue", "Batches that came and are not computed.", [](const auto& s) { return s.n_queued; });
  row("counter", "stage_received_bytes_total", "Batches and hidden rows that came.",
      [](const auto& s) { return s.activity.bytes_in; });
  row("counter", "stage_sent_bytes_total", "Hidden rows and outputs that were sent.",
      [](const auto& s) { return s.activity.bytes_out; });
  row("counter", "stage_tickets_failed_total", "Batches that ended with an error.",
      [](const auto& s) { return s.activity.n_failed; });
  const auto seconds = [](std::chrono::microseconds time) { return std::chrono::duration<double>(time).count(); };
  row("gauge", "stage_server_rtt_seconds", "Mean round trip of the server's heartbeats; 0: none yet.",
      [&](const auto& s) { return seconds(s.server_rtt); });
  row("gauge", "stage_next_rtt_seconds", "Mean round trip to the next stage, where hidden rows go straight there.",
      [&](const auto& s) { return seconds(s.next_rtt); });
  row("gauge", "stage_weights_bytes", "Weights of the stage; shared ones are counted in each.",
      [](const auto& s) { return s.held.weights; });
  row("gauge", "stage_kv_cache_bytes", "KV cache of the stage.", [](const auto& s) { return s.held.kv_cache; });
}

void write_weights(Exposition& out, const remote::BackendStatus& status, const weights::ChunkCache* cache,
                   const weights::ModelLibrary* library) {
  out.begin("counter", "weights_bytes_total", "Weight bytes loaded, by where they came from.");
  out.value(status.origins.models_dir, "source=\"models-dir\"");
  out.value(status.origins.cache, "source=\"cache\"");
  out.value(status.origins.peers, "source=\"peer\"");
  out.value(status.origins.server, "source=\"server\"");
  out.single("counter", "weights_given_bytes_total", "Weight bytes given to other backends.", status.given_bytes);
  if (cache != nullptr) {
    const weights::ChunkCacheStatus s = cache->status();
    out.single("gauge", "cache_bytes", "Bytes in the chunk cache.", s.held_bytes);
    out.single("gauge", "cache_limit_bytes", "Most that it may hold.", s.limit_bytes);
    out.single("counter", "cache_written_bytes_total", "Bytes written to it.", s.written_bytes);
    out.single("counter", "cache_evicted_bytes_total", "Bytes that made room.", s.evicted_bytes);
    out.single("counter", "cache_corrupt_total", "Damaged chunks that were deleted.", s.n_corrupt);
    out.single("counter", "cache_not_kept_total", "Chunks for which there was no room.", s.n_not_kept);
  }
  if (library != nullptr) {
    const weights::ModelLibraryStatus s = library->status();
    out.single("gauge", "models_dir_models", "GGUF models in models-dir.", s.n_models);
    out.single("gauge", "models_dir_bytes", "Bytes of their tensors.", s.total_bytes);
    out.single("gauge", "models_dir_hashed_bytes", "Of these, hashed.", s.hashed_bytes);
  }
}

}  // namespace

std::string backend_metrics(const remote::BackendStatus& status, const weights::ChunkCache* cache,
                            const weights::ModelLibrary* library) {
  Exposition out;
  out.single("gauge", "connections", "Servers and backends connected.", status.n_connections);
  out.single("counter", "connections_total", "Connections accepted.", status.n_accepted);
  out.single("counter", "connections_refused_total", "Connections that did not get past the handshake.",
             status.n_refused);
  out.single("gauge", "stages", "Stages reserved or loaded.", status.n_stages);
  out.single("counter", "compute_seconds_total", "Seconds spent computing, all stages since the start.",
             status.activity.compute_seconds);
  out.single("counter", "tickets_total", "Batches computed.", status.activity.n_tickets);
  out.single("counter", "received_bytes_total", "Batches and hidden rows that came.", status.activity.bytes_in);
  out.single("counter", "sent_bytes_total", "Hidden rows and outputs that were sent.", status.activity.bytes_out);
  out.single("counter", "tickets_failed_total", "Batches that ended with an error.", status.activity.n_failed);
  out.single("counter", "hops_lost_total", "Connections to the next stage, or from the one before, that were lost.",
             status.activity.n_hops_lost);
  out.single("counter", "stale_frames_total", "Batches of another session or epoch, dropped.", status.n_stale);
  out.single("gauge", "resident_weights", "Sets of weights in memory, used or kept.", status.n_resident);
  out.begin("gauge", "memory_free_bytes", "Memory that a stage could get now, per device.");
  for (size_t i = 0; i < status.memory_free.size(); ++i)
    out.value(status.memory_free[i], fmt::format("device=\"{}\"", i));
  out.begin("gauge", "memory_bytes", "Memory offered, per device.");
  for (size_t i = 0; i < status.memory_total.size(); ++i)
    out.value(status.memory_total[i], fmt::format("device=\"{}\"", i));
  write_stages(out, status);
  write_weights(out, status, cache, library);
  return out.release();
}

namespace {

http::ServerOptions http_options() {
  http::ServerOptions options;
  options.max_body_bytes = 0;
  options.max_connections = 64;
  options.idle_timeout = std::chrono::seconds(60);
  options.write_timeout = std::chrono::seconds(60);
  options.cors_origins = "";
  options.error_response = [](std::exception_ptr failure) {
    http::Response response;
    response.status = 500;
    response.content_type = "text/plain; charset=utf-8";
    try {
      std::rethrow_exception(failure);
    } catch (const http::HttpError& error) {
      response.status = error.status();
      response.body = error.what();
    } catch (const std::exception& error) {
      response.body = error.what();
    }
    return response;
  };
  return options;
}

net::awaitable<void> answer(http::Exchange& exchange, http::Response response) {
  co_await exchange.send(std::move(response));
}

}  // namespace

BackendMetricsServer::BackendMetricsServer(net::IoThreads& io, const net::Endpoint& endpoint,
                                           const remote::BackendService& service, const weights::ChunkCache* cache,
                                           const weights::ModelLibrary* library)
    : http_(io, router_, http_options()) {
  router_.add("GET", "/metrics", [&service, cache, library](http::Exchange& exchange) {
    http::Response response;
    response.content_type = "text/plain; version=0.0.4";
    response.body = backend_metrics(service.status(), cache, library);
    return answer(exchange, std::move(response));
  });
  router_.add("GET", "/health", [](http::Exchange& exchange) {
    http::Response response;
    response.body = "{\"status\":\"ok\"}";
    return answer(exchange, std::move(response));
  });
  http_.listen(endpoint);
}

}  // namespace caravan::app
