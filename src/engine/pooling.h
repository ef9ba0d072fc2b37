// From hidden rows to embedding vectors: pooling over the rows of a text, and normalisation. Host code, a few rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/request.h"

namespace caravan::engine {

// Pools rows [n_rows, n_embd], row by row, in row order: mean is summed in double; cls is the first row, last the last.
// Pooling::none returns every row. Throws RequestError(invalid) when there are no rows.
std::vector<std::vector<float>> pool(std::span<const float> rows, uint32_t n_embd, Pooling pooling);

// Scales vector in place. normalisation (llama-embedding's --embd-normalize): -1 none; 0 so that the largest absolute
// value is 32760; 1 by the sum of absolute values; 2 by the Euclidean length; p > 2 by the p-norm. A vector of zeros
// stays. Throws RequestError(invalid) for a value below -1.
void normalise(std::span<float> vector, int32_t normalisation);

}  // namespace caravan::engine
