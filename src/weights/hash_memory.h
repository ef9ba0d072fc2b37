// Chunk hashes of GGUF files, computed once and remembered by path, size and time of change in a folder of records.
//
// A record, one file per GGUF file, named by the SHA-256 of its path:
//   magic u32 'CRVH', version u32, path_bytes u32, path, size u64, mtime_ns i64, n_tensors u32, then per tensor
//   name_bytes u32, name, offset u64 (in the file), size_bytes u64, SHA-256[ceil(size_bytes / 4 MiB)];
//   at the end the SHA-256 of all before
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/progress.h"
#include "gguf/reader.h"
#include "weights/manifest.h"

namespace caravan::weights {

// Which file, and as of when.
struct FileIdentity {
  std::string path;  // absolute, links resolved where that is possible
  uint64_t size_bytes = 0;
  int64_t mtime_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

// The file as it is now. Throws SystemError when it cannot be looked at.
FileIdentity identify(const std::filesystem::path& path);

// Known hashes of the tensors of one file.
struct FileHashes {
  struct Tensor {
    uint64_t offset = 0, size_bytes = 0;
    std::vector<Digest> chunks;
    bool operator==(const Tensor&) const = default;
  };
  FileIdentity file;
  std::map<std::string, Tensor, std::less<>> tensors;
  bool operator==(const FileHashes&) const = default;
};

std::vector<std::byte> encode_hashes(const FileHashes& hashes);
// Throws FormatError naming source for anything but a whole record.
FileHashes decode_hashes(std::span<const std::byte> record, const std::string& source);

// The folder of records; processes may share it. Failing to read or write it means to hash again, nothing worse.
class HashMemory {
 public:
  // Without a folder nothing is remembered.
  explicit HashMemory(std::filesystem::path folder = {}) : folder_(std::move(folder)) {}

  // What is remembered of the file as it is now; just its identity when that is nothing. Throws SystemError when the
  // file cannot be looked at.
  FileHashes recall(const std::filesystem::path& file) const;
  // Replaces the record, unless the file has changed since hashes.file was taken.
  void remember(const FileHashes& hashes) const;
  // Removes the record.
  void forget(const std::string& path) const;

 private:
  std::filesystem::path record_path(const std::string& path) const;
  const std::filesystem::path folder_;
};

// The chunk hashes of one model's tensors: remembered ones, and others as they are computed. Thread-safe.
class ModelHashes {
 public:
  // model outlives it. Recalls what memory knows.
  ModelHashes(const gguf::Model& model, HashMemory memory);

  bool knows(const gguf::TensorInfo& tensor) const;
  // Copies of a tensor's chunk hashes, when all are known.
  std::optional<std::vector<Digest>> find(const gguf::TensorInfo& tensor) const;
  // Bytes of the named tensors that compute() would read. Throws FormatError when the model lacks one.
  uint64_t unknown_bytes(std::span<const std::string> names) const;
  // Hashes what is not known of the named tensors, on as many threads as given, and remembers it. progress may be null.
  // Throws what reading throws.
  void compute(std::span<const std::string> names, Progress* progress, int n_threads);
  // Takes hashes that were computed elsewhere; save() makes them last.
  void learn(const gguf::TensorInfo& tensor, std::vector<Digest> chunks);
  void save() const;
  // Whether anything came from the memory.
  bool recalled() const { return recalled_; }
  // Drops everything, here and in the memory: a hash turned out to be wrong.
  void forget();

  // Entries for the named tensors, with hashes; all must be known.
  Manifest manifest(std::span<const std::string> names) const;

 private:
  const FileHashes::Tensor* lookup(const gguf::TensorInfo& tensor) const;

  const gguf::Model& model_;
  const HashMemory memory_;
  bool recalled_ = false;
  mutable std::mutex mutex_;
  std::vector<FileHashes> files_;  // under mutex_; parallel to the model's files
};

}  // namespace caravan::weights
