// The largest single allocation that this thread asked for, counted by the test program's own operator new.
#pragma once

#include <cstddef>

namespace caravan::gguf::testing {

// Set it to 0, do the work, read it. Stays 0 under sanitizers, which bring their own operator new (and abort for huge
// requests themselves).
size_t& largest_allocation_bytes();

}  // namespace caravan::gguf::testing
