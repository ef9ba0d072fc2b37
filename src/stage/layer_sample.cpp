#include "stage/layer_sample.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <thread>

#include "base/error.h"
#include "base/progress.h"
#include "models/registry.h"
#include "models/work.h"
#include "stage/loaded_slice.h"

namespace caravan::stage {
namespace {

using tensor::DType;
using Clock = std::chrono::steady_clock;

constexpr uint32_t kContext = 512;  // tokens of a typical request's prompt
constexpr uint32_t kFewRows = 8, kMostRows = 128;
constexpr uint32_t kRows[] = {1, kFewRows, 32, kMostRows};
// Models have one kind or two, rarely more.
constexpr uint32_t kMostKinds = 6;
// Copies of a layer, read one after the other, are together larger than caches: kProfileBytes.
constexpr uint64_t kMostCopies = 32;
constexpr auto kShortest = std::chrono::milliseconds(60);
constexpr auto kLongestPause = std::chrono::milliseconds(10);
// More rows are left out when they would take longer.
constexpr double kTooLong = 0.3;
// Room for chunks on their way into the weights.
constexpr uint64_t kSpareBytes = uint64_t{4} << 20;

// Random weights: rows of a few patterns, repeated, such that activations stay of the order of one.
class SyntheticSource : public weights::WeightSource {
 public:
  std::string_view name() const override { return "synthetic"; }
  bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
    const std::vector<std::byte>& rows = rows_of(*chunk.tensor);
    uint64_t at = chunk.offset() % rows.size();
    for (size_t done = 0; done < out.size(); at = 0) {
      const size_t n = std::min<size_t>(out.size() - done, rows.size() - at);
      std::copy_n(rows.begin() + static_cast<ptrdiff_t>(at), n, out.begin() + static_cast<ptrdiff_t>(done));
      done += n;
    }
    return true;
  }

 private:
  // Quantising takes its time; experts are chosen by floats, and no two of them should be alike.
  static int64_t n_patterns(const tensor::DTypeInfo& type) { return type.block_length > 1 ? 13 : 251; }

  const std::vector<std::byte>& rows_of(const weights::TensorEntry& tensor) {
    std::vector<std::byte>& rows = rows_[{tensor.type, tensor.ne[0]}];
    if (!rows.empty()) return rows;
    const tensor::DTypeInfo& info = tensor::dtype_info(tensor.type);
    const auto n = static_cast<uint64_t>(tensor.ne[0]);
    const auto n_rows = static_cast<uint64_t>(n_patterns(info));
    const uint64_t row_bytes = tensor::row_bytes(tensor.type, n);
    rows.resize(row_bytes * n_rows);
    if (info.quantize == nullptr) {
      // Some bytes of such blocks are scales: a byte pattern that is a small normal number in every format.
      std::fill(rows.begin(), rows.end(), std::byte{0x2c});
      return rows;
    }
    std::vector<float> values(n);
    const float scale = 1 / std::sqrt(static_cast<float>(n));
    for (uint64_t row = 0; row < n_rows; ++row) {
      for (float& value : values) value = scale * uniform();
      info.quantize(values.data(), rows.data() + row * row_bytes, tensor.ne[0]);
    }
    return rows;
  }

  float uniform() { return static_cast<float>(random_() % 4096) / 2048 - 1; }

  std::map<std::pair<DType, int64_t>, std::vector<std::byte>> rows_;
  std::minstd_rand random_{1};
};

// A session of a layer that computes rows of one sequence.
class Layer {
 public:
  Layer(std::shared_ptr<const LoadedSlice> slice, CacheConfig cache, uint32_t max_rows)
      : groups_(slice->arch().cache_groups(slice->hyperparameters())), session_(std::move(slice), [&] {
          cache.max_rows = max_rows;
          return cache;
        }()) {
    const BatchLimits& limits = session_.limits();
    for (uint32_t group = 0; group < limits.n_blocks.size(); ++group)
      for (uint32_t block = 0; block < limits.n_blocks[group]; ++block)
        first_ops_.push_back({KvOp::Kind::append, group, 0, block, 0, 0});
  }

  void compute(uint32_t n_rows, std::span<const float> hidden) {
    const uint32_t before = n_rows <= kFewRows ? kContext : (kContext - n_rows) / 2;
    Batch batch;
    batch.kv_ops = std::exchange(first_ops_, {});
    batch.tokens.assign(n_rows, 0);
    batch.slots.assign(n_rows, 0);
    for (uint32_t row = 0; row < n_rows; ++row) {
      const auto position = static_cast<int32_t>(before + row);
      batch.positions.push_back({position, position, position, position});
      for (const models::CacheGroup& group : groups_) batch.visible.push_back(visible(group, position, n_rows));
    }
    session_.compute(batch, hidden);
  }

 private:
  static VisibleRange visible(const models::CacheGroup& group, int32_t position, uint32_t n_rows) {
    switch (group.kind) {
      case models::CacheGroup::Kind::none:
        return {0, static_cast<int32_t>(n_rows)};
      case models::CacheGroup::Kind::window:
        return {std::max(0, position + 1 - static_cast<int32_t>(std::min(group.window, kContext))), position + 1};
      case models::CacheGroup::Kind::full:
        break;
    }
    return {0, position + 1};
  }

