// Building manifests from a model (hashing on several threads) and checking those that come from outside.
#include "weights/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <set>
#include <thread>

#include "base/error.h"

namespace caravan::weights {
namespace {

// Hashes every chunk of every tensor of manifest; threads take the next chunk from a shared counter.
class ChunkHasher {
 public:
  ChunkHasher(const gguf::Model& model, Manifest& manifest, Progress* progress) : model_(model), progress_(progress) {
    for (TensorEntry& entry : manifest.tensors) {
      entry.chunks.resize(static_cast<size_t>(n_chunks(entry.size_bytes)));
      for (size_t i = 0; i < entry.chunks.size(); ++i) jobs_.push_back({&entry, &model.get(entry.name), i});
    }
  }

  // Throws what the first failing read threw.
  void run(int n_threads) {
    const size_t n =
        std::clamp<size_t>(static_cast<size_t>(std::max(n_threads, 1)), 1, std::max<size_t>(jobs_.size(), 1));
    {
      std::vector<std::jthread> threads;
      for (size_t i = 1; i < n; ++i) threads.emplace_back([this] { work(); });
      work();
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Job {
    TensorEntry* entry;
    const gguf::TensorInfo* tensor;
    size_t chunk;
  };

  void work() {
    try {
      std::vector<std::byte> buffer;
      for (size_t i; (i = next_.fetch_add(1)) < jobs_.size();) {
        const Job& job = jobs_[i];
        const uint64_t offset = job.chunk * kChunkBytes;
        buffer.resize(static_cast<size_t>(std::min(kChunkBytes, job.entry->size_bytes - offset)));
        model_.read(*job.tensor, offset, buffer);
        job.entry->chunks[job.chunk] = sha256(buffer);
        if (progress_ != nullptr) progress_->add(buffer.size());
      }
    } catch (...) {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_ = jobs_.size();  // the others stop after their current chunk
    }
  }

  const gguf::Model& model_;
  Progress* progress_;
  std::vector<Job> jobs_;
  std::atomic<size_t> next_{0};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

}  // namespace

uint64_t Manifest::size_bytes() const {
  uint64_t total = 0;
  for (const TensorEntry& entry : tensors) total += entry.size_bytes;
  return total;
}

const TensorEntry* Manifest::find(std::string_view name) const {
  const auto it = std::find_if(tensors.begin(), tensors.end(), [&](const TensorEntry& e) { return e.name == name; });
  return it == tensors.end() ? nullptr : &*it;
}

Manifest make_manifest(const gguf::Model& model, const std::vector<std::string>& names, Hashing hashing,
                       Progress* progress, int n_threads) {
  Manifest manifest;
  for (const std::string& name : names) {
    const gguf::TensorInfo& tensor = model.get(name);
    manifest.tensors.push_back({tensor.name, tensor.type, tensor.ne, tensor.size_bytes, {}});
  }
  if (hashing == Hashing::sha256) ChunkHasher(model, manifest, progress).run(n_threads);
  return manifest;
}

void validate(const Manifest& manifest) {
  std::set<std::string_view> names;
  uint64_t total = 0;
  for (const TensorEntry& entry : manifest.tensors) {
    const std::string where = fmt::format("manifest: tensor '{}'", entry.name);
    if (entry.name.empty()) throw FormatError("manifest: a tensor has no name");
    if (!names.insert(entry.name).second) throw FormatError(where + " occurs twice");
    const tensor::DTypeInfo* type = tensor::find_dtype(static_cast<uint32_t>(entry.type));
    if (type == nullptr)
      throw FormatError(fmt::format("{}: type {} is not known", where, static_cast<uint32_t>(entry.type)));
    const uint64_t size = tensor::checked_size_bytes(*type, entry.ne, where);
    if (size != entry.size_bytes)
      throw FormatError(
          fmt::format("{}: expected {} bytes for its type and shape, found {}", where, size, entry.size_bytes));
    if (!entry.chunks.empty() && entry.chunks.size() != n_chunks(size))
      throw FormatError(
          fmt::format("{}: expected {} chunk hashes or none, found {}", where, n_chunks(size), entry.chunks.size()));
    total = checked_add(total, size, "manifest: total size");
  }
}

}  // namespace caravan::weights
