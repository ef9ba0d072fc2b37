#include "stage/loaded_slice.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <set>

#include "base/error.h"
#include "base/progress.h"
#include "models/registry.h"
#include "weights/pull.h"

namespace caravan::stage {
namespace {

using models::Arch;
using models::Hyperparameters;

// Logical blocks of one slot; with the smallest blocks still a context of 16 million tokens.
constexpr size_t kMaxTableLength = size_t{1} << 20;

bool has_cache(const Arch& arch, const Hyperparameters& hp, const Slice& slice) {
  for (const models::CacheGroup& group : arch.cache_groups(hp)) {
    if (!models::slice_cache_layers(group, slice).empty()) return true;
  }
  return false;
}

// Rows of outputs that a session keeps for the collector, besides the device's own work space.
uint64_t output_buffer_bytes(const Hyperparameters& hp, const graph::Graph& graph, const CacheConfig& cache) {
  uint64_t row = 0;
  if (graph.find_output("logits")) row += hp.n_vocab;
  if (graph.find_output("embedding")) row += hp.n_embd;
  return row * cache.max_outputs * sizeof(float);
}

void check_config(const Arch& arch, const Hyperparameters& hp, const CacheConfig& cache) {
  const auto groups = arch.cache_groups(hp);
  if (cache.n_blocks.size() != groups.size()) {
    throw FormatError(fmt::format("cache configuration: expected blocks for {} groups of a {} model, found {}",
                                  groups.size(), arch.name, cache.n_blocks.size()));
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    const bool cached = groups[i].kind != models::CacheGroup::Kind::none;
    if (cached != (cache.n_blocks[i] > 0)) {
      throw FormatError(fmt::format("cache configuration: group {}: expected {} blocks, found {}", i,
                                    cached ? "some" : "no", cache.n_blocks[i]));
    }
  }
  const auto check = [](const char* name, uint32_t value, uint32_t max) {
    if (value < 1 || value > max) {
      throw FormatError(fmt::format("cache configuration: {}: expected 1 to {}, found {}", name, max, value));
    }
  };
  check("block_tokens", cache.block_tokens, 1 << 16);
  check("max_slots", cache.max_slots, 1 << 16);
  check("max_rows", cache.max_rows, 1 << 16);
  check("max_outputs", cache.max_outputs, 1 << 16);
}

void require_memory(const device::Device& device, const MemoryNeed& need) {
  const device::DeviceInfo info = device.info();
  if (need.total() <= info.memory_free) return;
  throw ResourceError(fmt::format("{}: need {} (weights {}, KV cache {}, scratch {}), have {} of {} free", info.name,
                                  format_bytes(need.total()), format_bytes(need.weights), format_bytes(need.kv_cache),
                                  format_bytes(need.scratch), format_bytes(info.memory_free),
                                  format_bytes(info.memory_total)));
}

device::RunLimits run_limits(const CacheConfig& cache) {
  device::RunLimits limits;
  limits.max_rows = cache.max_rows;
  limits.max_output_rows = std::min(cache.max_outputs, cache.max_rows);
  return limits;
}

MemoryNeed need_of(const Arch& arch, const Hyperparameters& hp, const graph::Graph& graph, const Slice& slice,
                   const CacheConfig& cache, const device::Device& device) {
  MemoryNeed need;
  for (const graph::WeightSpec& spec : graph.weights) need.weights += device.weight_bytes(spec);
  const device::CacheSpec spec = cache_spec(arch, hp, slice, cache);
  if (has_cache(arch, hp, slice)) need.kv_cache = device.cache_bytes(spec);
  need.scratch = device.scratch_bytes(graph, spec, run_limits(cache)) + output_buffer_bytes(hp, graph, cache);
  return need;
}

}  // namespace

Digest content_key(const LoadRequest& request) {
  ByteWriter writer;
  gguf::write_metadata(writer, request.hyperparameters);
  writer.write(request.slice.layer_begin);
  writer.write(request.slice.layer_end);
  writer.write(static_cast<uint8_t>(request.slice.embeds));
  writer.write(static_cast<uint8_t>(request.slice.outputs));
  for (const weights::TensorEntry& tensor : request.manifest.tensors) {
    writer.write(static_cast<uint64_t>(tensor.name.size()));
    writer.write_string(tensor.name);
    writer.write(static_cast<uint32_t>(tensor.type));
    for (const int64_t n : tensor.ne) writer.write(n);
    writer.write(static_cast<uint64_t>(tensor.chunks.size()));
    for (const Digest& digest : tensor.chunks) writer.write_bytes(std::as_bytes(std::span(digest.bytes)));
  }
  return sha256(writer.data());
}

device::CacheSpec cache_spec(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                             const CacheConfig& cache) {
  device::CacheSpec spec;
  spec.block_tokens = static_cast<int>(cache.block_tokens);
  spec.dtype_k = cache.k_type;
  spec.dtype_v = cache.v_type;
  const auto groups = arch.cache_groups(hp);
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].kind == models::CacheGroup::Kind::none) continue;
    device::CacheGroup& group = spec.groups.emplace_back();
    group.name = groups[i].kind == models::CacheGroup::Kind::window ? "window" : "full";
    group.n_blocks = cache.n_blocks[i];
    for (const models::CacheLayer& layer : models::slice_cache_layers(groups[i], slice)) {
      group.layers.push_back(
          {static_cast<int>(layer.n_head_kv), static_cast<int>(layer.head_dim_k), static_cast<int>(layer.head_dim_v)});
    }
  }
  return spec;
}

