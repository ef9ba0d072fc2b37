// Paged attention and attention without a cache.
#include <algorithm>
#include <atomic>

#include "device/cpu/ops/step.h"

namespace caravan::device::cpu {
namespace {

using graph::AttentionParams;
using graph::CacheRef;

// Rows per task. Results do not depend on it: every row is computed by itself.
constexpr int64_t kTileRows = 16;

// A pointer to the row-th [head_dim, heads] of q, k or v.
const float* heads_of(const View& x, int64_t row) { return reinterpret_cast<const float*>(x.data + row * x.nb[2]); }

class PagedAttentionStep final : public Step {
 public:
  explicit PagedAttentionStep(const Node& node) : node_(node), params_(std::get<AttentionParams>(node.params)) {}

  void prepare(const RunContext& context) override {
    next_task_.store(0, std::memory_order_relaxed);
    n_tiles_ = 0;
    for (const RowRun& run : context.row_runs) n_tiles_ += (run.end - run.begin + kTileRows - 1) / kTileRows;
    // Few rows and few key heads (one, with latent attention) are not enough tasks: the query heads are divided too.
    const int64_t n_head_kv = context.view(node_.inputs[1]).ne[1],
                  heads = context.view(node_.inputs[0]).ne[1] / n_head_kv;
    const int64_t n_tasks = std::max<int64_t>(1, n_tiles_ * n_head_kv);
    n_parts_ = std::min(heads, (context.n_workers + n_tasks - 1) / n_tasks);
  }

  void run(const RunContext& context, int worker) override {
    store(context, worker);
    context.pool->barrier();
    // Costs differ with the visible range, so workers take tasks as they get free; long prompts last rows first.
    const int64_t n_head_kv = context.view(node_.inputs[1]).ne[1];
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      const int64_t tile = task / (n_head_kv * n_parts_);
      if (tile >= n_tiles_) return;
      attend(context, worker, n_tiles_ - 1 - tile, task / n_parts_ % n_head_kv, task % n_parts_);
    }
  }

 private:
  const GroupInput& group(const RunContext& context) const {
    return context.input->groups[static_cast<size_t>(params_.group)];
  }

  void store(const RunContext& context, int worker) const {
    const View &k = context.view(node_.inputs[1]), &v = context.view(node_.inputs[2]);
    const CpuCache::Part& keys = context.cache->part({params_.group, params_.layer, CacheRef::Part::k});
    const CpuCache::Part& values = context.cache->part({params_.group, params_.layer, CacheRef::Part::v});
    const WorkRange rows = split_work(context.counts.rows, worker, context.n_workers);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const auto r = static_cast<size_t>(row);
      const int32_t* blocks = group(context).tables[static_cast<size_t>(context.input->slots[r])].data();
      const int64_t position = context.input->token_index[r];
      context.kernels->kv_store(keys.layout, keys.data, blocks, position, heads_of(k, row));
      context.kernels->kv_store(values.layout, values.data, blocks, position, heads_of(v, row));
    }
  }

  // Rows of a tile, for a part of the query heads that read a key head.
  void attend(const RunContext& context, int worker, int64_t tile, int64_t kv_head, int64_t part) const {
    const RowRun* run = context.row_runs.data();
    for (;; ++run) {
      const int64_t n = (run->end - run->begin + kTileRows - 1) / kTileRows;
      if (tile < n) break;
      tile -= n;
    }
    const View &q = context.view(node_.inputs[0]), &out = context.view(node_.output);
    const CpuCache::Part& keys = context.cache->part({params_.group, params_.layer, CacheRef::Part::k});
    const CpuCache::Part& values = context.cache->part({params_.group, params_.layer, CacheRef::Part::v});
    // The kernel takes the heads of a key head to lie at kv_head times their number: the part's begin where they do.
    const int64_t n_head_kv = context.view(node_.inputs[1]).ne[1], heads = q.ne[1] / n_head_kv;
    const int64_t first = part * heads / n_parts_, n_heads = (part + 1) * heads / n_parts_ - first;
    const int64_t shift = kv_head * (heads - n_heads) + first;
    AttentionArgs args{};
    args.q = heads_of(q, run->begin) + shift * q.ne[0];
    args.q_stride = q.nb[2] / 4;
    args.out = out.row(run->begin) + shift * values.layout.head_dim;
    args.out_stride = out.nb[1] / 4;
    args.n_head = n_heads * n_head_kv;
    args.keys = keys.layout;
    args.values = values.layout;
    args.key_cache = keys.data;
    args.value_cache = values.data;
    args.blocks = group(context).tables[static_cast<size_t>(run->slot)].data();
    args.visible_from = group(context).visible_from.data() + run->begin;
    args.visible_to = group(context).visible_to.data() + run->begin;
    args.scale = params_.scale;
    args.softcap = params_.softcap;
    args.sinks = node_.inputs.size() > 3 ? context.view(node_.inputs[3]).row(0) + shift : nullptr;
    const int64_t begin = tile * kTileRows, end = std::min(begin + kTileRows, run->end - run->begin);
    context.kernels->attention(args, begin, end, kv_head, context.scratch(worker));
  }

