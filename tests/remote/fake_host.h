// A machine in memory for tests of the wire: devices with a cap, weights that are just bytes, and stages that compute
// something simple that tests can foretell.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/sha256.h"
#include "remote/slice_host.h"
#include "weights/pull.h"
#include "weights/source.h"

namespace caravan::remote::testing {

inline constexpr uint32_t kEmbd = 8, kVocab = 32;

// A gate that stages pass before they compute; open unless closed.
class Gate {
 public:
  void close() {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    ++n_waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    --n_waiting_;
  }
  // Waits until somebody stands at the gate.
  void wait_for_visitor() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return n_waiting_ > 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  int n_waiting_ = 0;
};

// The values of a row: a stage that embeds starts with the token; every stage adds 1 to each value; the last gives
// logits that are the row's first value plus the id.
class FakeStage : public stage::Stage {
 public:
  FakeStage(stage::Slice slice, Gate& gate, std::atomic<int>& n_alive) : slice_(slice), gate_(gate), n_alive_(n_alive) {
    ++n_alive_;
  }
  ~FakeStage() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    worker_.join();
    --n_alive_;
  }

  void load(const stage::LoadRequest&, std::span<weights::WeightSource* const>, const ProgressFunction&) override {}
  void open(uint64_t session, uint64_t epoch, stage::OutputSink& sink) override {
    const std::lock_guard lock(compute_mutex_);
    session_ = session;
    epoch_ = epoch;
    sink_ = &sink;
  }
  void enqueue(const stage::Fence& fence, std::shared_ptr<const stage::Batch> batch,
               std::vector<float> input) override {
    const std::lock_guard lock(mutex_);
    steps_.push_back({fence, std::move(batch), std::move(input)});
    changed_.notify_all();
  }
  std::string numeric_class() const override { return "fake-1"; }

 private:
  struct Step {
    stage::Fence fence;
    std::shared_ptr<const stage::Batch> batch;
    std::vector<float> input;
  };

  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || !steps_.empty(); });
      if (stopping_) return;
      Step step = std::move(steps_.front());
      steps_.erase(steps_.begin());
      lock.unlock();
      compute(std::move(step));
      lock.lock();
    }
  }

  void compute(Step step) {
    gate_.pass();
    const std::lock_guard lock(compute_mutex_);
    if (step.fence.session != session_ || step.fence.epoch != epoch_) return;
    stage::StageOutput output;
    output.fence = step.fence;
    std::vector<float> rows = std::move(step.input);
    if (slice_.embeds)
      for (const int32_t token : step.batch->tokens) rows.insert(rows.end(), kEmbd, static_cast<float>(token));
    for (float& value : rows) value += 1;
    if (!slice_.outputs) {
      output.hidden = std::move(rows);
    } else {
      for (const stage::OutputRequest& request : step.batch->outputs) output.outputs.push_back(row(request, rows));
    }
    sink_->deliver(std::move(output));
  }

  static stage::RowOutput row(const stage::OutputRequest& request, const std::vector<float>& rows) {
    stage::RowOutput out{request.row, request.kind, {}, {}, 0};
    const float first = rows[size_t{request.row} * kEmbd];
    if (request.kind == stage::OutputKind::hidden)
      out.values.assign(rows.begin() + request.row * kEmbd, rows.begin() + (request.row + 1) * kEmbd);
    if (request.kind == stage::OutputKind::logits)
      for (uint32_t id = 0; id < kVocab; ++id) out.values.push_back(first + static_cast<float>(id));
    if (request.kind == stage::OutputKind::candidates) {
      out.log_sum_exp = first;
      for (uint32_t i = 0; i < request.top_k; ++i) out.ids.push_back(static_cast<int32_t>(kVocab - 1 - i));
      for (const int32_t id : out.ids) out.values.push_back(first + static_cast<float>(id));
      for (const int32_t id : request.named_ids) out.values.push_back(first + static_cast<float>(id));
    }
    return out;
  }

  const stage::Slice slice_;
  Gate& gate_;
  std::atomic<int>& n_alive_;
  std::mutex compute_mutex_;
  uint64_t session_ = 0, epoch_ = 0;
  stage::OutputSink* sink_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Step> steps_;
  bool stopping_ = false;
  std::thread worker_{[this] { work(); }};
};