MemoryNeed memory_need(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors, const Slice& slice,
                       const CacheConfig& cache, const device::Device& device) {
  check_config(arch, hp, cache);
  return need_of(arch, hp, models::build_graph(arch, hp, slice, tensors), slice, cache, device);
}

LayerNeeds layer_needs(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors,
                       const CacheConfig& cache, const device::Device& device) {
  check_config(arch, hp, cache);
  const Slice whole = models::whole_model(hp);
  const graph::Graph graph = models::build_graph(arch, hp, whole, tensors);
  LayerNeeds needs;
  needs.layer_weights.assign(hp.n_layer, 0);
  needs.layer_kv_cache.assign(hp.n_layer, 0);
  needs.scratch = need_of(arch, hp, graph, whole, cache, device).scratch;

  std::map<std::pair<std::string, graph::WeightRole>, uint64_t> bytes;
  for (const graph::WeightSpec& spec : graph.weights) bytes[{spec.name, spec.role}] = device.weight_bytes(spec);
  std::set<std::pair<std::string, graph::WeightRole>> counted;
  for (const models::TensorDecl& decl : models::slice_tensors(arch, hp, whole)) {
    auto found = bytes.find({decl.name, decl.role});
    if (found == bytes.end()) found = bytes.find({decl.fallback, decl.role});
    // Optional and absent, or counted: one tensor may stand for several (attn_qkv).
    if (found == bytes.end() || !counted.insert(found->first).second) continue;
    switch (decl.scope) {
      case models::TensorDecl::Scope::embedding:
        needs.embedding_weights += found->second;
        break;
      case models::TensorDecl::Scope::output:
        needs.output_weights += found->second;
        break;
      case models::TensorDecl::Scope::every:
        needs.shared_weights += found->second;
        break;
      case models::TensorDecl::Scope::layer:
        needs.layer_weights[decl.layer] += found->second;
        break;
    }
  }

  const auto groups = arch.cache_groups(hp);
  for (size_t i = 0; i < groups.size(); ++i) {
    uint64_t& group_bytes = needs.group_block_bytes.emplace_back(0);
    for (const models::CacheLayer& layer : groups[i].layers) {
      const device::CacheSpec spec = cache_spec(arch, hp, {layer.layer, layer.layer + 1, false, false}, cache);
      const uint64_t block = device.cache_block_bytes(spec, static_cast<int>(i));
      group_bytes += block;
      needs.layer_kv_cache[layer.layer] += block * cache.n_blocks[i];
    }
  }
  return needs;
}

std::shared_ptr<const LoadedSlice> LoadedSlice::load(device::Device& device, const LoadRequest& request,
                                                     std::span<weights::WeightSource* const> sources,
                                                     const Stage::ProgressFunction& on_progress) {
  return SliceLoader(device, request).run(sources, on_progress);
}

