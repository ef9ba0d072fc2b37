// Where a slice's raw weight bytes come from: the model's file, files and caches on this machine, the network
// (remote/).
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string_view>

#include "base/error.h"
#include "weights/manifest.h"

namespace caravan::weights {

// One chunk of one tensor of a manifest. References stay valid while the manifest does.
struct ChunkRef {
  const TensorEntry* tensor;
  uint64_t index;                                          // chunk number within the tensor
  uint64_t offset() const { return index * kChunkBytes; }  // first byte within the tensor
  uint64_t size_bytes() const {
    return tensor->size_bytes - offset() < kChunkBytes ? tensor->size_bytes - offset() : kChunkBytes;
  }
  // The chunk's hash, or nullptr when the manifest has none.
  const Digest* digest() const { return tensor->chunks.empty() ? nullptr : &tensor->chunks[index]; }
};

// No source delivers a chunk with the right hash.
class SourceError : public Error {
 public:
  using Error::Error;
};

// A place to get chunks from. Used by loader threads only, which it may block. What it delivers is trusted only after
// its hash was checked, by pull() and read_chunk().
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // For logs and metrics: "server", "cache".
  virtual std::string_view name() const { return "source"; }
  // Once, before everything else: the chunks that no source before this one may have. A source that has to ask somebody
  // what it has asks now; it may block.
  virtual void look_for(std::span<const ChunkRef>) {}
  // False: asking for this chunk is of no use. Cheap, and no promise.
  virtual bool may_have(const ChunkRef&) { return true; }
  // Threads that may call fetch() at the same time.
  virtual int n_fetchers() const { return 1; }
  // Whether a later source may fetch what this one is slow with, though this one has it.
  virtual bool may_be_helped() const { return false; }
  // Says which chunks will be fetched next, in that order, so that a remote source can keep several requests in flight.
  virtual void announce(std::span<const ChunkRef>) {}
  // Fills out (size_bytes() of the chunk). False: this source does not have it. Throws on failure of the source.
  virtual bool fetch(const ChunkRef& chunk, std::span<std::byte> out) = 0;
  // What fetch() delivered for this chunk did not have its hash.
  virtual void rejected(const ChunkRef&) {}
  // The verified bytes of a chunk that this source did not have and a later one delivered. From any thread.
  virtual void offer(const ChunkRef&, std::span<const std::byte>) {}

  // Bytes that this source delivered and that had the right hash.
  uint64_t delivered_bytes() const { return delivered_bytes_.load(); }
  void count_delivered(uint64_t bytes) { delivered_bytes_.fetch_add(bytes); }

 private:
  std::atomic<uint64_t> delivered_bytes_{0};
};

// Reads from an opened GGUF model, by tensor name.
class ModelSource : public WeightSource {
 public:
  // model must outlive the source.
  explicit ModelSource(const gguf::Model& model) : model_(model) {}
  std::string_view name() const override { return "model"; }
  bool fetch(const ChunkRef& chunk, std::span<std::byte> out) override;

 private:
  const gguf::Model& model_;
};

// Asks one source for a chunk and verifies its hash (when the manifest has one). Empty: out holds it. Else why not; a
// mismatch is logged and the source told. Throws what fetch() throws.
std::string try_source(const ChunkRef& chunk, WeightSource& source, std::span<std::byte> out);

// Fetches a chunk from the first source that has it and verifies its hash (when the manifest has one); a mismatch is
// logged and the next source is tried. Throws ResourceError when no source delivers the right bytes.
void read_chunk(const ChunkRef& chunk, std::span<WeightSource* const> sources, std::span<std::byte> out);

}  // namespace caravan::weights
