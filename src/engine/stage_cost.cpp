#include "engine/stage_cost.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace caravan::engine {
namespace {

// New measurements count that much in an average.
constexpr double kShare = 0.2;
// A line needs batches whose sizes differ by this factor.
constexpr double kLeastSpread = 4;
// Sending a batch on and waking who waits for it, beside its computing.
constexpr double kHandOffSeconds = 0.0003;
constexpr uint32_t kGranule = 8;

// Time per row relative to a large batch, on CPUs: one row streams the weights from memory, many share that.
struct Efficiency {
  double rows, time_per_row;
};
constexpr std::array kTable{Efficiency{1, 2.6},   Efficiency{2, 1.9},    Efficiency{4, 1.5},
                            Efficiency{8, 1.22},  Efficiency{16, 1.12},  Efficiency{32, 1.06},
                            Efficiency{64, 1.03}, Efficiency{128, 1.01}, Efficiency{256, 1.0}};

double table_time(double rows) {
  if (rows >= kTable.back().rows) return rows;
  size_t i = 1;
  while (kTable[i].rows < rows) ++i;
  const auto [rows0, time0] = kTable[i - 1];
  const auto [rows1, time1] = kTable[i];
  // Between two lines the total grows evenly.
  const double at = (rows - rows0) / (rows1 - rows0);
  return rows0 * time0 + at * (rows1 * time1 - rows0 * time0);
}

}  // namespace

void StageCost::add(uint32_t n_rows, double seconds) {
  if (n_rows == 0 || !(seconds > 0)) return;
  Bucket& bucket = buckets_[std::min<size_t>(std::bit_width(n_rows) - 1, buckets_.size() - 1)];
  const double share = bucket.used ? kShare : 1;
  bucket.rows += share * (n_rows - bucket.rows);
  bucket.seconds += share * (seconds - bucket.seconds);
  bucket.used = true;
  fit();
}

// Least squares of the relative error, every bucket counting the same.
void StageCost::fit() {
  double w = 0, wx = 0, wy = 0, wxx = 0, wxy = 0, ratio = 0, n = 0, least = 0, most = 0;
  for (const Bucket& bucket : buckets_) {
    if (!bucket.used) continue;
    const double x = bucket.rows, y = bucket.seconds, weight = 1 / (y * y);
    w += weight;
    wx += weight * x;
    wy += weight * y;
    wxx += weight * x * x;
    wxy += weight * x * y;
    ratio += std::log(y / table_time(x));
    least = n == 0 ? x : least;
    most = x;
    n += 1;
  }
  scale_ = std::exp(ratio / n);
  fitted_ = most >= kLeastSpread * least;
  if (!fitted_) return;
  const double determinant = w * wxx - wx * wx;
  line_.per_row = (w * wxy - wx * wy) / determinant;
  line_.fixed = (wy - line_.per_row * wx) / w;
  // Noise: neither can be nothing.
  if (line_.per_row <= 0 || line_.fixed <= 0) fitted_ = false;
}

double StageCost::seconds(uint32_t n_rows) const {
  const double rows = std::max<uint32_t>(n_rows, 1);
  return fitted_ ? line_.fixed + line_.per_row * rows : scale_ * table_time(rows);
}

uint32_t StageCost::chunk(uint32_t n_tokens, uint32_t n_stages, uint32_t max_rows) const {
  if (n_stages <= 1 || n_tokens <= kGranule) return max_rows;
  const bool measured = std::any_of(buckets_.begin(), buckets_.end(), [](const Bucket& b) { return b.used; });
  uint32_t best = max_rows;
  double least = 0;
  for (uint32_t c = kGranule; c < max_rows + kGranule; c += kGranule) {
    const uint32_t rows = std::min({c, max_rows, n_tokens});
    const uint32_t n_chunks = (n_tokens + rows - 1) / rows;
    const double each = seconds(rows) + (measured ? kHandOffSeconds : 0);
    const double last = seconds(n_tokens - (n_chunks - 1) * rows) + (measured ? kHandOffSeconds : 0);
    const double total = (n_chunks - 1 + n_stages - 1) * each + last;
    if (least == 0 || total < least) {
      least = total;
      best = rows;
    }
    if (rows >= n_tokens) break;
  }
  return best;
}

}  // namespace caravan::engine
