// Replaces operator new for the whole test program; in a file of its own so that it is not inlined into its users.
#include "gguf/largest_allocation.h"

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CARAVAN_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CARAVAN_SANITIZED 1
#endif
#endif

namespace caravan::gguf::testing {

size_t& largest_allocation_bytes() {
  thread_local size_t bytes = 0;
  return bytes;
}

}  // namespace caravan::gguf::testing

#ifndef CARAVAN_SANITIZED
void* operator new(size_t size) {
  size_t& largest = caravan::gguf::testing::largest_allocation_bytes();
  if (size > largest) largest = size;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
#endif