  const Node& node_;
  const AttentionParams& params_;
  std::atomic<int64_t> next_task_{0};
  int64_t n_tiles_ = 0, n_parts_ = 1;
};

// A text is the rows that one visible range covers; its rows are consecutive and see all of it or a part of it.
class EncoderAttentionStep final : public Step {
 public:
  EncoderAttentionStep(const Node& node, int64_t max_rows)
      : node_(node),
        params_(std::get<AttentionParams>(node.params)),
        zeros_(static_cast<size_t>(max_rows)),
        lengths_(static_cast<size_t>(max_rows)) {
    texts_.reserve(static_cast<size_t>(max_rows));
  }

  // Rows with one visible range are computed together; positions count from its first row.
  void prepare(const RunContext& context) override {
    next_task_.store(0, std::memory_order_relaxed);
    texts_.clear();
    const GroupInput& group = context.input->groups[static_cast<size_t>(params_.group)];
    for (int64_t row = 0; row < context.counts.rows; ++row) {
      const auto r = static_cast<size_t>(row);
      const int32_t from = group.visible_from[r], to = group.visible_to[r];
      lengths_[r] = to - from;
      if (texts_.empty() || texts_.back().from != from || texts_.back().to != to)
        texts_.push_back({row, row + 1, from, to});
      texts_.back().end = row + 1;
    }
  }

  void run(const RunContext& context, int worker) override {
    const int64_t n_head_kv = context.view(node_.inputs[1]).ne[1];
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (task >= static_cast<int64_t>(texts_.size()) * n_head_kv) return;
      attend(context, worker, texts_[static_cast<size_t>(task / n_head_kv)], task % n_head_kv);
    }
  }

 private:
  struct Text {
    int64_t begin, end;  // rows that attend
    int32_t from, to;    // rows attended to
  };

  void attend(const RunContext& context, int worker, const Text& text, int64_t kv_head) const {
    const View &q = context.view(node_.inputs[0]), &k = context.view(node_.inputs[1]),
               &v = context.view(node_.inputs[2]);
    const View& out = context.view(node_.output);
    DenseAttentionArgs args{};
    args.q = heads_of(q, text.begin);
    args.q_stride = q.nb[2] / 4;
    args.k = heads_of(k, text.from);
    args.k_stride = k.nb[2] / 4;
    args.v = heads_of(v, text.from);
    args.v_stride = v.nb[2] / 4;
    args.out = out.row(text.begin);
    args.out_stride = out.nb[1] / 4;
    args.n_head = q.ne[1];
    args.n_head_kv = k.ne[1];
    args.head_dim_k = k.ne[0];
    args.head_dim_v = v.ne[0];
    args.n_kv = text.to - text.from;
    args.visible_from = zeros_.data();
    args.visible_to = lengths_.data() + text.begin;
    args.scale = params_.scale;
    args.softcap = params_.softcap;
    context.kernels->attention_dense(args, 0, text.end - text.begin, kv_head, context.scratch(worker));
  }

  const Node& node_;
  const AttentionParams& params_;
  std::vector<int32_t> zeros_, lengths_;
  std::vector<Text> texts_;
  std::atomic<int64_t> next_task_{0};
};

void require_heads_contiguous(const Planner& planner, const Node& node) {
  for (size_t i = 0; i < 3; ++i) {
    const View& x = planner.max_view(node.inputs[i]);
    planner.require(x.nb[0] == 4 && x.nb[1] == x.ne[0] * 4, "heads of an operand are not contiguous; use cont");
  }
}

}  // namespace

void plan_paged_attention(Planner& planner, const Node& node) {
  require_heads_contiguous(planner, node);
  planner.need_scratch(
      attention_scratch_bytes(planner.max_view(node.inputs[1]).ne[0], planner.max_view(node.inputs[2]).ne[0]));
  planner.add_step(std::make_unique<PagedAttentionStep>(node), {node.output, node.inputs, {}, {}, true});
}

void plan_encoder_attention(Planner& planner, const Node& node) {
  require_heads_contiguous(planner, node);
  planner.need_scratch(attention_dense_scratch_bytes(planner.max_counts.rows, planner.max_view(node.inputs[1]).ne[0],
                                                     planner.max_view(node.inputs[2]).ne[0]));
  planner.add_step(std::make_unique<EncoderAttentionStep>(node, planner.max_counts.rows),
                   {node.output, node.inputs, {}, {}, false});
}

}  // namespace caravan::device::cpu
