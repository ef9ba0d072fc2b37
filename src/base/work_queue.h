// Work of uneven cost or on cores of uneven speed, shared so that all workers finish together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "base/thread_pool.h"

namespace caravan {

// The units [0, n), n < 2^31, in as many shares as there are workers. A worker takes pieces from the front of its own
// share, one after the other, then from the back of what the next few others have not begun.
class WorkQueue {
 public:
  explicit WorkQueue(int n_workers)
      : n_workers_(n_workers), shares_(std::make_unique<Share[]>(static_cast<size_t>(n_workers))) {}

  // Before the workers start, on one thread.
  void reset(int64_t n) {
    for (int worker = 0; worker < n_workers_; ++worker) {
      const WorkRange range = split_work(n, worker, n_workers_);
      shares_[static_cast<size_t>(worker)].left.store(pack(range), std::memory_order_relaxed);
    }
  }

  // The next piece for a worker, empty when nothing is left. Pieces get smaller towards a share's end, from max_piece
  // (>= 1) down to one unit.
  WorkRange take(int worker, int64_t max_piece) {
    WorkRange piece = take_from(worker, max_piece, true);
    for (int other = 1; piece.begin == piece.end && other < std::min(n_workers_, kOthers + 1); ++other)
      piece = take_from((worker + other) % n_workers_, max_piece, false);
    return piece;
  }

 private:
  static constexpr int64_t kPiecesLeft = 4;  // a piece is at most this part of what is left
  // Whose shares a worker looks at: among many cores, looking at all would cost more than it gains.
  static constexpr int kOthers = 7;

  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // begin, and end in the upper half
  };
  static uint64_t pack(WorkRange range) {
    return static_cast<uint64_t>(range.begin) | static_cast<uint64_t>(range.end) << 32;
  }
  static WorkRange unpack(uint64_t packed) {
    return {static_cast<int64_t>(packed & 0xffffffff), static_cast<int64_t>(packed >> 32)};
  }

  WorkRange take_from(int share, int64_t max_piece, bool from_front) {
    std::atomic<uint64_t>& left = shares_[static_cast<size_t>(share)].left;
    uint64_t seen = left.load(std::memory_order_relaxed);
    for (;;) {
      const WorkRange range = unpack(seen);
      if (range.begin >= range.end) return {0, 0};
      const int64_t n = std::clamp<int64_t>((range.end - range.begin) / kPiecesLeft, 1, max_piece);
      const WorkRange piece =
          from_front ? WorkRange{range.begin, range.begin + n} : WorkRange{range.end - n, range.end};
      const WorkRange rest = from_front ? WorkRange{piece.end, range.end} : WorkRange{range.begin, piece.begin};
      if (left.compare_exchange_weak(seen, pack(rest), std::memory_order_relaxed)) return piece;
    }
  }

  int n_workers_;
  std::unique_ptr<Share[]> shares_;
};

}  // namespace caravan
