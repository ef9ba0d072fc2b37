#include "device/cpu/memory_account.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace caravan::device::cpu {

void MemoryAccount::take(uint64_t bytes, std::string_view what) {
  const std::lock_guard lock(mutex_);
  const uint64_t have = cap_ == 0 ? available_memory_bytes() : cap_ - std::min(cap_, used_);
  if (bytes > have) throw ResourceError(fmt::format("{}: need {} bytes of memory, have {}", what, bytes, have));
  used_ += bytes;
}

void MemoryAccount::give_back(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  used_ -= bytes;
}

uint64_t MemoryAccount::total() const { return cap_ == 0 ? total_memory_bytes() : cap_; }

uint64_t MemoryAccount::available() const {
  const std::lock_guard lock(mutex_);
  return cap_ == 0 ? available_memory_bytes() : cap_ - std::min(cap_, used_);
}

AccountedMemory::AccountedMemory(std::shared_ptr<MemoryAccount> account, uint64_t size_bytes, std::string_view what) {
  account->take(size_bytes, what);
  try {
    memory_ = AnonymousMemory(static_cast<size_t>(size_bytes));
  } catch (...) {
    account->give_back(size_bytes);
    throw;
  }
  account_ = std::move(account);
}

AccountedMemory::~AccountedMemory() {
  if (account_ != nullptr) account_->give_back(memory_.size());
}

}  // namespace caravan::device::cpu
