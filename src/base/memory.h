// Anonymous memory with an alignment, for weights, KV cache and scratch.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace caravan {

// A zeroed anonymous mapping of size bytes (page-aligned, transparent huge pages asked for when large).
// Throws ResourceError when the system refuses. Move-only.
class AnonymousMemory {
 public:
  AnonymousMemory() = default;
  explicit AnonymousMemory(size_t size_bytes);
  AnonymousMemory(AnonymousMemory&& other) noexcept;
  AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;
  ~AnonymousMemory();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Bytes of physical memory of this machine, and those available for new anonymous memory right now
// (the smaller of /proc/meminfo's MemAvailable and what the control group still allows).
size_t total_memory_bytes();
size_t available_memory_bytes();

// Resident set of this process now, and its peak since start, in bytes.
size_t resident_memory_bytes();
size_t peak_resident_memory_bytes();

}  // namespace caravan
