// What ops of the CPU device are made of. Compiling turns every node into steps; a run walks the steps inside one
// ThreadPool::run, all workers taking their part of each, with barriers where a step depends on an earlier one.
// A step's result must not depend on how many workers there are: work is cut by rows, panels or heads only.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "base/work_queue.h"
#include "device/cpu/cpu_cache.h"
#include "device/cpu/cpu_weights.h"
#include "device/cpu/kernels/kernels.h"
#include "device/device.h"
#include "graph/buffers.h"
#include "graph/graph.h"

namespace caravan::device::cpu {

using graph::Node;
using graph::ValueId;

// A value during a run: lengths and strides in bytes. Elements are f32 or i32 unless it is an embedding's raw rows.
struct View {
  std::byte* data = nullptr;
  std::array<int64_t, 4> ne{1, 1, 1, 1};
  std::array<int64_t, 4> nb{4, 4, 4, 4};

  int64_t n_rows() const { return ne[1] * ne[2] * ne[3]; }
  // The row at indices of dimensions 1 to 3.
  std::byte* at(int64_t i1, int64_t i2, int64_t i3) const { return data + i1 * nb[1] + i2 * nb[2] + i3 * nb[3]; }
  // Row number r in order of dimensions 1, 2, 3.
  std::byte* row_bytes(int64_t r) const {
    if (r < ne[1]) return data + r * nb[1];
    return at(r % ne[1], r / ne[1] % ne[2], r / (ne[1] * ne[2]));
  }
  float* row(int64_t r) const { return reinterpret_cast<float*>(row_bytes(r)); }
  const int32_t* row_i32(int64_t r) const { return reinterpret_cast<const int32_t*>(row_bytes(r)); }
};

// Consecutive rows of a batch that belong to one sequence.
struct RowRun {
  int64_t begin, end;
  int32_t slot;
};

// Memory of one run of an executable; const for the steps.
struct RunContext {
  const Kernels* kernels = nullptr;
  ThreadPool* pool = nullptr;
  int n_workers = 1;
  graph::RowCounts counts;
  const RunInput* input = nullptr;
  CpuCache* cache = nullptr;
  const CpuWeightSet* weights = nullptr;
  std::span<const RowRun> row_runs;

  std::vector<View> views;               // per value
  std::vector<int> weight_index;         // per graph weight: index in weights
  std::vector<std::byte*> work_buffers;  // per id given by Planner::add_buffer()
  std::byte* worker_scratch = nullptr;
  size_t worker_scratch_bytes = 0;

  const View& view(ValueId id) const { return views[static_cast<size_t>(id)]; }
  std::byte* work_buffer(int id) const { return work_buffers[static_cast<size_t>(id)]; }
  std::byte* scratch(int worker) const { return worker_scratch + worker_scratch_bytes * static_cast<size_t>(worker); }
};

// What a step touches, for placing barriers.
struct Touches {
  ValueId result = graph::kNoValue;
  std::vector<ValueId> operands;
  std::vector<int> buffers_written;  // work buffers
  std::vector<int> buffers_read;
  bool cache = false;
};

class Step {
 public:
  virtual ~Step() = default;
  // Once, when weights are there.
  virtual void bind(const RunContext&) {}
  // Before each run, on the calling thread.
  virtual void prepare(const RunContext&) {}
  // This worker's part. May use context.pool->barrier(), the same number of times in every worker.
  virtual void run(const RunContext& context, int worker) = 0;
};

// Collects the steps and buffers of a graph. Lifetimes are node indices.
class Planner {
 public:
  Planner(const graph::Graph& graph, const RunLimits& limits, const CacheSpec* cache, int n_workers);

  const graph::Graph& graph;
  const RunLimits& limits;
  const CacheSpec* cache;  // null: no cache
  const int n_workers;
  const graph::RowCounts max_counts;

  // Every value's view at the largest counts, with null data: for checks of contiguity.
  const std::vector<View>& max_views() const { return max_views_; }
  const View& max_view(ValueId id) const { return max_views_[static_cast<size_t>(id)]; }

  // A buffer that lives while the current node runs; extend_buffer() lets it live through the current node too.
  int add_buffer(uint64_t size_bytes);
  void extend_buffer(int id);
  // Every worker gets this many bytes at least (aligned 64), valid within one step.
  void need_scratch(size_t bytes);
  void add_step(std::unique_ptr<Step> step, Touches touches);

  // The int8 form of x for products: made once by a step, shared by all products that read x while x is unchanged.
  int quantized(ValueId x);
  // Cosines and sines for each row: made once, shared by all rope nodes with these parameters, positions and factors.
  int rope_table(const Node& rope);

  const graph::WeightSpec* weight_of(ValueId id) const {
    const graph::Value& value = graph.value(id);
    return value.kind == graph::Value::Kind::weight ? &graph.weights[static_cast<size_t>(value.index)] : nullptr;
  }
  // Throws NotSupportedError naming the node unless the condition holds.
  void require(bool condition, std::string_view what) const;

  struct PlannedStep {
    std::unique_ptr<Step> step;
    Touches touches;
    int node;
    bool barrier_before = false;
    uint64_t wanted_by = 0;  // bit per graph output that needs it; all bits for a step with a side effect
  };

