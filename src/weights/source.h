// Where a slice's raw weight bytes come from: the model's file here; over the network (remote/); later caches and
// peers.
#pragma once

#include <memory>
#include <span>

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

// A place to get chunks from. Blocking; used by loader threads only.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // Says which chunks will be fetched next, in that order, so that a remote source can keep several requests in flight.
  virtual void announce(std::span<const ChunkRef> chunks) = 0;
  // Fills out (size_bytes() of the chunk). False: this source does not have it. Throws on failure of the source.
  // The bytes are not yet trusted: read_chunk() below verifies them.
  virtual bool fetch(const ChunkRef& chunk, std::span<std::byte> out) = 0;
};

// Reads from an opened GGUF model, by tensor name.
class ModelSource : public WeightSource {
 public:
  // model must outlive the source.
  explicit ModelSource(const gguf::Model& model) : model_(model) {}
  void announce(std::span<const ChunkRef>) override {}
  bool fetch(const ChunkRef& chunk, std::span<std::byte> out) override;

 private:
  const gguf::Model& model_;
};

// Fetches a chunk from the first source that has it and verifies its hash (when the manifest has one); a mismatch is
// logged and the next source is tried. Throws ResourceError when no source delivers the right bytes.
void read_chunk(const ChunkRef& chunk, std::span<WeightSource* const> sources, std::span<std::byte> out);

}  // namespace caravan::weights
