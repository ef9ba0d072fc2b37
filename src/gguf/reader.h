// GGUF reader: header, metadata and tensor directory of one model, which may be split over several files. Tensor data
// stays in the files and is read by ranges. Versions 2 and 3, little-endian. Layout: docs/gguf.md.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "gguf/metadata.h"
#include "tensor/dtype.h"

namespace caravan::gguf {

// One tensor of the directory.
struct TensorInfo {
  std::string name;
  tensor::DType type = tensor::DType::f32;
  tensor::Shape ne{1, 1, 1, 1};
  int n_dims = 1;
  int file = 0;             // index into Model::files()
  uint64_t offset = 0;      // absolute, in that file
  uint64_t size_bytes = 0;  // without padding
};

// What one file's header holds; offsets are absolute and checked against file_size.
struct Directory {
  uint32_t version = 3;
  Metadata metadata;
  std::vector<TensorInfo> tensors;
};

// Parses a file's header from its leading bytes. Checks every count, length, type, offset and product.
//   header: the file from byte 0, at least up to the end of the tensor infos (usually a mapping of all of it)
// Throws FormatError naming the source, the key or tensor, what was expected and found.
Directory parse_directory(std::span<const std::byte> header, uint64_t file_size, const std::string& source);

// An opened model: one file or all parts of a split one (give the first part).
class Model {
 public:
  // Throws SystemError (cannot be read) or FormatError (is not a valid GGUF).
  static Model open(const std::filesystem::path& path);

  const std::string& path() const { return path_; }
  const Metadata& metadata() const { return metadata_; }
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find(std::string_view name) const;
  // Throws FormatError when the model has no such tensor.
  const TensorInfo& get(std::string_view name) const;
  // Sum of all tensors' bytes.
  uint64_t weight_bytes() const;
  int n_files() const { return static_cast<int>(files_.size()); }
  const std::vector<InputFile>& files() const { return files_; }

  // Fills out with the tensor's raw bytes from offset on. Thread-safe.
  void read(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const;
  // A whole tensor's raw bytes, and its values as f32.
  std::vector<std::byte> read(const TensorInfo& tensor) const;
  std::vector<float> read_f32(const TensorInfo& tensor) const;

 private:
  std::string path_;
  std::vector<InputFile> files_;
  Metadata metadata_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

}  // namespace caravan::gguf
