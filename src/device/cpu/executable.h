// A graph compiled for the CPU: a list of steps over one scratch arena, walked inside one fork-join per batch.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device/cpu/memory_account.h"
#include "device/cpu/ops/step.h"
#include "device/device.h"

namespace caravan::device::cpu {

// What the executables of a device share. One run at a time uses the pool.
struct CpuEngine {
  explicit CpuEngine(int n_threads, const Kernels& kernel_table) : pool(n_threads), kernels(kernel_table) {}
  ThreadPool pool;
  const Kernels& kernels;
  std::mutex run_mutex;
};

// Steps with their buffers placed and barriers set; needs no weights.
class CpuPlan {
 public:
  // graph and cache must outlive the plan. Throws NotSupportedError for a graph the CPU cannot run, FormatError when
  // the cache's geometry does not fit.
  CpuPlan(const graph::Graph& graph, const RunLimits& limits, const CacheSpec* cache, int n_workers);

  // Bytes of the arena, the workers' scratch, and the inputs that are derived from a run's.
  uint64_t arena_bytes() const { return value_plan_bytes_; }
  uint64_t worker_scratch_bytes() const { return planner_.worker_scratch_bytes; }
  uint64_t scratch_bytes() const;

  Planner& planner() { return planner_; }
  const graph::BufferPlan& buffers() const { return buffers_; }
  // Per value buffer: the graph output whose span it is (it has no bytes in the arena then), or -1.
  const std::vector<int>& output_of_buffer() const { return output_of_buffer_; }

 private:
  void check_cache(const graph::Graph& graph, const CacheSpec* cache) const;
  void mark_wanted();
  void find_output_buffers();
  void place_barriers();

  Planner planner_;
  std::vector<uint64_t> wanted_;  // per value: bit per graph output that needs it
  std::vector<int> output_of_buffer_;
  graph::BufferPlan buffers_;  // values' buffers, then work buffers
  uint64_t value_plan_bytes_ = 0;
};

class CpuExecutable final : public Executable {
 public:
  CpuExecutable(const graph::Graph& graph, std::shared_ptr<const CpuWeightSet> weights, std::shared_ptr<CpuCache> cache,
                const RunLimits& limits, CpuEngine& engine, std::shared_ptr<MemoryAccount> account);

  const graph::Graph& graph() const override { return graph_; }
  const RunLimits& limits() const override { return limits_; }
  void run(const RunInput& input) override;
  uint64_t scratch_bytes() const override { return plan_.scratch_bytes(); }

 private:
  // A bound on the elements of an input that is used as row indices.
  struct IndexLimit {
    graph::InputKind kind;
    graph::ValueId table;
  };
  // A cache group that the graph uses, and how.
  struct GroupUse {
    int group;
    bool cached;
  };

  void bind_weights();
  void find_uses();
  void check_input(const RunInput& input) const;
  void check_indices(const RunInput& input) const;
  void check_group(const RunInput& input, const GroupUse& use) const;
  void check_outputs(const RunInput& input) const;
  void find_row_runs(const RunInput& input);
  void set_inputs(const RunInput& input);
  void derive_cells(const RunInput& input, int group, int32_t* row_cells);
  // Fills the gathered cells and the mask of a group; returns the number of cells.
  int64_t derive_context(const RunInput& input, int group);
  void fill_context_mask(const RunInput& input, int group, int64_t context, float* mask) const;
  void copy_outputs(const RunInput& input, int worker) const;

  // What a lowered graph reads of one group, derived from a run's ranges and tables.
  struct DerivedInputs {
    std::vector<int32_t> row_cells, context_cells, context_slots, context_tokens;
    std::vector<float> mask;
  };

  const graph::Graph graph_;
  const RunLimits limits_;
  const std::shared_ptr<const CpuWeightSet> weights_;
  const std::shared_ptr<CpuCache> cache_;
  CpuEngine& engine_;
  CpuPlan plan_;
  AccountedMemory memory_;
  RunContext context_;
  std::vector<RowRun> row_runs_;
  std::vector<IndexLimit> index_limits_;
  std::vector<GroupUse> group_uses_;
  std::vector<DerivedInputs> derived_;             // per group
  std::vector<std::pair<size_t, int>> in_output_;  // values that are computed in the span of an output
};

}  // namespace caravan::device::cpu