  const std::vector<models::CacheGroup> groups_;
  SliceSession session_;
  std::vector<KvOp> first_ops_;
};

CacheConfig sample_config(const models::Arch& arch, const models::Hyperparameters& hp, const CacheConfig& cache) {
  CacheConfig config = cache;
  config.n_blocks.clear();
  for (const models::CacheGroup& group : arch.cache_groups(hp)) {
    const bool cached = group.kind != models::CacheGroup::Kind::none;
    config.n_blocks.push_back(cached ? (kContext + kMostRows) / config.block_tokens + 1 : 0);
  }
  config.max_slots = config.max_outputs = 1;
  config.max_rows = kMostRows;
  return config;
}

}  // namespace

SpeedQuestions speed_questions(const gguf::Model& model, const gguf::Metadata& hyperparameters,
                               const CacheConfig& cache) {
  const models::Arch& arch = models::find_arch(hyperparameters);
  const models::Hyperparameters hp = arch.read(hyperparameters);
  const graph::TensorMap tensors = models::tensor_map(model);
  const std::vector<uint32_t> kinds = models::layer_kinds(arch, hp, tensors);
  models::ModelWork work = models::model_work(arch, hp, tensors);
  SpeedQuestions questions;
  questions.all_types = models::main_types(work);
  for (uint32_t layer = 0; layer < kinds.size(); ++layer) {
    if (kinds[layer] >= kMostKinds) continue;
    work.layers[layer].clear();
    if (kinds[layer] < questions.layers.size()) continue;
    const Slice slice{layer, layer + 1, false, false};
    const auto names = models::slice_tensor_names(arch, hp, slice, tensors);
    questions.layers.push_back({kinds[layer],
                                {.hyperparameters = hyperparameters,
                                 .manifest = weights::make_manifest(model, names, weights::Hashing::none, nullptr, 1),
                                 .slice = slice,
                                 .cache = sample_config(arch, hp, cache)}});
  }
  questions.other_types = models::main_types(work);
  return questions;
}

LayerTimes measure_layer(device::Device& device, LoadRequest sample, uint64_t most_bytes) {
  const Slice& slice = sample.slice;
  if (slice.layer_end != slice.layer_begin + 1 || slice.embeds || slice.outputs)
    throw FormatError(fmt::format("a sample of layers [{}, {}){}{}, expected one layer and nothing else",
                                  slice.layer_begin, slice.layer_end, slice.embeds ? ", embedding" : "",
                                  slice.outputs ? ", output" : ""));
  const models::Arch& arch = models::find_arch(sample.hyperparameters);
  const models::Hyperparameters hp = arch.read(sample.hyperparameters);
  if (sample.cache.block_tokens < 1) throw FormatError("a sample whose blocks hold no tokens");
  sample.cache = sample_config(arch, hp, sample.cache);
  for (weights::TensorEntry& tensor : sample.manifest.tensors) tensor.chunks.clear();  // nothing to compare with

  // The first copy takes many rows, the others only few.
  const auto need_for = [&](uint32_t max_rows) {
    CacheConfig cache = sample.cache;
    cache.max_rows = max_rows;
    return memory_need(arch, hp, models::tensor_map(sample.manifest), slice, cache, device);
  };
  const MemoryNeed first = need_for(kMostRows);
  if (first.total() + kSpareBytes > most_bytes)
    throw ResourceError(
        fmt::format("a layer takes {} to measure, {} are free", format_bytes(first.total()), format_bytes(most_bytes)));
  const uint64_t other = std::max<uint64_t>(1, need_for(kFewRows).total());
  const uint64_t wanted = kProfileBytes / std::max<uint64_t>(1, first.weights);
  const uint64_t possible = (most_bytes - first.total() - kSpareBytes) / other;
  const uint64_t n_copies = 1 + std::min({wanted, possible, kMostCopies, uint64_t{hp.n_layer} - 1});

  SyntheticSource source;
  weights::WeightSource* const sources[] = {&source};
  std::vector<std::unique_ptr<Layer>> copies;
  for (uint64_t i = 0; i < n_copies; ++i)
    copies.push_back(std::make_unique<Layer>(SliceLoader(device, sample).run(sources, nullptr), sample.cache,
                                             i == 0 ? kMostRows : kFewRows));

  // Rows differ, so that experts do, too.
  std::vector<float> hidden(size_t{kMostRows} * hp.n_embd);
  std::minstd_rand random(2);
  for (float& value : hidden) value = static_cast<float>(random() % 4096) / 1024 - 2;
  LayerTimes times;
  const auto compute = [&](Layer& layer, uint32_t n_rows) {
    const size_t from = random() % (kMostRows - n_rows + 1);
    layer.compute(n_rows, std::span(hidden).subspan(from * hp.n_embd, size_t{n_rows} * hp.n_embd));
  };
  for (const uint32_t n_rows : kRows) {
    if (n_rows > kFewRows) {
      if (times.seconds.back() * n_rows / times.n_rows.back() > kTooLong) break;
      times.seconds.push_back(
          median_seconds(n_rows == kMostRows ? 1 : 2, kShortest, [&] { compute(*copies.front(), n_rows); }));
    } else {
      // One stage of several waits while the others compute, and begins with a processor that has slept.
      auto began = Clock::now();
      const auto pass = [&] {
        began = Clock::now();
        for (const auto& layer : copies) compute(*layer, n_rows);
      };
      pass();  // pages and tables are touched for the first time
      const auto pause = [&] {
        std::this_thread::sleep_for(std::min<Clock::duration>(Clock::now() - began, kLongestPause));
      };
      times.seconds.push_back(median_seconds(3, kShortest, pass, pause) / static_cast<double>(n_copies));
    }
    times.n_rows.push_back(n_rows);
  }
  return times;
}

}  // namespace caravan::stage
