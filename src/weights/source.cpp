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

void read_chunk(const ChunkRef& chunk, std::span<WeightSource* const> sources, std::span<std::byte> out) {
  CARAVAN_ASSERT(chunk.index < n_chunks(chunk.tensor->size_bytes), "callers enumerate the chunks of the manifest");
  CARAVAN_ASSERT(out.size() == chunk.size_bytes(), "callers provide room for exactly the chunk");
  const std::string what = fmt::format("chunk {} of tensor '{}'", chunk.index, chunk.tensor->name);
  std::string failures;
  for (size_t i = 0; i < sources.size(); ++i) {
    std::string failure;
    try {
      if (!sources[i]->fetch(chunk, out)) {
        failure = "does not have it";
      } else {
        if (chunk.digest() == nullptr) return;
        const Digest found = sha256(out);
        if (found == *chunk.digest()) return;
        failure = fmt::format("expected SHA-256 {}, found {}", chunk.digest()->hex(), found.hex());
        spdlog::warn("{}: weight source {} of {}: {}", what, i + 1, sources.size(), failure);
      }
    } catch (const Error& error) {
      failure = error.what();
      spdlog::warn("{}: weight source {} of {}: {}", what, i + 1, sources.size(), failure);
    }
    failures += fmt::format("; source {}: {}", i + 1, failure);
  }
  throw ResourceError(fmt::format("{}: no weight source delivers it ({} tried){}", what, sources.size(), failures));
}

}  // namespace caravan::weights
