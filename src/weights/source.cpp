// Chunks from an opened model, and fetching with verification from a list of sources.
#include "weights/source.h"

#include <fmt/format.h>

#include "base/error.h"
#include "base/log.h"

namespace caravan::weights {

bool ModelSource::fetch(const ChunkRef& chunk, std::span<std::byte> out) {
  const gguf::TensorInfo* tensor = model_.find(chunk.tensor->name);
  // A tensor of the same name in another model may have another size.
  if (tensor == nullptr || tensor->size_bytes != chunk.tensor->size_bytes) return false;
  model_.read(*tensor, chunk.offset(), out);
  return true;
}

std::string try_source(const ChunkRef& chunk, WeightSource& source, std::span<std::byte> out) {
  CARAVAN_ASSERT(chunk.index < n_chunks(chunk.tensor->size_bytes), "callers enumerate the chunks of the manifest");
  CARAVAN_ASSERT(out.size() == chunk.size_bytes(), "callers provide room for exactly the chunk");
  if (!source.fetch(chunk, out)) return "does not have it";
  if (chunk.digest() != nullptr) {
    const Digest found = sha256(out);
    if (found != *chunk.digest()) {
      std::string failure = fmt::format("expected SHA-256 {}, found {}", chunk.digest()->hex(), found.hex());
      spdlog::warn("chunk {} of tensor '{}' from {}: {}", chunk.index, chunk.tensor->name, source.name(), failure);
      source.rejected(chunk);
      return failure;
    }
  }
  source.count_delivered(out.size());
  return {};
}

void read_chunk(const ChunkRef& chunk, std::span<WeightSource* const> sources, std::span<std::byte> out) {
  const std::string what = fmt::format("chunk {} of tensor '{}'", chunk.index, chunk.tensor->name);
  std::string failures;
  for (size_t i = 0; i < sources.size(); ++i) {
    std::string failure;
    try {
      failure = try_source(chunk, *sources[i], out);
      if (failure.empty()) return;
    } catch (const Error& error) {
      failure = error.what();
      spdlog::warn("{}: weight source {} of {}: {}", what, i + 1, sources.size(), failure);
    }
    failures += fmt::format("; source {}: {}", i + 1, failure);
  }
  throw ResourceError(fmt::format("{}: no weight source delivers it ({} tried){}", what, sources.size(), failures));
}

}  // namespace caravan::weights
