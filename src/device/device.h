// The contract of something that computes: holds weights and KV caches, compiles the graph of a slice once, and runs it
// for batches of any size up to what it was compiled for. Implementations: cpu/ (and, on their own targets, cuda/).
//
// Life of a slice:  weights = device.create_weights(graph.weights); weights->upload(...); weights->finish();
//                   cache = device.create_cache(spec); exe = device.compile(graph, weights, cache, limits);
//                   exe->run(input) per batch.
// Threads: create_*, compile and run may be called from any thread; runs of one device are serialised by the device.
// Everything a device made must be destroyed before the device. A set of weights is used by one uploading thread at a
// time until finish(), and is const afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/candidate.h"
#include "graph/graph.h"
#include "tensor/dtype.h"

namespace caravan::device {

struct DeviceInfo {
  std::string name;           // "CPU", "CUDA0"
  std::string kind;           // "cpu", "cuda"
  std::string description;    // "AMD EPYC 7B13, avx2"
  uint64_t memory_total = 0;  // bytes this device may use: the cap, or what the machine has
  uint64_t memory_free = 0;   // of these, not yet allocated
  std::string numeric_class;  // devices with the same string compute the same bits
  int n_threads = 0;
};

// K and V of one layer, per token: n_head_kv heads of head_dim_k and head_dim_v values.
struct CacheLayer {
  int n_head_kv = 0, head_dim_k = 0, head_dim_v = 0;
};

// Layers that keep the same tokens: one block table per sequence serves all of them.
struct CacheGroup {
  std::string name;  // "full", "window"
  std::vector<CacheLayer> layers;
  int64_t n_blocks = 0;
};

struct CacheSpec {
  std::vector<CacheGroup> groups;
  int block_tokens = 32;                       // tokens per block, the same in every group: 16, 32, 64, ...
  tensor::DType dtype_k = tensor::DType::f16;  // f32, f16 or q8_0 (then head dims are multiples of 32)
  tensor::DType dtype_v = tensor::DType::f16;
};

// The blocks of one sequence in one group: entry i holds tokens [i * block_tokens, (i + 1) * block_tokens).
// kNoBlock: freed or never used (before the window); no row may see it.
using BlockTable = std::span<const int32_t>;
inline constexpr int32_t kNoBlock = -1;

// Paged K and V of all groups. Blocks are owned by whoever hands them out; a cache only stores.
class Cache {
 public:
  virtual ~Cache() = default;
  virtual const CacheSpec& spec() const = 0;
  // Bytes held, as cache_bytes() foretold.
  virtual uint64_t size_bytes() const = 0;
  // Bytes of one block of a group: K and V of all its layers.
  virtual uint64_t block_bytes(int group) const = 0;
  // Copies a whole block (copy on write of a forked sequence).
  virtual void copy_block(int group, int32_t from, int32_t to) = 0;
  // Raw contents of a block (block_bytes long) in this device's layout: only for a cache of an equal spec and numeric
  // class.
  virtual void read_block(int group, int32_t block, std::span<std::byte> out) const = 0;
  virtual void write_block(int group, int32_t block, std::span<const std::byte> in) = 0;
};

// Weights on a device. Shared by executables of several sessions, hence shared_ptr.
class WeightSet {
 public:
  virtual ~WeightSet() = default;
  virtual std::span<const graph::WeightSpec> specs() const = 0;
  // Bytes held, the sum of weight_bytes().
  virtual uint64_t size_bytes() const = 0;
  // Takes raw GGUF bytes of weight index at byte offset of the tensor. Per weight the bytes come in order and without
  // gaps; a span may end inside a row. Weights may be interleaved. Throws FormatError when bytes are out of order or
  // past the end.
  virtual void upload(size_t index, uint64_t offset, std::span<const std::byte> bytes) = 0;
  // Ends uploading. Throws FormatError naming a tensor that is not complete.
  virtual void finish() = 0;
};

// What an executable must be able to take in one run.
struct RunLimits {
  int64_t max_rows = 0;
  int64_t max_output_rows = 0;
  int64_t max_context = 0;  // only for lowered graphs: gathered cells, all sequences together
};

// Visibility and blocks of one cache group in a run.
struct GroupInput {
  // Per row: tokens [from, to) of the row's sequence that it sees, its own included for causal attention. For encoder
  // attention: rows [from, to) of the batch.
  std::span<const int32_t> visible_from, visible_to;  // [n_rows]
  std::span<const BlockTable> tables;                 // per slot; must cover every visible token and every row's token;
  // empty for encoder attention
};

// One batch, as plain data that outlives the call. Spans that the graph has no input for may be empty.
struct RunInput {
  int64_t n_rows = 0;
  std::span<const int32_t> tokens;       // [n_rows]
  std::span<const float> hidden;         // [n_rows][n_embd]
  std::span<const int32_t> positions;    // [n_rows], for rotary and learned position embeddings
  std::span<const int32_t> slots;        // [n_rows]: the sequence of a row, an index into GroupInput::tables
  std::span<const int32_t> token_index;  // [n_rows]: index of the row's token in its sequence, where K and V go
  std::span<const GroupInput> groups;    // as CacheSpec::groups
  std::span<const int32_t> output_rows;  // ascending row numbers
  // Per graph output: where it goes, exactly as long as the output is for these row counts, contiguous in GGUF order;
  // empty: not wanted, and what only it needs is not computed.
  std::span<const std::span<float>> outputs;
};

// A row of logits reduced to what sampling needs.
struct Ranking {
  std::span<const float> logits;  // none: the row is passed over
  std::span<Candidate> best;  // gets the largest, at most as many as there are logits: descending, ties by lowest id
  float log_sum_exp = 0;      // gets log(sum(exp(logits)))
};

// A graph made ready for a device. Row counts are run-time parameters: nothing is compiled or allocated in run().
class Executable {
 public:
  virtual ~Executable() = default;
  virtual const graph::Graph& graph() const = 0;
  virtual const RunLimits& limits() const = 0;
  // Computes one batch and returns when the outputs are written. Throws RequestError when the input breaks the
  // contract: more rows than compiled for, token ids, rows, slots or blocks out of range, spans of the wrong length.
  // Nothing has been written to the cache then.
  virtual void run(const RunInput& input) = 0;
  // Bytes of activations and work space held, as Device::scratch_bytes() foretold.
  virtual uint64_t scratch_bytes() const = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual DeviceInfo info() const = 0;
  // Whether the device runs op with weights of this type (for ops without weights the type is ignored).
  virtual bool supports(graph::Op op, tensor::DType weight_dtype) const = 0;

