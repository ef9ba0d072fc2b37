// How long a stage takes for a batch of so many rows, learned from the times it took, and into which chunks a prompt is
// cut so that it flows through several stages soonest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace caravan::engine {

// Owned by one thread.
class StageCost {
 public:
  // A batch of n_rows took the slowest stage so long.
  void add(uint32_t n_rows, double seconds);
  // Expected time of a batch. Without measurements of batches both small and large the shape of a table is scaled to
  // what there is; without any the unit is arbitrary. From 1 row on.
  double seconds(uint32_t n_rows) const;
  // Rows per batch for a prompt of n_tokens over n_stages of the same speed: minimises (k + n_stages - 1) x seconds(c)
  // over k chunks of c = n_tokens / k rows. A multiple of 8, at most max_rows.
  uint32_t chunk(uint32_t n_tokens, uint32_t n_stages, uint32_t max_rows) const;

 private:
  // Batches of [2^i, 2^(i+1)) rows: moving averages.
  struct Bucket {
    double rows = 0, seconds = 0;
    bool used = false;
  };
  struct Line {
    double fixed = 0, per_row = 0;
  };
  void fit();

  std::array<Bucket, 17> buckets_{};
  bool fitted_ = false;  // line_ follows from the measurements
  Line line_;
  double scale_ = 1;  // of the table, when not fitted
};

}  // namespace caravan::engine