SliceLoader::SliceLoader(device::Device& device, LoadRequest request)
    : request_(std::move(request)), slice_(new LoadedSlice(device)) {
  slice_->arch_ = &models::find_arch(request_.hyperparameters);
  slice_->hp_ = slice_->arch_->read(request_.hyperparameters);
  slice_->slice_ = request_.slice;
  weights::validate(request_.manifest);
  models::check_manifest(*slice_->arch_, slice_->hp_, request_.slice, request_.manifest);
  check_config(*slice_->arch_, slice_->hp_, request_.cache);
  slice_->key_ = content_key(request_);
  slice_->graph_ =
      models::build_graph(*slice_->arch_, slice_->hp_, request_.slice, models::tensor_map(request_.manifest));
  require_memory(device, need_of(*slice_->arch_, slice_->hp_, slice_->graph_, request_.slice, request_.cache, device));
  slice_->weights_ = device.create_weights(slice_->graph_.weights);
  for (const weights::TensorEntry& tensor : request_.manifest.tensors) {
    for (uint64_t i = 0; i < weights::n_chunks(tensor.size_bytes); ++i) missing_.push_back({&tensor, i});
  }
}

std::shared_ptr<const LoadedSlice> SliceLoader::run(std::span<weights::WeightSource* const> sources,
                                                    const Stage::ProgressFunction& on_progress) {
  CARAVAN_ASSERT(slice_ != nullptr, "a loader gives its slice once");
  device::WeightSet& weights = *slice_->weights_;
  std::multimap<std::string_view, size_t> by_name;  // a tied matrix is two weights of one tensor
  for (size_t i = 0; i < weights.specs().size(); ++i) by_name.emplace(weights.specs()[i].name, i);
  std::set<std::pair<const weights::TensorEntry*, uint64_t>> uploaded;
  const std::vector<weights::ChunkRef> wanted = missing_;
  const auto forget_uploaded = [&] {
    std::erase_if(missing_,
                  [&](const weights::ChunkRef& chunk) { return uploaded.contains({chunk.tensor, chunk.index}); });
  };
  const auto tell = [&] {
    if (on_progress) on_progress(done_bytes_);
  };
  const auto use = [&](const weights::ChunkRef& chunk, std::span<const std::byte> bytes) {
    const auto [begin, end] = by_name.equal_range(chunk.tensor->name);
    for (auto it = begin; it != end; ++it) weights.upload(it->second, chunk.offset(), bytes);
    uploaded.emplace(chunk.tensor, chunk.index);
    done_bytes_ += bytes.size();
    tell();
  };
  try {
    weights::pull(wanted, sources, use, {}, tell);
  } catch (...) {
    forget_uploaded();
    throw;
  }
  forget_uploaded();
  weights.finish();
  return std::move(slice_);
}

SliceSession::SliceSession(std::shared_ptr<const LoadedSlice> slice, const CacheConfig& cache)
    : slice_(std::move(slice)) {
  const Arch& arch = slice_->arch();
  const Hyperparameters& hp = slice_->hyperparameters();
  check_config(arch, hp, cache);
  limits_.max_rows = cache.max_rows;
  limits_.max_outputs = cache.max_outputs;
  limits_.max_slots = cache.max_slots;
  limits_.n_vocab = hp.n_vocab;
  limits_.block_tokens = cache.block_tokens;
  limits_.n_blocks = cache.n_blocks;
  if (slice_->slice().embeds && hp.n_positions > 0) max_positions_ = hp.n_positions;

  MemoryNeed need = need_of(arch, hp, slice_->graph(), slice_->slice(), cache, slice_->device());
  need.weights = 0;  // held already
  require_memory(slice_->device(), need);
  output_buffer_bytes_ = output_buffer_bytes(hp, slice_->graph(), cache);
  const device::CacheSpec spec = cache_spec(arch, hp, slice_->slice(), cache);
  if (has_cache(arch, hp, slice_->slice())) cache_ = slice_->device().create_cache(spec);
  executable_ = slice_->device().compile(slice_->graph(), slice_->weights(), cache_, run_limits(cache));

  const size_t n_groups = cache.n_blocks.size();
  tables_.assign(n_groups, std::vector<std::vector<int32_t>>(cache.max_slots));
  table_views_.assign(n_groups, std::vector<device::BlockTable>(cache.max_slots));
  visible_from_.resize(n_groups);
  visible_to_.resize(n_groups);
}

uint64_t SliceSession::scratch_bytes() const { return executable_->scratch_bytes() + output_buffer_bytes_; }

