// The codebooks of the IQ types: lists of points of 8 or 4 values, which blocks refer to by index. The points are part
// of the formats; docs/gguf.md says how they are numbered.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace caravan::tensor {

using Point8 = std::array<int8_t, 8>;
using Point4 = std::array<int8_t, 4>;

extern const std::array<Point8, 2048> kIq1Codebook;    // of -1, 0, 1: IQ1_S, IQ1_M
extern const std::array<Point8, 256> kIq2XxsCodebook;  // of 8, 25, 43, as the next two
extern const std::array<Point8, 512> kIq2XsCodebook;
extern const std::array<Point8, 1024> kIq2SCodebook;
extern const std::array<Point4, 256> kIq3XxsCodebook;  // of 4, 12, 20, 28, 36, 44, 52, 62
extern const std::array<Point4, 512> kIq3SCodebook;    // of the odd numbers 1 to 15

}  // namespace caravan::tensor