  // Adds the steps of every node.
  void plan();
  std::vector<PlannedStep> steps;
  graph::ValueBuffers value_buffers;
  std::vector<graph::BufferUse> work_buffer_uses;
  size_t worker_scratch_bytes = 0;

 private:
  struct SharedBuffer {
    ValueId value;
    const Node* node;
    int buffer;
  };
  int current_ = 0;
  std::vector<View> max_views_;
  std::vector<SharedBuffer> quantized_, rope_tables_;
};

// Views of all values for given counts; data pointers of storage values must be set before: views of them follow.
//   weight views describe the f32 values or raw rows.
void resolve_views(const graph::Graph& graph, const graph::RowCounts& counts, std::vector<View>& views);

bool is_contiguous(const View& view);

// Makes the steps of a node.
using PlanFunction = void (*)(Planner& planner, const Node& node);
// nullptr: the op makes no steps (views).
PlanFunction plan_function(graph::Op op);

void plan_elementwise(Planner& planner, const Node& node);
void plan_row_op(Planner& planner, const Node& node);
void plan_copy(Planner& planner, const Node& node);
void plan_get_rows(Planner& planner, const Node& node);
void plan_set_rows(Planner& planner, const Node& node);
void plan_sort(Planner& planner, const Node& node);
void plan_rope(Planner& planner, const Node& node);
void plan_mul_mat(Planner& planner, const Node& node);
void plan_mul_mat_id(Planner& planner, const Node& node);
void plan_paged_attention(Planner& planner, const Node& node);
void plan_encoder_attention(Planner& planner, const Node& node);
void plan_moe(Planner& planner, const Node& node);

// Steps that Planner shares between nodes.
std::unique_ptr<Step> make_quantize_step(ValueId x, int buffer);
std::unique_ptr<Step> make_rope_table_step(const Node& rope, int buffer);

// activation(gate) * up on n values; out may be gate.
void gated(const Kernels& kernels, graph::Activation activation, const float* gate, const float* up, int64_t n,
           float* out);
// The first k of n indices in order of x (ties: the lower index first) in indices[0, k); indices has room for n.
void rank_indices(const float* x, int64_t n, graph::SortOrder order, int64_t k, int32_t* indices);

// The matrix of a weight value (of an expert).
inline PackedMatrix matrix_of(const RunContext& context, const graph::Graph& graph, ValueId id, int64_t expert = 0) {
  const auto weight = static_cast<size_t>(graph.value(id).index);
  return context.weights->matrix(static_cast<size_t>(context.weight_index[weight]), expert);
}

// Calls function(row, column_begin, column_end) for this worker's part of n_rows rows of n columns: whole rows when
// there are enough, else parts of every row, cut at multiples of 64.
template <typename Function>
void for_row_parts(int64_t n_rows, int64_t n, int worker, int n_workers, Function&& function) {
  if (n_rows >= n_workers) {
    const WorkRange rows = split_work(n_rows, worker, n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) function(row, int64_t{0}, n);
    return;
  }
  const WorkRange columns = split_work(n, worker, n_workers, 64);
  if (columns.begin == columns.end) return;
  for (int64_t row = 0; row < n_rows; ++row) function(row, columns.begin, columns.end);
}

// Quantises rows of x (float rows at row_of(r)) to blocks at out, row_bytes apart, shared among the workers.
template <typename RowOf>
void quantize_rows(const RunContext& context, int worker, int64_t n_rows, int64_t n, RowOf&& row_of, std::byte* out) {
  const size_t stride = activation_row_bytes(ActivationKind::q8, n);
  for_row_parts(n_rows, n, worker, context.n_workers, [&](int64_t row, int64_t begin, int64_t end) {
    auto* blocks = reinterpret_cast<ActivationBlock*>(out + stride * static_cast<size_t>(row));
    context.kernels->quantize_row(row_of(row) + begin, end - begin, blocks + begin / 32);
  });
}

// Products of rows [0, n_rows) of activations with some panels of w. Rows go in tiles whose activations stay in the
// second-level cache.
void multiply_panels(const RunContext& context, const PackedMatrix& w, WorkRange panels, const void* activations,
                     size_t activation_stride, int64_t n_rows, float* out, int64_t out_stride);

// Shares the panels of n_matrices equal matrices among the workers: calls multiply(matrix, panels) for each piece that
// this worker takes from the queue, which was reset to n_matrices * w.n_panels(), w being any of them.
template <typename Multiply>
void share_panels(WorkQueue& queue, int worker, const PackedMatrix& w, Multiply&& multiply) {
  constexpr int64_t kPieceBytes = 256 << 10, kMinPiece = 16;  // weights that stay in the second-level cache; panels
  const int64_t n = w.n_panels();
  const int64_t max_piece =
      std::max(kMinPiece, kPieceBytes / static_cast<int64_t>(packed_panel_bytes(w.dtype, w.n_in)));
  for (WorkRange piece = queue.take(worker, max_piece); piece.begin < piece.end; piece = queue.take(worker, max_piece))
    while (piece.begin < piece.end) {
      const int64_t matrix = piece.begin / n, first = matrix * n, end = std::min(piece.end, first + n);
      multiply(matrix, WorkRange{piece.begin - first, end - first});
      piece.begin = end;
    }
}

}  // namespace caravan::device::cpu
