// What a slice of a model consists of: per tensor its type, shape and the hashes of its raw bytes, in chunks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/progress.h"
#include "base/sha256.h"
#include "gguf/reader.h"
#include "tensor/dtype.h"

namespace caravan::weights {

// Tensors are hashed and travel in chunks of this many bytes; the last chunk of a tensor may be shorter.
inline constexpr uint64_t kChunkBytes = uint64_t{4} << 20;

struct TensorEntry {
  std::string name;
  tensor::DType type = tensor::DType::f32;
  tensor::Shape ne{1, 1, 1, 1};
  uint64_t size_bytes = 0;
  // SHA-256 of each chunk of raw GGUF bytes; empty when the model is only used where its file is.
  std::vector<Digest> chunks;
};

struct Manifest {
  std::vector<TensorEntry> tensors;
  uint64_t size_bytes() const;
  const TensorEntry* find(std::string_view name) const;
};

// Number of chunks of a tensor of size_bytes.
inline uint64_t n_chunks(uint64_t size_bytes) { return (size_bytes + kChunkBytes - 1) / kChunkBytes; }

enum class Hashing { none, sha256 };

// Entries for the named tensors of model, in that order. With sha256 their bytes are read and hashed (progress may be
// null), on as many threads as are given.
Manifest make_manifest(const gguf::Model& model, const std::vector<std::string>& names, Hashing hashing,
                       Progress* progress, int n_threads);

// Checks a manifest from outside: types known, sizes equal to type x shape, chunk counts right, names unique.
// Throws FormatError.
void validate(const Manifest& manifest);

}  // namespace caravan::weights
