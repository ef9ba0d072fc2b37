// The contract of a stage: a contiguous run of layers with its KV caches, here (LocalStage) or on a backend (remote/).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
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
  bool stage_lost = false;         // with error: and so has the stage, nothing more can be computed there
  double compute_seconds = 0;      // spent computing at this stage
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

  // Loads the slice: memory is reserved first, chunks come from the sources, on_progress gets the weight bytes done.
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

}  // namespace caravan::stage
