// The value that fixes the scale of a block.
#pragma once

#include <cmath>

namespace caravan::tensor {

// The first of n values with the largest magnitude; 0 where all are zero or NaN.
inline float extreme_of(const float* values, int n) {
  // The magnitude is kept beside the value: clang 19 at -O3 miscompiles this loop when it is std::fabs(extreme).
  float extreme = 0, largest = 0;
  for (int i = 0; i < n; ++i) {
    const float magnitude = std::fabs(values[i]);
    if (magnitude > largest) {
      largest = magnitude;
      extreme = values[i];
    }
  }
  return extreme;
}

}  // namespace caravan::tensor
