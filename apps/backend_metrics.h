// What a backend shows over HTTP: GET /metrics for Prometheus, GET /health.
#pragma once

#include <string>

#include "http/router.h"
#include "http/server.h"
#include "remote/backend_service.h"

namespace caravan::app {

// The metrics in Prometheus' text format. cache and library may be null.
std::string backend_metrics(const remote::BackendStatus& status, const weights::ChunkCache* cache,
                            const weights::ModelLibrary* library);

// Serves both on a port of its own, without TLS or keys: nothing there is secret or changes anything.
class BackendMetricsServer {
 public:
  // Listens from now on; all of it outlives the server. Throws SystemError, RequestError.
  BackendMetricsServer(net::IoThreads& io, const net::Endpoint& endpoint, const remote::BackendService& service,
                       const weights::ChunkCache* cache, const weights::ModelLibrary* library);

  uint16_t port() const { return http_.port(); }

 private:
  http::Router router_;
  http::Server http_;
};

}  // namespace caravan::app
