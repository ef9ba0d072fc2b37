#include "weights/chunk_cache.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <random>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/progress.h"

namespace caravan::weights {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxQueued = 4;  // chunks: 16 MiB of memory
constexpr uint64_t kLookEvery = uint64_t{256} << 20;
constexpr auto kPause = std::chrono::seconds(60);
constexpr auto kStaleTemporary = std::chrono::hours(1);
// A part of the disk is left to others.
constexpr uint64_t kMostLeftFree = uint64_t{1} << 30;
constexpr uint64_t kLeftFreeDivisor = 20;

struct CachedFile {
  fs::path path;
  uint64_t size = 0;
  fs::file_time_type used;
};

// All chunk files; what vanishes meanwhile or cannot be read is left out.
std::vector<CachedFile> list_chunks(const fs::path& folder) {
  std::vector<CachedFile> files;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    std::error_code gone;
    if (!it->is_regular_file(gone)) continue;
    CachedFile file{it->path(), it->file_size(gone), {}};
    if (!gone) file.used = it->last_write_time(gone);
    if (!gone) files.push_back(std::move(file));
  }
  return files;
}

std::string random_name() {
  std::random_device device;
  return fmt::format("{:08x}{:08x}", device(), device());
}

// Whoever holds it makes room; nobody waits for it.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& path) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    held_ = fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) == 0;
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  ~FolderLock() {
    if (fd_ >= 0) close(fd_);
  }
  bool held() const { return held_; }

 private:
  int fd_;
  bool held_ = false;
};

// Writes all bytes to a new file; throws SystemError.
void write_new_file(const fs::path& path, std::span<const std::byte> bytes) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) throw SystemError("create '" + path.string() + "'", errno);
  int error = 0;
  while (!bytes.empty() && error == 0) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n >= 0)
      bytes = bytes.subspan(static_cast<size_t>(n));
    else if (errno != EINTR)
      error = errno;
  }
  if (close(fd) != 0 && error == 0) error = errno;
  if (error != 0) throw SystemError("write '" + path.string() + "'", error);
}

}  // namespace

ChunkCache::ChunkCache(fs::path folder, uint64_t limit_bytes) : folder_(std::move(folder)), limit_bytes_(limit_bytes) {
  for (const fs::path& path : {folder_ / "chunks", folder_ / "tmp"}) {
    std::error_code error;
    fs::create_directories(path, error);
    if (error) throw SystemError("create the cache folder '" + path.string() + "'", error.value());
  }
  if (access((folder_ / "tmp").c_str(), W_OK | X_OK) != 0)
    throw SystemError("write to the cache folder '" + folder_.string() + "'", errno);
  remove_stale_temporaries();
  status_.limit_bytes = limit_bytes_;
  for (const CachedFile& file : list_chunks(folder_ / "chunks")) status_.held_bytes += file.size;
  thread_ = std::jthread([this](std::stop_token stop) { work(stop); });
}

ChunkCache::~ChunkCache() {
  flush();
  thread_.request_stop();
}

fs::path ChunkCache::path_of(const Digest& digest) const {
  const std::string name = digest.hex();
  return folder_ / "chunks" / name.substr(0, 2) / name;
}

bool ChunkCache::contains(const Digest& digest) const { return access(path_of(digest).c_str(), R_OK) == 0; }

bool ChunkCache::use(const Digest& digest) {
  const fs::path path = path_of(digest);
  // A folder that others own may refuse the new time.
  return utimensat(AT_FDCWD, path.c_str(), nullptr, 0) == 0 || access(path.c_str(), R_OK) == 0;
}

bool ChunkCache::read(const Digest& digest, std::span<std::byte> out) {
  const fs::path path = path_of(digest);
  try {
    const InputFile file(path);
    if (file.size() != out.size()) {
      spdlog::warn("cache: '{}' has {} bytes, expected {}", path.string(), file.size(), out.size());
      discard(digest);
      return false;
    }
    file.read_at(0, out);
  } catch (const Error& error) {
    spdlog::debug("cache: {}", error.what());  // evicted by another process since it was looked for
    return false;
  }
  note_read(digest, out.size());
  return true;
}

std::optional<std::vector<std::byte>> ChunkCache::read(const Digest& digest) {
  const fs::path path = path_of(digest);
  std::vector<std::byte> bytes;
  try {
    const InputFile file(path);
    if (file.size() > kChunkBytes) {
      spdlog::warn("cache: '{}' has {} bytes, a chunk has at most {}", path.string(), file.size(), kChunkBytes);
      discard(digest);
      return std::nullopt;
    }
    bytes.resize(static_cast<size_t>(file.size()));
    file.read_at(0, bytes);
  } catch (const Error& error) {
    spdlog::debug("cache: {}", error.what());  // not there
    return std::nullopt;
  }
  note_read(digest, bytes.size());
  return bytes;
}

void ChunkCache::note_read(const Digest& digest, uint64_t bytes) {
  use(digest);
  const std::lock_guard lock(mutex_);
  status_.read_bytes += bytes;
}