struct FakeWeights : ResidentWeights {
  explicit FakeWeights(std::atomic<int>& n) : n_alive(n) { ++n_alive; }
  ~FakeWeights() override { --n_alive; }
  std::atomic<int>& n_alive;
};

class FakeHost : public SliceHost {
 public:
  class FakeLoad : public SliceLoad {
   public:
    FakeLoad(FakeHost& host, stage::LoadRequest request) : host_(host), request_(std::move(request)) {
      for (const auto& tensor : request_.manifest.tensors)
        for (uint64_t i = 0; i < weights::n_chunks(tensor.size_bytes); ++i) missing_.push_back({&tensor, i});
    }
    std::shared_ptr<const ResidentWeights> run(std::span<weights::WeightSource* const> sources,
                                               const stage::Stage::ProgressFunction& on_progress) override {
      host_.load_gate.pass();
      const std::vector<weights::ChunkRef> wanted = missing_;
      weights::pull(wanted, sources, [&](const weights::ChunkRef&, std::span<const std::byte> bytes) {
        missing_.erase(missing_.begin());
        on_progress(done_ += bytes.size());
      });
      return std::make_shared<FakeWeights>(host_.n_weights);
    }

   private:
    FakeHost& host_;
    const stage::LoadRequest request_;
    std::vector<weights::ChunkRef> missing_;
    uint64_t done_ = 0;
  };

  explicit FakeHost(uint64_t memory_bytes) : memory_bytes_(memory_bytes) {}

  std::vector<device::DeviceInfo> devices() const override {
    return {{"FAKE", "fake", "a device in memory", memory_bytes_, memory_bytes_, "fake-1", 1}};
  }
  // KV cache: 1000 bytes per block; scratch: 10 per row.
  stage::MemoryNeed need(size_t, const stage::LoadRequest& request) const override {
    stage::MemoryNeed need{request.manifest.size_bytes(), 0, request.cache.max_rows * uint64_t{10}};
    for (const uint32_t n : request.cache.n_blocks) need.kv_cache += n * uint64_t{1000};
    return need;
  }
  std::unique_ptr<SliceLoad> begin_load(size_t, const stage::LoadRequest& request) override {
    ++n_loads;
    return std::make_unique<FakeLoad>(*this, request);
  }
  ReadyStage make_stage(size_t, const stage::LoadRequest& request, std::shared_ptr<const ResidentWeights>) override {
    ReadyStage ready;
    ready.stage = std::make_unique<FakeStage>(request.slice, gate, n_stages);
    ready.limits = {request.cache.max_rows,     request.cache.max_outputs, request.cache.max_slots, kVocab,
                    request.cache.block_tokens, request.cache.n_blocks};
    ready.n_embd = kEmbd;
    return ready;
  }

  // Reads a gigabyte per second and multiplies ten times that.
  void measure(size_t, std::span<const tensor::DType> types, uint64_t most_bytes,
               stage::DeviceProfile& profile) override {
    ++n_measured;
    measure_gate.pass();
    CARAVAN_ASSERT(most_bytes <= memory_bytes_, "nobody may take more than there is");
    for (const tensor::DType type : types) profile.matrices[type] = {1e9, 1e10};
    profile.cache_bytes_per_s = 1e9;
    profile.step_seconds = 1e-5;
  }

  // A row takes a millisecond.
  stage::LayerTimes measure_layer(size_t, const stage::LoadRequest& sample, uint64_t most_bytes) override {
    ++n_measured;
    CARAVAN_ASSERT(most_bytes <= memory_bytes_, "nobody may take more than there is");
    if (sample.manifest.size_bytes() > most_bytes) throw ResourceError("the layer is too large");
    return {{1, 8}, {1e-3, 8e-3}};
  }

