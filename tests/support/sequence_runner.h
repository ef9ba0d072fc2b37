// Drives slices of a model from tests without engine or wire: builds batches for sequences whose blocks are handed out
// in order, and passes hidden rows from slice to slice. Header-only: for tests that link caravan_stage.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <vector>

#include "device/device.h"
#include "gguf/reader.h"
#include "models/registry.h"
#include "stage/loaded_slice.h"
#include "weights/source.h"

namespace caravan::testing {

// Adds rows of sequences to batches and keeps count of their tokens and blocks.
class BatchBuilder {
 public:
  BatchBuilder(std::vector<models::CacheGroup> groups, const stage::CacheConfig& cache)
      : groups_(std::move(groups)),
        block_tokens_(cache.block_tokens),
        next_block_(groups_.size(), 0),
        n_tokens_(cache.max_slots, 0) {}

  // Appends tokens to the sequence of a slot; every row asks for output of that kind (none: no row does).
  void add(stage::Batch& batch, stage::Slot slot, std::span<const int32_t> tokens, stage::OutputKind kind) {
    const auto first_row = static_cast<int32_t>(batch.n_rows());
    for (const int32_t token : tokens) {
      const auto position = static_cast<int32_t>(n_tokens_[slot]++);
      if (kind != stage::OutputKind::none) batch.outputs.push_back({batch.n_rows(), kind, 1, {}});
      batch.tokens.push_back(token);
      batch.positions.push_back({position, position, position, position});
      batch.slots.push_back(slot);
      for (uint32_t group = 0; group < groups_.size(); ++group) {
        batch.visible.push_back(visible(groups_[group], position, first_row, tokens.size()));
        if (groups_[group].kind == models::CacheGroup::Kind::none || position % block_tokens_ != 0) continue;
        batch.kv_ops.push_back({stage::KvOp::Kind::append, group, slot, next_block_[group]++, 0, 0});
      }
    }
  }

  uint32_t n_tokens(stage::Slot slot) const { return n_tokens_[slot]; }

 private:
  static stage::VisibleRange visible(const models::CacheGroup& group, int32_t position, int32_t first_row, size_t n) {
    switch (group.kind) {
      case models::CacheGroup::Kind::none:
        return {first_row, first_row + static_cast<int32_t>(n)};
      case models::CacheGroup::Kind::full:
        return {0, position + 1};
      case models::CacheGroup::Kind::window:
        return {std::max(0, position + 1 - static_cast<int32_t>(group.window)), position + 1};
    }
    return {};
  }

  std::vector<models::CacheGroup> groups_;
  uint32_t block_tokens_;
  std::vector<uint32_t> next_block_;
  std::vector<uint32_t> n_tokens_;
};

// What a stage is asked to load: the slice's part of a model, without hashes.
inline stage::LoadRequest load_request(const gguf::Model& model, const stage::Slice& slice,
                                       const stage::CacheConfig& cache,
                                       weights::Hashing hashing = weights::Hashing::none) {
  const models::Arch& arch = models::find_arch(model.metadata());
  stage::LoadRequest request;
  request.hyperparameters = models::hyperparameter_metadata(model.metadata());
  const auto hp = arch.read(request.hyperparameters);
  const auto names = models::slice_tensor_names(arch, hp, slice, models::tensor_map(model));
  request.manifest = weights::make_manifest(model, names, hashing, nullptr, 1);
  request.slice = slice;
  request.cache = cache;
  return request;
}

// f32 KV, enough blocks for what tests do.
inline stage::CacheConfig test_cache(const gguf::Model& model, uint32_t n_blocks = 64, uint32_t max_slots = 8) {
  const models::Arch& arch = models::find_arch(model.metadata());
  stage::CacheConfig cache;
  cache.k_type = cache.v_type = tensor::DType::f32;
  cache.block_tokens = 16;
  cache.max_slots = max_slots;
  cache.max_rows = cache.max_outputs = 64;
  for (const models::CacheGroup& group : arch.cache_groups(arch.read(model.metadata()))) {
    cache.n_blocks.push_back(group.kind == models::CacheGroup::Kind::none ? 0 : n_blocks);
  }
  return cache;
}

// The whole model cut at layer boundaries: {2, 5} gives [0, 2), [2, 5), [5, n_layer).
inline std::vector<stage::Slice> cut(uint32_t n_layer, const std::vector<uint32_t>& at) {
  std::vector<stage::Slice> slices{{0, n_layer, true, true}};
  for (const uint32_t layer : at) {
    slices.push_back({layer, n_layer, false, true});
    slices[slices.size() - 2].layer_end = layer;
    slices[slices.size() - 2].outputs = false;
  }
  return slices;
}

// All slices of a model on one device, one session each.
class SliceChain {
 public:
  SliceChain(device::Device& device, const gguf::Model& model, const std::vector<stage::Slice>& slices,
             const stage::CacheConfig& cache) {
    weights::ModelSource source(model);
    weights::WeightSource* sources[] = {&source};
    for (const stage::Slice& slice : slices) {
      auto loaded = stage::LoadedSlice::load(device, load_request(model, slice, cache), sources, {});
      sessions_.push_back(std::make_unique<stage::SliceSession>(std::move(loaded), cache));
    }
  }

  std::vector<stage::RowOutput> compute(const stage::Batch& batch) {
    stage::StageOutput output;
    for (auto& session : sessions_) output = session->compute(batch, output.hidden);
    return std::move(output.outputs);
  }

  stage::SliceSession& session(size_t i) { return *sessions_[i]; }

 private:
  std::vector<std::unique_ptr<stage::SliceSession>> sessions_;
};

// Values of every token of a sequence, given to the chain in chunks, in slot 0.
inline std::vector<std::vector<float>> sequence_rows(SliceChain& chain, BatchBuilder& builder,
                                                     std::span<const int32_t> tokens, size_t chunk,
                                                     stage::OutputKind kind) {
  std::vector<std::vector<float>> rows;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    stage::Batch batch;
    builder.add(batch, 0, tokens.subspan(begin, std::min(chunk, tokens.size() - begin)), kind);
    for (stage::RowOutput& output : chain.compute(batch)) rows.push_back(std::move(output.values));
  }
  return rows;
}

}  // namespace caravan::testing
