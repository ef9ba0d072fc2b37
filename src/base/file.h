// Files: reading ranges by pread, mappings for parsing headers, and writing through a temporary name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace caravan {

// An open file that ranges are read from. Thread-safe (pread). Throws SystemError when it cannot be opened or read.
class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path);
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&&) = delete;
  ~InputFile();

  uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Fills out with the bytes at offset; throws FormatError when the file ends before.
  void read_at(uint64_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

// A read-only private mapping of a whole file, or of its first max_bytes. Throws SystemError.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path, uint64_t max_bytes = ~uint64_t{0});
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The whole file in memory. Throws SystemError.
std::vector<std::byte> read_file(const std::filesystem::path& path);
std::string read_text_file(const std::filesystem::path& path);

// A file being written under a temporary name in the folder of path; commit() gives it its name, and without commit()
// it is removed, so that no reader sees half a file. Throws SystemError.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  // The final name.
  const std::string& path() const { return path_; }
  // Writes all bytes at offset; gaps read as zeros. Thread-safe (pwrite).
  void write_at(uint64_t offset, std::span<const std::byte> bytes);
  // Closes and renames; nothing can be written afterwards.
  void commit();

 private:
  std::string path_, temporary_;
  int fd_ = -1;
};

// Writes bytes to path through a temporary file in the same folder and a rename, so that no reader sees half a file.
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);

}  // namespace caravan