  // What things will take, known before anything is loaded.
  virtual uint64_t weight_bytes(const graph::WeightSpec& spec) const = 0;
  virtual uint64_t cache_bytes(const CacheSpec& spec) const = 0;
  // Bytes per block of a group of that spec, without creating it.
  virtual uint64_t cache_block_bytes(const CacheSpec& spec, int group) const = 0;
  virtual uint64_t scratch_bytes(const graph::Graph& graph, const CacheSpec& cache, const RunLimits& limits) const = 0;

  // Allocate; each throws ResourceError with need and have when the device's memory does not suffice, and
  // NotSupportedError for types that it cannot hold.
  virtual std::shared_ptr<WeightSet> create_weights(std::vector<graph::WeightSpec> specs) = 0;
  virtual std::shared_ptr<Cache> create_cache(const CacheSpec& spec) = 0;
  // Makes a graph runnable with these weights (every weight of the graph, found by name and role, finished) and cache
  // (null for a graph without one). Throws FormatError when a weight is missing or differs, or the cache's geometry
  // does not fit the graph.
  virtual std::unique_ptr<Executable> compile(const graph::Graph& graph, std::shared_ptr<const WeightSet> weights,
                                              std::shared_ptr<Cache> cache, const RunLimits& limits) = 0;
  // Fills in rankings, on all threads that are free. NaN counts as the smallest logit.
  virtual void rank(std::span<Ranking> rows) = 0;
  // Graphs compiled since the start.
  virtual uint64_t n_compiled() const = 0;
};

}  // namespace caravan::device
