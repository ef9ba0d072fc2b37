// A backend as the cluster sees it: something that can be connected, offers memory, makes stages, and may be lost.
// remote_backend.h implements it over the wire; tests implement it in memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "stage/stage.h"

namespace caravan::cluster {

// One established connection to a backend. Destroying it ends the connection; its stages are destroyed before.
class Backend {
 public:
  virtual ~Backend() = default;
  // "10.0.0.2:50052", as the user wrote it.
  virtual const std::string& name() const = 0;
  // Bytes that it can hold for us at the moment.
  virtual uint64_t memory_free() const = 0;
  virtual std::string numeric_class() const = 0;
  virtual std::unique_ptr<stage::Stage> make_stage() = 0;
};

// Connects backends by name.
class BackendConnector {
 public:
  virtual ~BackendConnector() = default;
  // Connects and greets, within timeout. on_lost is called at most once, from any thread, when the connection ends
  // later, with a reason that names the backend; perhaps while or after the Backend is destroyed. Throws Error naming
  // the backend and the cause: retried when it may be temporary, NotSupportedError or RequestError (versions, tokens)
  // when trying again is of no use.
  virtual std::unique_ptr<Backend> connect(const std::string& name, std::chrono::milliseconds timeout,
                                           std::function<void(std::string reason)> on_lost) = 0;
};

}  // namespace caravan::cluster