void SliceSession::reset() {
  for (auto& group : tables_) {
    for (auto& table : group) table.clear();
  }
}

void SliceSession::check(const Batch& batch, std::span<const float> input) const {
  validate(batch, limits_);
  const Slice& slice = slice_->slice();
  const size_t expected = slice.embeds ? 0 : size_t{batch.n_rows()} * slice_->hyperparameters().n_embd;
  if (input.size() != expected) {
    throw ProtocolError(fmt::format("batch: hidden input: expected {} values, found {}", expected, input.size()));
  }
  for (size_t row = 0; row < batch.positions.size(); ++row) {
    if (static_cast<uint32_t>(batch.positions[row][0]) >= max_positions_) {
      throw RequestError(fmt::format("position {} is past the {} positions that the model has", batch.positions[row][0],
                                     max_positions_),
                         RequestError::Kind::context_exceeded);
    }
  }
  if (!slice.outputs || slice_->graph().find_output("logits")) return;
  for (const OutputRequest& output : batch.outputs) {
    if (output.kind == OutputKind::logits || output.kind == OutputKind::candidates) {
      throw RequestError(fmt::format("a {} model gives embeddings, not logits", slice_->arch().name));
    }
  }
}

void SliceSession::apply(const KvOp& op) {
  const auto blocks_of = [&](uint32_t n_tokens) {
    return (size_t{n_tokens} + limits_.block_tokens - 1) / limits_.block_tokens;
  };
  switch (op.kind) {
    case KvOp::Kind::append: {
      std::vector<int32_t>& table = tables_[op.group][op.slot];
      if (table.size() >= kMaxTableLength) {
        throw ProtocolError(
            fmt::format("slot {} of group {} has {} blocks: no more can be appended", op.slot, op.group, table.size()));
      }
      table.push_back(static_cast<int32_t>(op.block));
      return;
    }
    case KvOp::Kind::truncate:
      for (auto& group : tables_) {
        std::vector<int32_t>& table = group[op.slot];
        table.resize(std::min(table.size(), blocks_of(op.n_tokens)));
      }
      return;
    case KvOp::Kind::drop_front: {
      std::vector<int32_t>& table = tables_[op.group][op.slot];
      const size_t n = op.n_tokens / limits_.block_tokens;
      if (n > kMaxTableLength) {
        throw ProtocolError(fmt::format("slot {} of group {}: {} blocks cannot be dropped, a table holds at most {}",
                                        op.slot, op.group, n, kMaxTableLength));
      }
      table.resize(std::max(table.size(), n), device::kNoBlock);
      std::fill_n(table.begin(), n, device::kNoBlock);
      return;
    }
    case KvOp::Kind::fork:
      for (auto& group : tables_) {
        std::vector<int32_t> table = group[op.source];
        table.resize(std::min(table.size(), blocks_of(op.n_tokens)));
        group[op.slot] = std::move(table);
      }
      return;
    case KvOp::Kind::free:
      for (auto& group : tables_) group[op.slot].clear();
      return;
    case KvOp::Kind::copy_block:
      if (cache_ && !cache_->spec().groups[op.group].layers.empty()) {
        cache_->copy_block(static_cast<int>(op.group), static_cast<int32_t>(op.source), static_cast<int32_t>(op.block));
      }
      return;
  }
}

void SliceSession::fill_inputs(const Batch& batch) {
  const size_t n_groups = tables_.size(), n_rows = batch.n_rows();
  positions_.resize(n_rows);
  slots_.resize(n_rows);
  for (size_t row = 0; row < n_rows; ++row) {
    positions_[row] = batch.positions[row][0];
    slots_[row] = static_cast<int32_t>(batch.slots[row]);
  }
  output_rows_.clear();
  for (const OutputRequest& output : batch.outputs) output_rows_.push_back(static_cast<int32_t>(output.row));
  group_inputs_.clear();
  for (size_t group = 0; group < n_groups; ++group) {
    visible_from_[group].resize(n_rows);
    visible_to_[group].resize(n_rows);
    for (size_t row = 0; row < n_rows; ++row) {
      visible_from_[group][row] = batch.visible[row * n_groups + group].from;
      visible_to_[group][row] = batch.visible[row * n_groups + group].to;
    }
    std::copy(tables_[group].begin(), tables_[group].end(), table_views_[group].begin());
    group_inputs_.push_back({visible_from_[group], visible_to_[group], table_views_[group]});
  }
}

