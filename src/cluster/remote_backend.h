// Backends over the wire: the connector that cluster_pipeline uses outside tests.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cluster/backend.h"
#include "net/io.h"
#include "remote/remote_stage.h"
#include "stage/layer_sample.h"

namespace caravan::cluster {

struct RemoteOptions {
  std::string token;  // empty: plaintext, only to backends without a token
  std::chrono::milliseconds heartbeat_timeout{5000};
  stage::SpeedQuestions questions = {};                               // what backends measure; without types: nothing
  std::chrono::milliseconds stage_patience = remote::kStagePatience;  // of their stages, see remote::RemoteStage
};

// Connects to `caravan backend` processes. io outlives the connector and its backends. Throws RequestError for a token
// that is too short.
std::unique_ptr<BackendConnector> make_remote_connector(net::IoThreads& io, RemoteOptions options);

}  // namespace caravan::cluster
