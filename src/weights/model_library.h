// A folder of GGUF files as a source of chunks, matched by content: whatever file holds the wanted bytes serves them,
// whatever its name.
#pragma once

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "weights/hash_memory.h"
#include "weights/source.h"

namespace caravan::weights {

struct ModelLibraryStatus {
  uint32_t n_models = 0;
  uint64_t total_bytes = 0;   // of all tensors
  uint64_t hashed_bytes = 0;  // of those whose hashes are known
};

// Thread-safe. A thread of its own hashes what no record remembers, at idle priority, and rests while a slice is being
// loaded. Nobody waits for it: a wanted chunk is looked up by its hash, and while that is unknown by the name, type and
// shape of its tensor, which is then read and hashed.
class ModelLibrary {
 public:
  // Looks for *.gguf in folder and the folders below. Files that are no valid GGUF are logged and left out. Throws
  // SystemError when the folder cannot be read.
  ModelLibrary(std::filesystem::path folder, HashMemory memory);
  ~ModelLibrary();

  // Takes notice of files that came, changed or went. Cheap when nothing did.
  void refresh();

  // Whether a file holds the chunk, or may hold it.
  bool may_have(const ChunkRef& chunk) const;
  // Whether the chunk of this hash is known to be in a file.
  bool contains(const Digest& digest) const;
  // Fills out with the chunk; false when no file holds it. The bytes come from where their hash was seen, unverified.
  bool read(const ChunkRef& chunk, std::span<std::byte> out);
  // The same for a hash alone: only where it is known already. nullopt: not known; else the chunk.
  std::optional<std::vector<std::byte>> read(const Digest& digest);
  // The bytes read for this chunk were wrong: its file has changed under us.
  void discard(const Digest& digest);

  // While one of these exists, background hashing rests.
  class Rest {
   public:
    explicit Rest(ModelLibrary& library) : library_(library) { ++library_.n_resting_; }
    Rest(const Rest&) = delete;
    Rest& operator=(const Rest&) = delete;
    ~Rest() {
      const std::lock_guard lock(library_.mutex_);
      --library_.n_resting_;
      library_.changed_.notify_all();
    }

   private:
    ModelLibrary& library_;
  };

  ModelLibraryStatus status() const;
  // Waits until every hash is known.
  void wait_until_hashed();

 private:
  struct Book {
    explicit Book(gguf::Model opened, const HashMemory& memory) : model(std::move(opened)), hashes(model, memory) {}
    gguf::Model model;
    ModelHashes hashes;
    std::vector<FileIdentity> files;
    // Per tensor that is not hashed as a whole: the chunks that are known.
    std::map<const gguf::TensorInfo*, std::map<uint64_t, Digest>> partial;  // under mutex_
  };
  struct Place {
    std::shared_ptr<Book> book;
    const gguf::TensorInfo* tensor = nullptr;
    uint64_t chunk = 0;
    uint64_t size_bytes() const { return std::min(kChunkBytes, tensor->size_bytes - chunk * kChunkBytes); }
  };
  using Shape = std::tuple<std::string, tensor::DType, tensor::Shape>;

  void add(const std::filesystem::path& path);
  void drop(const std::shared_ptr<Book>& book);
  void note(const Place& place, const Digest& digest);
  void index_hashes(const std::shared_ptr<Book>& book, const gguf::TensorInfo& tensor,
                    const std::vector<Digest>& hashes);
  std::vector<Place> candidates(const ChunkRef& chunk) const;
  bool read_place(const Place& place, std::span<std::byte> out) const;
  void work(std::stop_token stop);
  std::optional<Place> next_unknown();

  const std::filesystem::path folder_;
  const HashMemory memory_;
  std::atomic<int> n_resting_{0};

  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::map<std::string, std::shared_ptr<Book>> books_;  // under mutex_; by path
  std::map<std::string, FileIdentity> bad_;             // under mutex_; files that are no GGUF
  std::unordered_map<Digest, Place> by_digest_;         // under mutex_
  std::map<Shape, std::vector<Place>> by_shape_;        // under mutex_; chunk unused
  uint64_t hashed_bytes_ = 0, total_bytes_ = 0;         // under mutex_
  bool idle_ = false;                                   // under mutex_; nothing is left to hash

  std::jthread thread_;
};

// The library as a source of one load.
class LibrarySource : public WeightSource {
 public:
  // library outlives the source.
  explicit LibrarySource(ModelLibrary& library) : library_(library), rest_(library) { library.refresh(); }
  std::string_view name() const override { return "models-dir"; }
  bool may_have(const ChunkRef& chunk) override { return library_.may_have(chunk); }
  int n_fetchers() const override { return 2; }
  bool fetch(const ChunkRef& chunk, std::span<std::byte> out) override { return library_.read(chunk, out); }
  void rejected(const ChunkRef& chunk) override { library_.discard(*chunk.digest()); }

 private:
  ModelLibrary& library_;
  const ModelLibrary::Rest rest_;
};

}  // namespace caravan::weights