void ChunkCache::discard(const Digest& digest) {
  const fs::path path = path_of(digest);
  spdlog::warn("cache: '{}' does not hold what its name says; it is deleted", path.string());
  std::error_code ignored;
  fs::remove(path, ignored);
  const std::lock_guard lock(mutex_);
  ++status_.n_corrupt;
}

void ChunkCache::write(const Digest& digest, std::span<const std::byte> bytes, Clock::time_point keep_since) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return jobs_.size() < kMaxQueued; });
  jobs_.push_back({digest, {bytes.begin(), bytes.end()}, keep_since});
  changed_.notify_all();
}

void ChunkCache::flush() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return jobs_.empty(); });
}

ChunkCacheStatus ChunkCache::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

void ChunkCache::work(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !jobs_.empty(); })) {
    const Job& job = jobs_.front();  // stays while others are added
    lock.unlock();
    store(job);
    lock.lock();
    jobs_.pop_front();
    changed_.notify_all();
  }
}

void ChunkCache::pause_writing(const std::string& why) {
  spdlog::warn("cache: {}; nothing is written to it for {} s", why, kPause.count());
  writing_paused_until_ = std::chrono::steady_clock::now() + kPause;
}

void ChunkCache::store(const Job& job) {
  bool kept = false;
  const auto has_disk = [this](uint64_t bytes) {
    const std::string shortage = disk_shortage(bytes);
    if (!shortage.empty()) pause_writing(shortage);
    return shortage.empty();
  };
  if (contains(job.digest)) {
    kept = true;  // another process was faster
  } else if (std::chrono::steady_clock::now() >= writing_paused_until_ && make_room(job.bytes.size(), job.keep_since) &&
             has_disk(job.bytes.size())) {
    const fs::path temporary = folder_ / "tmp" / random_name();
    std::error_code ignored;
    try {
      write_new_file(temporary, job.bytes);
      const fs::path path = path_of(job.digest);
      fs::create_directory(path.parent_path(), ignored);
      if (rename(temporary.c_str(), path.c_str()) != 0) throw SystemError("rename to '" + path.string() + "'", errno);
      kept = true;
      written_since_look_ += job.bytes.size();
      const std::lock_guard lock(mutex_);
      status_.written_bytes += job.bytes.size();
      status_.held_bytes += job.bytes.size();
    } catch (const SystemError& error) {
      fs::remove(temporary, ignored);
      pause_writing(error.what());
    }
  }
  const std::lock_guard lock(mutex_);
  if (!kept) ++status_.n_not_kept;
}

// True when the chunk fits under the limit, perhaps after the longest unused chunks are gone.
bool ChunkCache::make_room(uint64_t bytes, Clock::time_point keep_since) {
  {
    const std::lock_guard lock(mutex_);
    if (status_.held_bytes + bytes <= limit_bytes_ && written_since_look_ < kLookEvery) return true;
  }
  if (keep_since == full_for_) return false;
  std::vector<CachedFile> files = list_chunks(folder_ / "chunks");
  written_since_look_ = 0;
  uint64_t held = 0;
  for (const CachedFile& file : files) held += file.size;
  uint64_t evicted = 0;
  if (held + bytes > limit_bytes_) {
    const FolderLock folder_lock(folder_ / "lock");
    // A little more than needed, so that not every chunk looks at the whole folder.
    const uint64_t target = limit_bytes_ - limit_bytes_ / 20;
    std::ranges::sort(files, {}, &CachedFile::used);
    for (const CachedFile& file : files) {
      if (!folder_lock.held() || held + bytes <= target || file.used >= keep_since) break;
      std::error_code error;
      if (!fs::remove(file.path, error) && error) continue;
      held -= file.size;
      evicted += file.size;
    }
    if (evicted > 0) spdlog::info("cache: {} of the longest unused chunks made room", format_bytes(evicted));
  }
  const bool fits = held + bytes <= limit_bytes_;
  if (!fits) {
    spdlog::warn("cache: the limit of {} does not hold all of this slice; a part of it is kept",
                 format_bytes(limit_bytes_));
    full_for_ = keep_since;
  }
  const std::lock_guard lock(mutex_);
  status_.held_bytes = held;
  status_.evicted_bytes += evicted;
  return fits;
}

std::string ChunkCache::disk_shortage(uint64_t bytes) const {
  struct statvfs disk{};
  if (statvfs(folder_.c_str(), &disk) != 0) return "";  // writing will tell
  const uint64_t total = uint64_t{disk.f_blocks} * disk.f_frsize, free = uint64_t{disk.f_bavail} * disk.f_frsize;
  const uint64_t left_free = std::min(kMostLeftFree, total / kLeftFreeDivisor);
  if (free >= bytes + left_free) return "";
  return fmt::format("the disk of '{}' is full: {} free of {}, {} of it are left to others", folder_.string(),
                     format_bytes(free), format_bytes(total), format_bytes(left_free));
}

std::string ChunkCache::problem() const { return disk_shortage(kChunkBytes); }

void ChunkCache::remove_stale_temporaries() const {
  const auto before = Clock::now() - kStaleTemporary;
  for (const CachedFile& file : list_chunks(folder_ / "tmp")) {
    std::error_code ignored;
    if (file.used < before) fs::remove(file.path, ignored);
  }
}

}  // namespace caravan::weights