  std::atomic<int> n_measured{0};
  Gate gate, load_gate, measure_gate;  // of steps, of loads, of measurements
  std::atomic<int> n_stages{0}, n_weights{0}, n_loads{0};

 private:
  const uint64_t memory_bytes_;
};

// Chunks from memory; counts what was fetched.
class MemorySource : public weights::WeightSource {
 public:
  void announce(std::span<const weights::ChunkRef>) override {}
  bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
    const auto found = tensors.find(chunk.tensor->name);
    if (found == tensors.end()) return false;
    std::copy_n(found->second.begin() + static_cast<ptrdiff_t>(chunk.offset()), out.size(), out.begin());
    n_bytes += out.size();
    return true;
  }
  std::map<std::string, std::vector<std::byte>> tensors;
  std::atomic<uint64_t> n_bytes{0};
};

// A model of one tensor of size_bytes (a multiple of 4) random bytes; seed chooses them.
struct FakeModel {
  explicit FakeModel(uint64_t size_bytes, uint32_t seed = 1) {
    request.hyperparameters.set("general.architecture", gguf::Value::of("llama"));
    request.hyperparameters.set("llama.embedding_length", gguf::Value::of(kEmbd));
    std::mt19937 random(seed);
    std::vector<std::byte> bytes(size_bytes);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    weights::TensorEntry tensor;
    tensor.name = "blk.0.weight";
    tensor.type = tensor::DType::f32;
    tensor.ne = {static_cast<int64_t>(size_bytes / 4), 1, 1, 1};
    tensor.size_bytes = size_bytes;
    for (uint64_t at = 0; at < size_bytes; at += weights::kChunkBytes)
      tensor.chunks.push_back(
          sha256(std::span(bytes).subspan(at, std::min<uint64_t>(weights::kChunkBytes, size_bytes - at))));
    source.tensors[tensor.name] = std::move(bytes);
    request.manifest.tensors.push_back(std::move(tensor));
    request.slice = {0, 1, true, true};
    request.cache.n_blocks = {4};
    request.cache.max_rows = 16;
    request.cache.max_outputs = 16;
    request.cache.max_slots = 2;
  }
  stage::LoadRequest request;
  MemorySource source;
};

// n_rows rows of slot 0 from position 0 on, with tokens 0, 1, 2, ...; logits of the last.
inline stage::Batch simple_batch(uint32_t n_rows) {
  stage::Batch batch;
  for (uint32_t i = 0; i < n_rows; ++i) {
    const auto p = static_cast<int32_t>(i);
    batch.tokens.push_back(p);
    batch.positions.push_back({p, p, p, p});
    batch.slots.push_back(0);
    batch.visible.push_back({0, p + 1});
  }
  stage::KvOp append;
  batch.kv_ops.push_back(append);
  batch.outputs.push_back({n_rows - 1, stage::OutputKind::logits, 0, {}});
  return batch;
}

// A sink that tests wait on.
class Collector : public stage::OutputSink {
 public:
  void deliver(stage::StageOutput output) noexcept override {
    const std::lock_guard lock(mutex_);
    outputs_.push_back(std::move(output));
    changed_.notify_all();
  }
  // The next output; fails the wait after ten seconds with an output whose error says so.
  stage::StageOutput next() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(10), [&] { return !outputs_.empty(); })) {
      stage::StageOutput nothing;
      nothing.error = "test: nothing was delivered within 10 s";
      return nothing;
    }
    stage::StageOutput output = std::move(outputs_.front());
    outputs_.erase(outputs_.begin());
    return output;
  }
  size_t n_waiting() {
    const std::lock_guard lock(mutex_);
    return outputs_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<stage::StageOutput> outputs_;
};

// Looks at a condition of other threads until it holds, for at most patience.
template <typename Condition>
bool eventually(Condition condition, std::chrono::nanoseconds patience = std::chrono::seconds(10),
                std::chrono::nanoseconds pause = std::chrono::milliseconds(1)) {
  const auto until = std::chrono::steady_clock::now() + patience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(pause);
  }
  return true;
}

}  // namespace caravan::remote::testing
