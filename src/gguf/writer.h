// GGUF writer: version 3, little-endian. Tensors are declared first and their data streamed into place, so that a file
// of any size needs no memory. Layout: docs/gguf.md.
#pragma once

#include <filesystem>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "gguf/metadata.h"
#include "gguf/reader.h"
#include "tensor/dtype.h"

namespace caravan::gguf {

// Writes one GGUF file. The order is: declare() every tensor, begin_data() once, write() every byte of every tensor in
// any order and from any threads, finish(). The file appears under its name only with finish().
//   Writer writer("model.gguf", metadata);
//   const size_t norm = writer.declare("output_norm.weight", DType::f32, {{64}});
//   writer.begin_data();
//   writer.write(norm, 0, bytes);
//   writer.finish();
// A part of a split model is a file whose metadata has the split.* keys and whose path is split_path() (format.h).
class Writer {
 public:
  // metadata is written in its order; general.alignment (a power of two) is followed when present, else it is 32.
  Writer(const std::filesystem::path& path, Metadata metadata);

  // Adds a tensor; ne holds 1 to 4 dimensions, the contiguous one first. Returns its number, for write().
  // Throws FormatError for what the reader would refuse: name, shape, row length.
  size_t declare(const std::string& name, tensor::DType type, std::span<const int64_t> ne);

  // Writes header, metadata and tensor infos. No more tensors can be declared.
  void begin_data();

  // Writes bytes of a tensor at an offset within it. Thread-safe; each byte of each tensor is to be written once.
  void write(size_t tensor, uint64_t offset, std::span<const std::byte> bytes);

  // Checks that every tensor is complete (FormatError otherwise) and gives the file its name.
  void finish();

  // The declared tensors; offsets are absolute and valid after begin_data().
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  // Sum of all tensors' bytes.
  uint64_t weight_bytes() const;

 private:
  OutputFile file_;
  Metadata metadata_;
  uint64_t alignment_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
  bool data_begun_ = false;
  std::mutex mutex_;                     // guards written_bytes_
  std::vector<uint64_t> written_bytes_;  // per tensor
};

// The bytes of a file's header: magic, version, counts, metadata and tensor infos, padded to the alignment, where the
// data begins. tensors' offsets are relative to the data here, as in the file.
std::vector<std::byte> encode_header(const Metadata& metadata, std::span<const TensorInfo> tensors, uint64_t alignment);

}  // namespace caravan::gguf