void SliceSession::run(const Batch& batch, std::span<const float> input, StageOutput& result) {
  const graph::Graph& graph = slice_->graph();
  const Hyperparameters& hp = slice_->hyperparameters();
  std::vector<std::span<float>> outputs(graph.outputs.size());
  const auto want = [&](const char* name, std::vector<float>& values, size_t n) {
    values.resize(n);
    outputs[*graph.find_output(name)] = values;
  };
  const auto wants = [&](auto... kinds) {
    return std::any_of(batch.outputs.begin(), batch.outputs.end(),
                       [&](const OutputRequest& output) { return ((output.kind == kinds) || ...); });
  };
  if (!slice_->slice().outputs) {
    want("hidden", result.hidden, size_t{batch.n_rows()} * hp.n_embd);
  } else {
    if (wants(OutputKind::hidden)) want("embedding", embedding_, batch.outputs.size() * hp.n_embd);
    if (wants(OutputKind::logits, OutputKind::candidates)) want("logits", logits_, batch.outputs.size() * hp.n_vocab);
  }
  fill_inputs(batch);

  device::RunInput run;
  run.n_rows = batch.n_rows();
  run.tokens = batch.tokens;
  run.hidden = input;
  run.positions = positions_;
  run.slots = slots_;
  run.token_index = positions_;
  run.groups = group_inputs_;
  run.output_rows = output_rows_;
  run.outputs = outputs;
  executable_->run(run);
}

namespace {

std::span<const float> row_of(const std::vector<float>& values, size_t index, size_t width) {
  return std::span(values).subspan(index * width, width);
}

}  // namespace

// Candidates of the outputs that want them.
void SliceSession::rank(const Batch& batch) {
  const size_t n_vocab = slice_->hyperparameters().n_vocab;
  const auto n_candidates = [&](const OutputRequest& request) {
    return request.kind == OutputKind::candidates ? std::min<size_t>(request.top_k, n_vocab) : 0;
  };
  size_t n = 0;
  for (const OutputRequest& request : batch.outputs) n += n_candidates(request);
  candidates_.resize(n);
  rankings_.assign(batch.outputs.size(), {});
  for (size_t i = 0, begin = 0; i < batch.outputs.size(); begin += n_candidates(batch.outputs[i++]))
    if (batch.outputs[i].kind == OutputKind::candidates)
      rankings_[i] = {row_of(logits_, i, n_vocab),
                      std::span(candidates_).subspan(begin, n_candidates(batch.outputs[i]))};
  slice_->device().rank(rankings_);
}

RowOutput SliceSession::row_output(const OutputRequest& request, size_t index) const {
  RowOutput result;
  result.row = request.row;
  result.kind = request.kind;
  if (request.kind == OutputKind::none) return result;
  if (request.kind == OutputKind::hidden) {
    const auto row = row_of(embedding_, index, slice_->hyperparameters().n_embd);
    result.values.assign(row.begin(), row.end());
    return result;
  }
  const auto logits = row_of(logits_, index, slice_->hyperparameters().n_vocab);
  if (request.kind == OutputKind::logits) {
    result.values.assign(logits.begin(), logits.end());
    return result;
  }
  const std::span<const device::Candidate> best = rankings_[index].best;
  result.ids.reserve(best.size());
  result.values.reserve(best.size() + request.named_ids.size());
  for (const device::Candidate& candidate : best) {
    result.ids.push_back(candidate.id);
    result.values.push_back(candidate.logit);
  }
  for (const int32_t id : request.named_ids) result.values.push_back(logits[static_cast<size_t>(id)]);
  result.log_sum_exp = rankings_[index].log_sum_exp;
  return result;
}

StageOutput SliceSession::compute(const Batch& batch, std::span<const float> input) {
  const auto start = std::chrono::steady_clock::now();
  check(batch, input);
  for (const KvOp& op : batch.kv_ops) apply(op);
  StageOutput result;
  if (batch.n_rows() > 0) run(batch, input, result);
  if (slice_->slice().outputs) {
    rank(batch);
    for (size_t i = 0; i < batch.outputs.size(); ++i) result.outputs.push_back(row_output(batch.outputs[i], i));
  }
  result.compute_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace caravan::stage
