#include "engine/pooling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace caravan::engine {

std::vector<std::vector<float>> pool(std::span<const float> rows, uint32_t n_embd, Pooling pooling) {
  if (rows.empty() || n_embd == 0 || rows.size() % n_embd != 0) {
    throw RequestError(
        fmt::format("pooling: expected one or more rows of {} values, found {} values", n_embd, rows.size()));
  }
  const size_t n_rows = rows.size() / n_embd;
  const auto row = [&](size_t i) {
    const auto values = rows.subspan(i * n_embd, n_embd);
    return std::vector<float>(values.begin(), values.end());
  };
  switch (pooling) {
    case Pooling::cls:
      return {row(0)};
    case Pooling::last:
      return {row(n_rows - 1)};
    case Pooling::none: {
      std::vector<std::vector<float>> all;
      for (size_t i = 0; i < n_rows; ++i) all.push_back(row(i));
      return all;
    }
    case Pooling::mean: {
      std::vector<double> sum(n_embd, 0.0);
      for (size_t i = 0; i < rows.size(); ++i) sum[i % n_embd] += rows[i];
      std::vector<float> mean(n_embd);
      for (size_t i = 0; i < n_embd; ++i) mean[i] = static_cast<float>(sum[i] / static_cast<double>(n_rows));
      return {std::move(mean)};
    }
  }
  CARAVAN_ASSERT(false, "the enum has no other value");
}

void normalise(std::span<float> vector, int32_t normalisation) {
  if (normalisation < -1) {
    throw RequestError(fmt::format("Field 'embd_normalize': Value must be >= -1, found {}", normalisation));
  }
  if (normalisation == -1) return;
  double max = 0;
  for (const float value : vector) max = std::max(max, std::abs(static_cast<double>(value)));
  if (max == 0) return;
  double length = 0;
  if (normalisation == 0) {
    length = max / 32760.0;
  } else {
    for (const float value : vector) length += std::pow(std::abs(value) / max, normalisation);  // <= 1: no overflow
    length = max * std::pow(length, 1.0 / normalisation);
  }
  for (float& value : vector) value = static_cast<float>(value / length);
}

}  // namespace caravan::engine
