// The contract of a stage: a contiguous run of layers with its KV caches, here (LocalStage) or on a backend (remote/).
// DirectStage is one that can pass its output to the next stage's machine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gguf/metadata.h"
#include "models/arch.h"
#include "stage/batch.h"
#include "tensor/dtype.h"
#include "weights/source.h"

namespace caravan::stage {

using models::Slice;

// The KV cache that all stages of a plan agree on, and the sizes of a batch.
struct CacheConfig {
  tensor::DType k_type = tensor::DType::f16;  // f32, f16 or q8_0
  tensor::DType v_type = tensor::DType::f16;
  uint32_t block_tokens = 32;
  std::vector<uint32_t> n_blocks;  // per cache group of the model, in the model's order
  uint32_t max_slots = 1;
  uint32_t max_rows = 512;
  uint32_t max_outputs = 512;
  bool operator==(const CacheConfig&) const = default;
};

// Everything a stage needs to know to load its part of a model.
struct LoadRequest {
  gguf::Metadata hyperparameters;  // general.architecture and the <architecture>.* keys
  weights::Manifest manifest;      // exactly the tensors of the slice
  Slice slice;
  CacheConfig cache;
};

// Bytes that a slice takes on its device; known before loading.
struct MemoryNeed {
  uint64_t weights = 0, kv_cache = 0, scratch = 0;
  uint64_t total() const { return weights + kv_cache + scratch; }
};

// Names one step: frames that do not carry the current session and epoch are dropped and counted, never computed.
struct Fence {
  uint64_t session = 0;  // one server's use of a stage
  uint64_t epoch = 0;    // grows with every plan
  uint64_t ticket = 0;   // grows with every batch
  auto operator<=>(const Fence&) const = default;
};

// What a stage delivers for a ticket: hidden rows for the next stage, or the requested outputs, or why it failed.
struct StageOutput {
  Fence fence;
  std::vector<float> hidden;       // n_rows x n_embd, from a stage that is not the last
  std::vector<RowOutput> outputs;  // from the last stage, in the order of Batch::outputs
  std::string error;               // not empty: the ticket failed here
  bool stage_lost = false;  // with error: and so has the stage, or its way to a neighbour: nothing more can be computed
  double compute_seconds = 0;  // spent computing at this stage
  // For outputs that came here past other stages: spent computing at each of those, in their order.
  std::vector<double> earlier_seconds;
};

// Where a stage's outputs go: fixed by the plan, the next stage or the collector. Called on the stage's own thread;
// implementations queue and return, they never block and never throw.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  virtual void deliver(StageOutput output) noexcept = 0;
};

// A loaded or loadable slice. load() blocks (planning and loading never run on the engine thread); enqueue() does not.
class Stage {
 public:
  virtual ~Stage() = default;

  // Takes the memory for a load() of request to come; blocks. need is an estimate that load() replaces by what the
  // slice takes. Throws ResourceError with need and have.
  virtual void reserve(const LoadRequest& request, const MemoryNeed& need) {
    (void)request;
    (void)need;
  }

  // Loads the slice: memory is reserved first, chunks come from the sources, on_progress gets the weight bytes done,
  // perhaps the same again: that the load moves.
  // Throws ResourceError (does not fit: need and have), FormatError (bad weights), NotSupportedError (architecture),
  // Error (the source or the peer failed).
  using ProgressFunction = std::function<void(uint64_t bytes_done)>;
  virtual void load(const LoadRequest& request, std::span<weights::WeightSource* const> sources,
                    const ProgressFunction& on_progress) = 0;

  // Opens a session: its outputs go to sink (which must outlive the stage or the next open). Tickets of other sessions
  // or older epochs are dropped from now on. The session's block tables start empty.
  virtual void open(uint64_t session, uint64_t epoch, OutputSink& sink) = 0;

  // Queues one step; tickets are computed in the order they come. input: hidden rows (n_rows x n_embd) unless the slice
  // embeds. The result, or the reason of failure, is delivered to the sink.
  virtual void enqueue(const Fence& fence, std::shared_ptr<const Batch> batch, std::vector<float> input) = 0;

  // "cpu-fma16-1": stages of one class give the same bits (design: numeric class).
  virtual std::string numeric_class() const = 0;
};

// Where the next stage is, and the secret by which the two know each other.
struct PeerRoute {
  std::string endpoint;    // host:port
  std::string backend_id;  // who must be found there
  uint32_t stage = 0;      // the stage's number there
  std::string key;
};

// How a stage is joined to its neighbours when activations do not go through us.
struct Routes {
  std::optional<std::string> input_key;  // input comes from the peer that has this key, and from nobody else
  std::optional<PeerRoute> output;       // hidden rows go there; only errors are delivered to the sink
};

// A stage on another machine that can pass activations on without us. In a row of such stages, enqueue() is called at
// the first and expect() at the last, whose sink gets the result. A sink gets an error with ticket 0 when a connection
// between two of them is lost.
class DirectStage : public Stage {
 public:
  using Stage::open;
  // Where a peer finds this stage; the key is left empty.
  virtual PeerRoute address() const = 0;
  // As Stage::open(), and waits until the session is open and the next stage connected: that one is opened before.
  // Throws Error naming both when the next stage cannot be reached.
  virtual void open(uint64_t session, uint64_t epoch, OutputSink& sink, const Routes& routes) = 0;
  // The result of this step will come: batch says what it must look like.
  virtual void expect(const Fence& fence, std::shared_ptr<const Batch> batch) = 0;
};

}  // namespace caravan::stage
