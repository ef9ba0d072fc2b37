#include "base/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/error.h"

namespace caravan {
namespace {

struct OpenFile {
  int fd;
  uint64_t size;
};

OpenFile open_to_read(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw SystemError("open '" + path + "'", errno);
  struct stat info{};
  if (fstat(fd, &info) != 0 || S_ISDIR(info.st_mode)) {
    const int error = S_ISDIR(info.st_mode) ? EISDIR : errno;
    close(fd);
    throw SystemError("read '" + path + "'", error);
  }
  return {fd, static_cast<uint64_t>(info.st_size)};
}

}  // namespace

InputFile::InputFile(const std::filesystem::path& path) : path_(path.string()) {
  const OpenFile opened = open_to_read(path_);
  fd_ = opened.fd;
  size_ = opened.size;
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}

InputFile::~InputFile() {
  if (fd_ >= 0) close(fd_);
}

void InputFile::read_at(uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t n = pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw SystemError("read '" + path_ + "'", errno);
    if (n == 0)
      throw FormatError(fmt::format("{}: ends at byte {}, {} more bytes were expected", path_, offset, out.size()));
    offset += static_cast<uint64_t>(n);
    out = out.subspan(static_cast<size_t>(n));
  }
}

MappedFile::MappedFile(const std::filesystem::path& path, uint64_t max_bytes) {
  const OpenFile opened = open_to_read(path.string());
  const uint64_t size = std::min(opened.size, max_bytes);
  if (!std::in_range<size_t>(size)) {  // on machines with 32-bit addresses
    close(opened.fd);
    throw SystemError("map '" + path.string() + "'", EFBIG);
  }
  size_ = static_cast<size_t>(size);
  if (size_ > 0) {
    void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, opened.fd, 0);
    const int error = errno;
    close(opened.fd);
    if (p == MAP_FAILED) throw SystemError("map '" + path.string() + "'", error);
    data_ = static_cast<const std::byte*>(p);
  } else {
    close(opened.fd);
  }
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

std::vector<std::byte> read_file(const std::filesystem::path& path) {
  const InputFile file(path);
  std::vector<std::byte> bytes(static_cast<size_t>(file.size()));
  file.read_at(0, bytes);
  return bytes;
}

std::string read_text_file(const std::filesystem::path& path) {
  const auto bytes = read_file(path);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

OutputFile::OutputFile(const std::filesystem::path& path)
    : path_(path.string()), temporary_(path_ + fmt::format(".{}.tmp", getpid())) {
  fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) throw SystemError("create '" + temporary_ + "'", errno);
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_.c_str());
}

void OutputFile::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw SystemError("write '" + temporary_ + "'", errno);
    offset += static_cast<uint64_t>(n);
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void OutputFile::commit() {
  const int fd = std::exchange(fd_, -1);
  if (close(fd) == 0 && rename(temporary_.c_str(), path_.c_str()) == 0) return;
  const int error = errno;
  unlink(temporary_.c_str());
  throw SystemError("write '" + path_ + "'", error);
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  OutputFile file(path);
  file.write_at(0, bytes);
  file.commit();
}

}  // namespace caravan
