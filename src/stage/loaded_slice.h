// A slice of a model on a device, in two parts: LoadedSlice, the weights, which are const and shared by everybody who
// loaded the same bytes; and SliceSession, the KV cache, block tables and executable of one user of them.
//
//   auto slice = LoadedSlice::load(device, request, sources, on_progress);   // or one found by content_key(request)
//   SliceSession session(slice, request.cache);
//   StageOutput out = session.compute(batch, hidden);
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/sha256.h"
#include "device/device.h"
#include "models/arch.h"
#include "stage/batch.h"
#include "stage/stage.h"

namespace caravan::stage {

// Names the contents of a slice: equal for requests with equal hyperparameters, slices and chunk hashes, whatever their
// cache configuration. Meaningful for manifests with hashes only.
Digest content_key(const LoadRequest& request);

// What slices need on a device before anything is loaded.
//   tensors: types and shapes of at least the slice's tensors
// Throws FormatError when the tensors do not fit the architecture.
MemoryNeed memory_need(const models::Arch& arch, const models::Hyperparameters& hp, const graph::TensorMap& tensors,
                       const Slice& slice, const CacheConfig& cache, const device::Device& device);

// The parts of memory_need() per layer, so that a planner can add up any slice: weights and KV are exact sums of these;
// scratch is largest for the whole model.
struct LayerNeeds {
  uint64_t embedding_weights = 0;        // held by the slice that embeds
  uint64_t output_weights = 0;           // held by the slice that gives outputs
  uint64_t shared_weights = 0;           // held by every slice
  std::vector<uint64_t> layer_weights;   // per layer
  std::vector<uint64_t> layer_kv_cache;  // per layer, for the configured number of blocks
  // Per cache group: bytes of one block (K and V) summed over all layers of the model.
  std::vector<uint64_t> group_block_bytes;
  uint64_t scratch = 0;  // of the whole model as one slice
};
LayerNeeds layer_needs(const models::Arch& arch, const models::Hyperparameters& hp, const graph::TensorMap& tensors,
                       const CacheConfig& cache, const device::Device& device);

// The device's view of a configuration, restricted to the layers of the slice.
device::CacheSpec cache_spec(const models::Arch& arch, const models::Hyperparameters& hp, const Slice& slice,
                             const CacheConfig& cache);

// Weights of a slice on a device, and the graph that uses them. Const after load(); safe to share between threads and
// sessions. The device must outlive it.
class LoadedSlice {
 public:
  // A SliceLoader that runs once.
  static std::shared_ptr<const LoadedSlice> load(device::Device& device, const LoadRequest& request,
                                                 std::span<weights::WeightSource* const> sources,
                                                 const Stage::ProgressFunction& on_progress);

  const Digest& key() const { return key_; }
  const models::Arch& arch() const { return *arch_; }
  const models::Hyperparameters& hyperparameters() const { return hp_; }
  const Slice& slice() const { return slice_; }
  const graph::Graph& graph() const { return graph_; }
  device::Device& device() const { return device_; }
  std::shared_ptr<const device::WeightSet> weights() const { return weights_; }
  // Device memory held: the weights.
  uint64_t bytes() const { return weights_->size_bytes(); }

 private:
  friend class SliceLoader;
  explicit LoadedSlice(device::Device& device) : device_(device) {}

  device::Device& device_;
  Digest key_;
  const models::Arch* arch_ = nullptr;
  models::Hyperparameters hp_;
  Slice slice_;
  graph::Graph graph_;
  std::shared_ptr<device::WeightSet> weights_;
};

// Loads a slice; what broke off can be taken up again, from other sources too, with what has arrived already.
class SliceLoader {
 public:
  // Checks architecture and manifest and reserves the device's memory. Throws as Stage::load() says. The device must
  // outlive it.
  SliceLoader(device::Device& device, LoadRequest request);

  // Fetches and uploads the chunks that are missing; on_progress gets the weight bytes that are there. Blocks. When it
  // throws, it may be called again. Once it has returned, the loader is of no more use.
  std::shared_ptr<const LoadedSlice> run(std::span<weights::WeightSource* const> sources,
                                         const Stage::ProgressFunction& on_progress);

 private:
  const LoadRequest request_;
  std::shared_ptr<LoadedSlice> slice_;
  std::vector<weights::ChunkRef> missing_;  // chunks of request_ in its order
  uint64_t done_bytes_ = 0;
};

// One user's state at a slice: KV cache, block tables per (slot, group), and the executable, compiled once. Used by one
// thread at a time.
class SliceSession {
 public:
  // Reserves KV cache and scratch and compiles. Throws ResourceError (need and have), FormatError when the
  // configuration does not fit the model, NotSupportedError for a KV type.
  SliceSession(std::shared_ptr<const LoadedSlice> slice, const CacheConfig& cache);

  const LoadedSlice& slice() const { return *slice_; }
  const std::shared_ptr<const LoadedSlice>& shared_slice() const { return slice_; }
  const BatchLimits& limits() const { return limits_; }
  // Device memory held besides the weights.
  uint64_t kv_cache_bytes() const { return cache_ ? cache_->size_bytes() : 0; }
  uint64_t scratch_bytes() const;

  // Empties all block tables.
  void reset();

  // Applies the batch's KV operations and computes its rows. The result's fence and error are left empty.
  //   input: hidden rows (n_rows x n_embd) unless the slice embeds
  // Throws ProtocolError when the batch breaks the limits (then nothing has changed), RequestError when its rows do not
  // fit the block tables.
  StageOutput compute(const Batch& batch, std::span<const float> input);

  // The table of a slot in a group, for tests and exports.
  device::BlockTable table(Slot slot, uint32_t group) const { return tables_[group][slot]; }

 private:
  void check(const Batch& batch, std::span<const float> input) const;
  void apply(const KvOp& op);
  void fill_inputs(const Batch& batch);
  void run(const Batch& batch, std::span<const float> input, StageOutput& result);
  void rank(const Batch& batch);
  RowOutput row_output(const OutputRequest& request, size_t index) const;

  std::shared_ptr<const LoadedSlice> slice_;
  BatchLimits limits_;
  uint32_t max_positions_ = UINT32_MAX;  // of a learned position table
  uint64_t output_buffer_bytes_ = 0;
  std::shared_ptr<device::Cache> cache_;
  std::unique_ptr<device::Executable> executable_;
  std::vector<std::vector<std::vector<int32_t>>> tables_;  // [group][slot]: block ids
  // Buffers reused by every step.
  std::vector<int32_t> positions_, slots_, output_rows_;
  std::vector<std::vector<int32_t>> visible_from_, visible_to_;  // [group][row]
  std::vector<std::vector<device::BlockTable>> table_views_;     // [group][slot]
  std::vector<device::GroupInput> group_inputs_;
  std::vector<float> logits_, embedding_;
  std::vector<device::Candidate> candidates_;
  std::vector<device::Ranking> rankings_;  // per output
};

}  // namespace caravan::stage
