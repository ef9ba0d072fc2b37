// Payloads of the wire: round trips, truncation at every byte, flipped bits, counts that lie.
#include "remote/codec.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "fake_host.h"

namespace caravan::remote {
namespace {

using testing::FakeModel;

stage::Batch random_batch(std::mt19937& random) {
  const auto pick = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  stage::Batch batch;
  const uint32_t n_rows = pick(6), n_groups = 1 + pick(3);
  const bool multi_axis = pick(2) == 1;
  for (uint32_t i = 0; i < n_rows; ++i) {
    batch.tokens.push_back(static_cast<int32_t>(random()));
    const auto p = static_cast<int32_t>(pick(1000));
    batch.positions.push_back({p, p + static_cast<int32_t>(multi_axis), p, p});
    batch.slots.push_back(pick(8));
    for (uint32_t g = 0; g < n_groups; ++g) batch.visible.push_back({static_cast<int32_t>(pick(9)), p});
    if (pick(2) == 1) {
      stage::OutputRequest request{i, static_cast<stage::OutputKind>(pick(4)), 0, {}};
      if (request.kind == stage::OutputKind::candidates) {
        request.top_k = pick(40);
        for (uint32_t k = pick(4); k > 0; --k) request.named_ids.push_back(static_cast<int32_t>(pick(100)));
      }
      batch.outputs.push_back(request);
    }
  }
  if (n_rows > 0 && pick(3) == 0) batch.ancestors.assign((n_rows * n_rows + 63) / 64, random());
  if (pick(3) == 0) batch.adapters.assign(n_rows, 7);
  for (uint32_t i = pick(4); i > 0; --i)
    batch.kv_ops.push_back({static_cast<stage::KvOp::Kind>(pick(6)), pick(3), pick(8), pick(99), pick(99), pick(999)});
  return batch;
}

std::vector<std::byte> encoded(const stage::Batch& batch) {
  ByteWriter writer;
  encode_batch(writer, batch);
  return writer.release();
}

TEST(BatchCodec, SurvivesARoundTrip) {
  std::mt19937 random(20);
  for (int i = 0; i < 300; ++i) {
    const stage::Batch batch = random_batch(random);
    EXPECT_EQ(decode_batch(encoded(batch)), batch) << "batch " << i;
  }
}

TEST(BatchCodec, RefusesEveryTruncation) {
  std::mt19937 random(21);
  for (int i = 0; i < 50; ++i) {
    const auto bytes = encoded(random_batch(random));
    for (size_t size = 0; size < bytes.size(); ++size)
      EXPECT_THROW(decode_batch(std::span(bytes.data(), size)), FormatError) << size;
  }
}

TEST(BatchCodec, NeverCrashesOnFlippedBits) {
  std::mt19937 random(22);
  size_t n_refused = 0;
  for (int i = 0; i < 20; ++i) {
    auto bytes = encoded(random_batch(random));
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
      try {
        decode_batch(bytes);
      } catch (const FormatError&) {
        ++n_refused;
      }
      bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    }
  }
  EXPECT_GT(n_refused, 1000u);
}

TEST(BatchCodec, RefusesCountsThatDoNotFitBeforeItAllocates) {
  const auto refusal_of = [](std::initializer_list<int> bytes) {
    ByteWriter writer;
    for (const int byte : bytes) writer.write(static_cast<uint8_t>(byte));
    try {
      decode_batch(writer.data());
    } catch (const FormatError& error) {
      return std::string(error.what());
    }
    return std::string("taken");
  };
  EXPECT_NE(refusal_of({0, 255, 0xff, 0xff, 0xff, 0xff, 0x0f}).find("4294967295 rows do not fit"), std::string::npos);
  EXPECT_NE(refusal_of({0, 1, 0xff, 0xff, 0xff, 0xff, 0x1f}).find("more than 32 bits"), std::string::npos);
  EXPECT_NE(refusal_of({0, 255, 1, 5, 0, 0, 0, 0}).find("visible ranges do not fit"), std::string::npos);
  EXPECT_NE(refusal_of({0, 0, 0, 0xff, 0xff, 0x03, 0, 0}).find("KV operations do not fit"), std::string::npos);
  EXPECT_NE(refusal_of({0, 0, 0, 0, 9, 0, 0}).find("9 outputs do not fit"), std::string::npos);
  EXPECT_EQ(refusal_of({0, 0, 0, 0, 0}), "taken");
}

TEST(BatchCodec, RefusesMoreRowsThanAnyStageTakes) {
  std::vector<std::byte> bytes(1 << 20);
  bytes[2] = std::byte{0x81};  // 65537 rows
  bytes[3] = std::byte{0x80};
  bytes[4] = std::byte{0x04};
  EXPECT_THROW(decode_batch(bytes), FormatError);
}

TEST(ManifestCodec, SurvivesARoundTripAndRefusesEveryTruncation) {
  const FakeModel model(weights::kChunkBytes + 8);
  ByteWriter writer;
  encode_manifest(writer, model.request.manifest);
  const auto decoded = decode_manifest(writer.data());
  ASSERT_EQ(decoded.tensors.size(), 1u);
  EXPECT_EQ(decoded.tensors[0].name, "blk.0.weight");
  EXPECT_EQ(decoded.tensors[0].chunks, model.request.manifest.tensors[0].chunks);
  for (size_t size = 0; size < writer.data().size(); ++size)
    EXPECT_THROW(decode_manifest(std::span(writer.data().data(), size)), FormatError) << size;
}

TEST(ManifestCodec, RefusesASizeThatDoesNotFollowFromTypeAndShape) {
  FakeModel model(64);
  model.request.manifest.tensors[0].ne[0] = 15;
  ByteWriter writer;
  encode_manifest(writer, model.request.manifest);
  EXPECT_THROW(decode_manifest(writer.data()), FormatError);
}

TEST(ManifestCodec, RefusesATensorSizeThatIsNotThere) {
  ByteWriter writer;
  writer.write(uint32_t{1});
  writer.write(uint32_t{1});
  writer.write_string("x");
  writer.write(uint32_t{0});
  for (int i = 0; i < 4; ++i) writer.write(int64_t{1});
  writer.write(~uint64_t{0});
  EXPECT_THROW(decode_manifest(writer.data()), FormatError);
}

TEST(LoadCodec, SurvivesARoundTripAndKeepsTheContentKey) {
  FakeModel model(64);
  model.request.slice = {3, 9, false, true};
  model.request.cache.n_blocks = {7, 0, 5};
  model.request.cache.v_type = tensor::DType::q8_0;
  const EncodedLoad encoded_load = encode_load(model.request, 5, 1);
  EXPECT_EQ(encoded_load.header.stage(), 5u);
  EXPECT_EQ(encoded_load.header.device(), 1u);
  const auto decoded = decode_load(encoded_load.header, encoded_load.payload, "peer");
  EXPECT_EQ(decoded.slice, model.request.slice);
  EXPECT_EQ(decoded.cache, model.request.cache);
  EXPECT_EQ(decoded.hyperparameters.get_string("general.architecture"), "llama");
  EXPECT_EQ(stage::content_key(decoded), stage::content_key(model.request));
}

TEST(LoadCodec, RefusesTruncatedPayloadsAndAbsurdConfigurations) {
  FakeModel model(64);
  const EncodedLoad good = encode_load(model.request, 1, 0);
  for (size_t size = 0; size < good.payload.size(); ++size)
    EXPECT_THROW(decode_load(good.header, std::span(good.payload.data(), size), "peer"), Error) << size;
  const auto refuses = [&](auto change) {
    pb::LoadSlice header = good.header;
    change(header);
    EXPECT_THROW(decode_load(header, good.payload, "peer"), Error);
  };
  refuses([](pb::LoadSlice& h) { h.set_metadata_bytes(~uint64_t{0}); });
  refuses([](pb::LoadSlice& h) { h.set_n_metadata(1u << 31); });
  refuses([](pb::LoadSlice& h) { h.mutable_slice()->set_layer_begin(10); });
  refuses([](pb::LoadSlice& h) { h.mutable_cache()->set_k_type(12345); });
  refuses([](pb::LoadSlice& h) { h.mutable_cache()->set_block_tokens(0); });
  refuses([](pb::LoadSlice& h) { h.mutable_cache()->set_max_rows(1u << 31); });
  refuses([](pb::LoadSlice& h) { h.mutable_cache()->set_max_slots(0); });
  refuses([](pb::LoadSlice& h) {
    for (int i = 0; i < 100; ++i) h.mutable_cache()->add_n_blocks(1);
  });
}

TEST(LoadCodec, NamesOtherBackendsAndRefusesThoseThatCannotBeMeant) {
  std::vector<PeerAddress> peers;
  for (uint32_t i = 0; i < kMaxWeightPeers + 4; ++i) peers.push_back({fmt::format("10.0.0.{}:50052", i), "an id"});
  peers[1].backend_id.clear();
  peers[2].endpoint.assign(10000, 'x');
  pb::LoadSlice header;
  encode_peers(header, peers);
  const std::vector<PeerAddress> decoded = decode_peers(header);
  ASSERT_EQ(decoded.size(), kMaxWeightPeers);
  EXPECT_EQ(decoded[0], peers[0]);
  EXPECT_EQ(decoded[1], peers[3]);
  EXPECT_LE(header.ByteSizeLong(), find_message(static_cast<uint16_t>(MessageType::load_slice))->max_header_bytes);
  const auto refuses = [&](auto change) {
    pb::LoadSlice changed = header;
    change(changed);
    EXPECT_THROW(decode_peers(changed), ProtocolError);
  };
  refuses([](pb::LoadSlice& h) { h.add_peers()->set_backend_id("one too many"); });
  refuses([](pb::LoadSlice& h) { h.mutable_peers(0)->clear_backend_id(); });
  refuses([](pb::LoadSlice& h) { h.mutable_peers(0)->set_backend_id(std::string(65, 'x')); });
  refuses([](pb::LoadSlice& h) { h.mutable_peers(0)->set_endpoint(std::string(301, 'x')); });
}

TEST(BitCodec, SurvivesARoundTripAndRefusesAnotherNumberOfBytes) {
  for (size_t n = 0; n <= 17; ++n) {
    std::vector<bool> bits(n);
    for (size_t i = 0; i < n; ++i) bits[i] = i % 3 == 0;
    const std::string bytes = encode_bits(bits);
    EXPECT_EQ(decode_bits(bytes, n), bits);
    EXPECT_THROW(decode_bits(bytes + "x", n), ProtocolError);
    EXPECT_THROW(decode_bits(bytes, n + 8), ProtocolError);
  }
  EXPECT_EQ(encode_bits({true, false, false, true}), "\x09");
}

TEST(OutputCodec, SurvivesARoundTripOfEveryKind) {
  stage::Batch batch = testing::simple_batch(4);
  batch.outputs = {{0, stage::OutputKind::hidden, 0, {}},
                   {1, stage::OutputKind::logits, 0, {}},
                   {2, stage::OutputKind::candidates, 3, {5, 6}},
                   {3, stage::OutputKind::none, 0, {}}};
  const OutputShape shape{2, 8, true};
  stage::StageOutput output;
  output.outputs = {{0, stage::OutputKind::hidden, {1, 2}, {}, 0},
                    {1, stage::OutputKind::logits, {0, 1, 2, 3, 4, 5, 6, 7}, {}, 0},
                    {2, stage::OutputKind::candidates, {9, 8, 7, 5, 6}, {3, 1, 2}, 1.5f},
                    {3, stage::OutputKind::none, {}, {}, 0}};
  const auto payload = encode_output(output);
  EXPECT_EQ(payload.size(), output_bytes(batch, shape));
  stage::StageOutput decoded;
  decode_output(payload, batch, shape, decoded);
  ASSERT_EQ(decoded.outputs.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(decoded.outputs[i].row, output.outputs[i].row);
    EXPECT_EQ(decoded.outputs[i].values, output.outputs[i].values);
    EXPECT_EQ(decoded.outputs[i].ids, output.outputs[i].ids);
    EXPECT_EQ(decoded.outputs[i].log_sum_exp, output.outputs[i].log_sum_exp);
  }
  for (size_t size = 0; size < payload.size(); ++size) {
    stage::StageOutput none;
    EXPECT_THROW(decode_output(std::span(payload.data(), size), batch, shape, none), ProtocolError);
  }
}

TEST(OutputCodec, RefusesACandidateOutsideTheVocabulary) {
  stage::Batch batch = testing::simple_batch(1);
  batch.outputs = {{0, stage::OutputKind::candidates, 1, {}}};
  stage::StageOutput output;
  output.outputs = {{0, stage::OutputKind::candidates, {1}, {8}, 0}};
  stage::StageOutput decoded;
  EXPECT_THROW(decode_output(encode_output(output), batch, {2, 8, true}, decoded), ProtocolError);
}

}  // namespace
}  // namespace caravan::remote
