// Counts the bytes a device holds against its cap, and allocations that give their bytes back when destroyed.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/memory.h"

namespace caravan::device::cpu {

// Thread-safe. Outlived by what it accounts for only through the shared pointer in AccountedMemory.
class MemoryAccount {
 public:
  // cap_bytes 0: no cap but the machine's memory.
  explicit MemoryAccount(uint64_t cap_bytes) : cap_(cap_bytes) {}

  // Takes bytes. Throws ResourceError with what, need and have when they do not fit.
  void take(uint64_t bytes, std::string_view what);
  void give_back(uint64_t bytes);
  uint64_t total() const;
  uint64_t available() const;

 private:
  const uint64_t cap_;
  mutable std::mutex mutex_;
  uint64_t used_ = 0;
};

// Zeroed memory counted by an account.
class AccountedMemory {
 public:
  AccountedMemory() = default;
  AccountedMemory(std::shared_ptr<MemoryAccount> account, uint64_t size_bytes, std::string_view what);
  ~AccountedMemory();
  AccountedMemory(const AccountedMemory&) = delete;
  AccountedMemory& operator=(const AccountedMemory&) = delete;

  std::byte* data() const { return memory_.data(); }
  uint64_t size() const { return memory_.size(); }

 private:
  std::shared_ptr<MemoryAccount> account_;
  AnonymousMemory memory_;
};

}  // namespace caravan::device::cpu
