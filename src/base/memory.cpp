#include "base/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "base/error.h"

namespace caravan {

AnonymousMemory::AnonymousMemory(size_t size_bytes) : size_(size_bytes) {
  if (size_bytes == 0) return;
  void* p = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw ResourceError(fmt::format("cannot map {} bytes of memory", size_bytes));
  constexpr size_t kHugePageWorthwhile = size_t{4} << 20;
  if (size_bytes >= kHugePageWorthwhile) madvise(p, size_bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(p);
}

AnonymousMemory::AnonymousMemory(AnonymousMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AnonymousMemory& AnonymousMemory::operator=(AnonymousMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

AnonymousMemory::~AnonymousMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

namespace {

// The value in bytes of a "Key:  N kB" line of a /proc file, or 0.
size_t proc_kilobytes(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (line.compare(0, key.size(), key) == 0 && line.size() > key.size() && line[key.size()] == ':')
      return static_cast<size_t>(std::strtoull(line.c_str() + key.size() + 1, nullptr, 10)) * 1024;
  return 0;
}

// A number from a control-group file; "max" or a missing file give the largest value.
uint64_t cgroup_value(const char* file) {
  std::ifstream in(file);
  uint64_t value;
  return in >> value ? value : std::numeric_limits<uint64_t>::max();
}

}  // namespace

size_t total_memory_bytes() {
  const uint64_t physical = proc_kilobytes("/proc/meminfo", "MemTotal");
  return static_cast<size_t>(std::min(physical, cgroup_value("/sys/fs/cgroup/memory.max")));
}

size_t available_memory_bytes() {
  uint64_t available = proc_kilobytes("/proc/meminfo", "MemAvailable");
  const uint64_t limit = cgroup_value("/sys/fs/cgroup/memory.max");
  if (limit != std::numeric_limits<uint64_t>::max()) {
    const uint64_t used = cgroup_value("/sys/fs/cgroup/memory.current");
    available = std::min(available, used < limit ? limit - used : 0);
  }
  return static_cast<size_t>(available);
}

size_t resident_memory_bytes() { return proc_kilobytes("/proc/self/status", "VmRSS"); }
size_t peak_resident_memory_bytes() { return proc_kilobytes("/proc/self/status", "VmHWM"); }

}  // namespace caravan
