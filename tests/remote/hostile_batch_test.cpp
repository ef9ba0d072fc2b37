// A peer that loads slices of a real (tiny) model as anybody may, and then sends batches that no engine makes: it gets
// an error or is cut off, and the other peer's logits stay what they are, bit for bit.
#include <gtest/gtest.h>

#include <limits>

#include "device/cpu/cpu_device.h"
#include "remote/codec.h"
#include "service_support.h"
#include "support/kit.h"
#include "support/sequence_runner.h"
#include "support/tiny_model.h"

namespace caravan::remote {
namespace {

using caravan::testing::BatchBuilder;
using caravan::testing::SliceChain;
using caravan::testing::TinyKind;
using stage::KvOp;
using testing::Collector;
using testing::HandMadeServer;

constexpr const char* kToken = "a secret of sixteen";
constexpr uint32_t kFrontStage = 1, kBackStage = 2;  // of the hostile peer: the slice that embeds, and the other

BackendOptions backend_options() {
  BackendOptions options;
  options.endpoint = {"127.0.0.1", 0};
  options.token = kToken;
  return options;
}

std::vector<std::unique_ptr<device::Device>> one_device() {
  std::vector<std::unique_ptr<device::Device>> devices;
  devices.push_back(std::make_unique<device::cpu::CpuDevice>(1, select_isa(), uint64_t{64} << 20));
  return devices;
}

gguf::Model tiny_model(const caravan::testing::TemporaryDirectory& folder, TinyKind kind) {
  return gguf::Model::open(caravan::testing::write_tiny_model(folder.path(), {.kind = kind, .n_layer = 3}, "model"));
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// What came back for a step.
struct Answer {
  bool is_cut = false;  // else: an output with or without an error
  std::string error;
};

// A peer made by hand with two stages of weights that are resident already.
class HostileServer : public HandMadeServer {
 public:
  HostileServer(net::IoThreads& io, const net::Endpoint& endpoint, const std::vector<stage::LoadRequest>& slices)
      : HandMadeServer(io, endpoint, kToken) {
    greet();
    for (uint32_t i = 0; i < slices.size(); ++i) {
      const EncodedLoad load = encode_load(slices[i], i + 1, 0);
      send(MessageType::load_slice, load.header, text_of(load.payload));
      EXPECT_TRUE(read_until(MessageType::loaded));
      pb::OpenSession open;
      open.set_stage(i + 1);
      open.set_session(kSession);
      open.set_epoch(1);
      send(MessageType::open_session, open);
      EXPECT_TRUE(read_until(MessageType::session_opened));
    }
  }

  Answer answer_to(uint32_t stage, const stage::Batch& batch, std::span<const float> hidden = {}) {
    ByteWriter writer;
    encode_batch(writer, batch);
    const size_t batch_bytes = writer.data().size();
    writer.write_bytes(std::as_bytes(hidden));
    return answer_to(stage, text_of(writer.data()), static_cast<uint32_t>(batch_bytes));
  }
  Answer answer_to(uint32_t stage, const std::string& payload, uint32_t batch_bytes) {
    pb::Forward message;
    message.set_stage(stage);
    write_fence(*message.mutable_fence(), {kSession, 1, ++ticket_});
    message.set_batch_bytes(batch_bytes);
    send(MessageType::forward, message, payload);
    while (const auto frame = read()) {
      if (frame->type == static_cast<uint16_t>(MessageType::error))
        return {true, parse_header<pb::Error>(*frame).text()};
      if (frame->type == static_cast<uint16_t>(MessageType::output))
        return {false, parse_header<pb::Output>(*frame).error()};
    }
    return {true, "closed"};
  }

 private:
  static constexpr uint64_t kSession = 666;

  bool read_until(MessageType type) {
    while (const auto frame = read()) {
      if (frame->type == static_cast<uint16_t>(type)) return true;
      if (frame->type == static_cast<uint16_t>(MessageType::error)) {
        ADD_FAILURE() << parse_header<pb::Error>(*frame).text();
        return false;
      }
    }
    ADD_FAILURE() << "closed";
    return false;
  }
  uint64_t ticket_ = 0;
};

// A backend with a real device, and an honest server that computes one sequence on it, token by token.
class HostileBatches : public ::testing::TestWithParam<TinyKind> {
 protected:
  HostileBatches()
      : model_(tiny_model(folder_, GetParam())),
        cache_(caravan::testing::test_cache(model_, 8, 2)),
        arch_(models::find_arch(model_.metadata())),
        groups_(arch_.cache_groups(arch_.read(model_.metadata()))),
        n_vocab_(arch_.read(model_.metadata()).n_vocab),
        n_embd_(arch_.read(model_.metadata()).n_embd),
        device_(1, select_isa(), uint64_t{64} << 20),
        whole_(device_, model_, {{0, 3, true, true}}, cache_),
        builder_(groups_, cache_),
        host_(one_device()),
        service_(io_, host_, backend_options()) {
    LinkOptions options;
    options.token = kToken;
    link_ = BackendLink::connect(io_, service_.endpoint(), options);
    weights::ModelSource source(model_);
    weights::WeightSource* const sources[] = {&source};
    for (const stage::Slice& slice : caravan::testing::cut(3, {1}))
      slices_.push_back(caravan::testing::load_request(model_, slice, cache_, weights::Hashing::sha256));
    front_ = std::make_unique<RemoteStage>(link_);
    back_ = std::make_unique<RemoteStage>(link_);
    front_->load(slices_[0], sources, {});
    back_->load(slices_[1], sources, {});
    front_->open(1, 1, middle_);
    back_->open(1, 1, end_);
  }
  ~HostileBatches() override {
    front_.reset();
    back_.reset();
  }

  std::unique_ptr<HostileServer> connect() {
    return std::make_unique<HostileServer>(io_, service_.endpoint(), slices_);
  }

  // The honest server's next token.
  void expect_unharmed(const std::string& after) {
    auto batch = std::make_shared<stage::Batch>();
    const int32_t token = static_cast<int32_t>(++ticket_ * 7 % 50);
    builder_.add(*batch, 0, {&token, 1}, stage::OutputKind::logits);
    front_->enqueue({1, 1, ticket_}, batch, {});
    stage::StageOutput hidden = middle_.next();
    ASSERT_EQ(hidden.error, "") << after;
    back_->enqueue({1, 1, ticket_}, batch, std::move(hidden.hidden));
    const stage::StageOutput output = end_.next();
    ASSERT_EQ(output.error, "") << after;
    ASSERT_EQ(output.outputs.size(), 1u) << after;
    EXPECT_EQ(output.outputs[0].values, whole_.compute(*batch).at(0).values) << after;
  }

  // A batch of n rows of slot 0 as an engine makes it.
  stage::Batch good_batch(uint32_t n_rows = 2) const {
    BatchBuilder builder(groups_, cache_);
    stage::Batch batch;
    builder.add(batch, 0, std::vector<int32_t>(n_rows, 1), stage::OutputKind::logits);
    return batch;
  }
  std::string bytes_of(const stage::Batch& batch) const {
    ByteWriter writer;
    encode_batch(writer, batch);
    return text_of(writer.data());
  }

  const caravan::testing::TemporaryDirectory folder_;
  const gguf::Model model_;
  const stage::CacheConfig cache_;
  const models::Arch& arch_;
  const std::vector<models::CacheGroup> groups_;
  const uint32_t n_vocab_, n_embd_;
  device::cpu::CpuDevice device_;
  SliceChain whole_;
  BatchBuilder builder_;
  net::IoThreads io_{2};
  DeviceSliceHost host_;
  BackendService service_;
  std::shared_ptr<BackendLink> link_;
  std::vector<stage::LoadRequest> slices_;
  Collector middle_, end_;
  std::unique_ptr<RemoteStage> front_, back_;
  uint64_t ticket_ = 0;
};

TEST_P(HostileBatches, ThatBreakTheLimitsOfTheStageGetAnError) {
  const auto hostile = connect();
  const uint32_t n_groups = static_cast<uint32_t>(groups_.size());
  const auto op = [](KvOp::Kind kind, uint32_t group, uint32_t slot, uint32_t block, uint32_t source,
                     uint32_t n_tokens) {
    return [=](stage::Batch& batch) { batch.kv_ops.push_back({kind, group, slot, block, source, n_tokens}); };
  };
  const auto n_vocab = static_cast<int32_t>(n_vocab_);
  const std::vector<std::pair<std::string, std::function<void(stage::Batch&)>>> cases = {
      {"token of row 1", [&](stage::Batch& b) { b.tokens[1] = n_vocab; }},
      {"token of row 0", [&](stage::Batch& b) { b.tokens[0] = -1; }},
      {"token of row 0", [&](stage::Batch& b) { b.tokens[0] = std::numeric_limits<int32_t>::min(); }},
      {"slot of row 1", [&](stage::Batch& b) { b.slots[1] = cache_.max_slots; }},
      {"slot of row 0", [&](stage::Batch& b) { b.slots[0] = ~0u; }},
      {"position of row 0", [&](stage::Batch& b) { b.positions[0] = {-1, -1, -1, -1}; }},
      {"position of row 1", [&](stage::Batch& b) { b.positions[1] = {1 << 30, 1 << 30, 1 << 30, 1 << 30}; }},
      {"position of row 1", [&](stage::Batch& b) { b.positions[1][2] = -5; }},
      {"position of row 1", [&](stage::Batch& b) { b.positions[1] = b.positions[0]; }},
      {"visible range of row 0", [&](stage::Batch& b) { b.visible[0].from = -1; }},
      {"visible range of row 0", [&](stage::Batch& b) { b.visible[0] = {0, 0}; }},
      {"visible range of row 0", [&](stage::Batch& b) { b.visible[0].from = std::numeric_limits<int32_t>::max(); }},
      {"no block for tokens",
       [&](stage::Batch& b) {
         for (uint32_t group = 0; group < n_groups; ++group) b.visible[group].to = std::numeric_limits<int32_t>::max();
       }},
      {"no block for tokens", [&](stage::Batch& b) { b.kv_ops.clear(); }},
      {"no block for tokens",
       [&](stage::Batch& b) {
         b.positions[1] = {5000, 5000, 5000, 5000};
         for (uint32_t group = 0; group < n_groups; ++group) b.visible[n_groups + group] = {5000, 5001};
       }},
      {"block of KV", op(KvOp::Kind::append, 0, 0, cache_.n_blocks[0], 0, 0)},
      {"group of KV", op(KvOp::Kind::append, n_groups, 0, 0, 0, 0)},
      {"slot of KV", op(KvOp::Kind::append, 0, cache_.max_slots, 0, 0, 0)},
      {"block of KV", op(KvOp::Kind::copy_block, 0, 0, ~0u, 0, 0)},
      {"source of KV", op(KvOp::Kind::copy_block, 0, 0, 0, cache_.n_blocks[0], 0)},
      {"group of KV", op(KvOp::Kind::copy_block, ~0u, 0, 0, 0, 0)},
      {"source of KV", op(KvOp::Kind::fork, 0, 0, 0, cache_.max_slots, 1)},
      {"n_tokens of KV", op(KvOp::Kind::truncate, 0, 0, 0, 0, ~0u)},
      {"group of KV", op(KvOp::Kind::drop_front, n_groups, 0, 0, 0, 16)},
      {"slot of KV", op(KvOp::Kind::free, 0, ~0u, 0, 0, 0)},
      {"row of output 0", [&](stage::Batch& b) { b.outputs[0].row = 2; }},
      {"row of output 1", [&](stage::Batch& b) { b.outputs[1].row = 0; }},
      {"top_k", [&](stage::Batch& b) { b.outputs[0] = {0, stage::OutputKind::candidates, n_vocab_ + 1, {}}; }},
      {"named id", [&](stage::Batch& b) { b.outputs[0] = {0, stage::OutputKind::candidates, 1, {n_vocab}}; }},
      {"named id", [&](stage::Batch& b) { b.outputs[0] = {0, stage::OutputKind::candidates, 1, {-1}}; }},
      {"rows", [&](stage::Batch& b) { b = good_batch(cache_.max_rows + 1); }},
      {"visible ranges", [&](stage::Batch& b) { b.visible.insert(b.visible.end(), 2, {0, 1}); }},
      {"ancestor", [&](stage::Batch& b) { b.ancestors = {~uint64_t{0}}; }},
      {"adapters", [&](stage::Batch& b) { b.adapters = {1, 2}; }},
  };
  for (const auto& [reason, change] : cases) {
    stage::Batch batch = good_batch();
    change(batch);
    const std::string name = reason + ", case " + std::to_string(&reason - &cases.front().first);
    const Answer answer = hostile->answer_to(kFrontStage, batch);
    EXPECT_FALSE(answer.is_cut) << name;
    EXPECT_NE(answer.error.find(reason), std::string::npos) << name << ": " << answer.error;
    expect_unharmed(name);
    // Tables are what they were before, or can be made so.
    stage::Batch empty;
    empty.kv_ops.push_back({KvOp::Kind::free, 0, 0, 0, 0, 0});
    EXPECT_EQ(hostile->answer_to(kFrontStage, empty).error, "") << name;
  }
  EXPECT_EQ(hostile->answer_to(kFrontStage, good_batch()).error, "") << "the stage itself is unharmed";
}

TEST_P(HostileBatches, WithRowsThatAreNoNumbersComputeSomething) {
  const auto hostile = connect();
  stage::Batch batch = good_batch();
  batch.outputs = {{0, stage::OutputKind::logits, 0, {}}, {1, stage::OutputKind::candidates, n_vocab_, {0}}};
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::max()}) {
    const std::vector<float> rows(size_t{2} * n_embd_, value);
    EXPECT_FALSE(hostile->answer_to(kBackStage, batch, rows).is_cut) << value;
    expect_unharmed("rows of " + std::to_string(value));
    batch.kv_ops = {{KvOp::Kind::free, 0, 0, 0, 0, 0}};
    const auto fresh = good_batch().kv_ops;
    batch.kv_ops.insert(batch.kv_ops.end(), fresh.begin(), fresh.end());
  }
}

TEST_P(HostileBatches, ThatLieAboutTheirSizesEndTheirConnection) {
  const std::string good = bytes_of(good_batch());
  const auto whole = [](std::string payload) { return std::pair(payload, static_cast<uint32_t>(payload.size())); };
  const std::string many("\xff\xff\xff\xff\x0f", 5);  // 2^32 - 1
  // Up to the number of rows: flags and groups.
  const std::string begin = good.substr(0, 2);
  // A batch without rows, up to its KV operations.
  const std::string no_rows("\0\0\0", 3);
  const std::string row_floats(size_t{n_embd_} * sizeof(float), '\0');
  struct Case {
    std::string name;
    uint32_t stage;
    std::pair<std::string, uint32_t> payload;  // and batch_bytes
  };
  const std::vector<Case> cases = {
      {"no bytes", kFrontStage, whole("")},
      {"more rows than bytes", kFrontStage, whole(begin + many + good.substr(3))},
      {"rows beyond any limit", kFrontStage, whole(begin + "\x81\x80\x04" + std::string(1 << 20, '\0'))},
      {"255 cache groups", kFrontStage, whole(good.substr(0, 1) + "\xff" + good.substr(2))},
      {"unknown flags", kFrontStage, whole("\xff" + good.substr(1))},
      {"ancestors that are not there", kFrontStage, whole("\x02" + good.substr(1))},
      {"many KV operations", kFrontStage, whole(no_rows + many)},
      {"a KV operation of no kind", kFrontStage, whole(no_rows + std::string("\1\7\0\0\0\0\0\0", 8))},
      {"many outputs", kFrontStage, whole(no_rows + std::string(1, '\0') + many)},
      {"many named ids", kFrontStage, whole(no_rows + std::string("\0\1\0\3\1", 5) + many)},
      {"a number of 35 bits", kFrontStage, whole(begin + "\xff\xff\xff\xff\x7f" + good.substr(3))},
      {"a number without an end", kFrontStage, whole(begin + std::string(100, '\xff'))},
      {"bytes after the end", kFrontStage, whole(good + "x")},
      {"half a batch", kFrontStage, whole(good.substr(0, good.size() / 2))},
      {"a batch longer than its frame", kFrontStage, {good, static_cast<uint32_t>(good.size()) + 1}},
      {"a batch of four gigabytes", kFrontStage, {good, ~0u}},
      {"hidden rows for the stage that embeds", kFrontStage, {good + row_floats, static_cast<uint32_t>(good.size())}},
      {"no hidden rows", kBackStage, whole(good)},
      {"a hidden row too few", kBackStage, {good + row_floats, static_cast<uint32_t>(good.size())}},
      {"hidden rows that are longer",
       kBackStage,
       {good + row_floats + row_floats + "1234", static_cast<uint32_t>(good.size())}},
      {"half a value", kBackStage, {good + row_floats + row_floats + "12", static_cast<uint32_t>(good.size())}},
      {"more than any batch of the stage has",
       kBackStage,
       {good + std::string((16 << 20) + (1 << 20), '\0'), static_cast<uint32_t>(good.size())}},
  };
  for (const Case& c : cases) {
    const auto hostile = connect();
    const Answer answer = hostile->answer_to(c.stage, c.payload.first, c.payload.second);
    EXPECT_TRUE(answer.is_cut) << c.name << ": " << answer.error;
    expect_unharmed(c.name);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, HostileBatches, ::testing::Values(TinyKind::llama, TinyKind::gemma2));

}  // namespace
}  // namespace caravan::remote
