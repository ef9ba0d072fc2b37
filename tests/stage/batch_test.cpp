#include "stage/batch.h"

#include <gtest/gtest.h>

#include <functional>

#include "base/error.h"

namespace caravan::stage {
namespace {

BatchLimits limits() {
  BatchLimits l;
  l.max_rows = 4;
  l.max_outputs = 2;
  l.max_slots = 3;
  l.n_vocab = 10;
  l.block_tokens = 16;
  l.n_blocks = {8, 4};
  return l;
}

// Two rows of slot 1 at positions 5 and 6, one of slot 0 at position 0.
Batch good_batch() {
  Batch b;
  b.tokens = {1, 2, 3};
  b.positions = {{5, 5, 5, 5}, {6, 6, 6, 6}, {0, 0, 0, 0}};
  b.slots = {1, 1, 0};
  b.visible = {{0, 6}, {2, 6}, {0, 7}, {3, 7}, {0, 1}, {0, 1}};
  b.outputs = {{1, OutputKind::candidates, 4, {0, 9}}, {2, OutputKind::logits, 0, {}}};
  b.kv_ops = {{KvOp::Kind::append, 1, 0, 3, 0, 0},      {KvOp::Kind::copy_block, 0, 0, 7, 6, 0},
              {KvOp::Kind::fork, 0, 2, 0, 1, 5},        {KvOp::Kind::truncate, 0, 2, 0, 0, 3},
              {KvOp::Kind::drop_front, 1, 1, 0, 0, 16}, {KvOp::Kind::free, 0, 2, 0, 0, 0}};
  return b;
}

TEST(ValidateBatch, AcceptsWhatFitsTheLimits) {
  EXPECT_NO_THROW(validate(good_batch(), limits()));
  EXPECT_NO_THROW(validate(Batch{}, limits()));
}

struct BadBatch {
  const char* says;
  std::function<void(Batch&)> change;
};

TEST(ValidateBatch, NamesTheFieldThatDoesNotFit) {
  const BadBatch cases[] = {
      {"rows", [](Batch& b) { b.tokens.resize(5); }},
      {"positions", [](Batch& b) { b.positions.pop_back(); }},
      {"slots", [](Batch& b) { b.slots.push_back(0); }},
      {"visible ranges", [](Batch& b) { b.visible.pop_back(); }},
      {"token of row 1", [](Batch& b) { b.tokens[1] = 10; }},
      {"token of row 1", [](Batch& b) { b.tokens[1] = -1; }},
      {"slot of row 2", [](Batch& b) { b.slots[2] = 3; }},
      {"position of row 2", [](Batch& b) { b.positions[2][0] = -1; }},
      {"position of row 2", [](Batch& b) { b.positions[2][3] = 1 << 30; }},
      {"position of row 1", [](Batch& b) { b.positions[1][0] = 5; }},
      {"visible range of row 0 in group 1", [](Batch& b) { b.visible[1] = {6, 6}; }},
      {"visible range of row 0 in group 1", [](Batch& b) { b.visible[1] = {0, 5}; }},
      {"visible range of row 1 in group 0", [](Batch& b) { b.visible[2] = {-1, 7}; }},
      {"outputs", [](Batch& b) { b.outputs.insert(b.outputs.begin(), OutputRequest{}); }},
      {"row of output 1", [](Batch& b) { b.outputs[1].row = 3; }},
      {"row of output 1", [](Batch& b) { b.outputs[1].row = 1; }},
      {"kind of output 0", [](Batch& b) { b.outputs[0].kind = static_cast<OutputKind>(9); }},
      {"top_k of output 0", [](Batch& b) { b.outputs[0].top_k = 11; }},
      {"named id of output 0", [](Batch& b) { b.outputs[0].named_ids[0] = 10; }},
      {"named ids of output 0", [](Batch& b) { b.outputs[0].named_ids.assign(11, 0); }},
      {"group of KV operation 0", [](Batch& b) { b.kv_ops[0].group = 2; }},
      {"block of KV operation 0", [](Batch& b) { b.kv_ops[0].block = 4; }},
      {"slot of KV operation 0", [](Batch& b) { b.kv_ops[0].slot = 3; }},
      {"block of KV operation 1", [](Batch& b) { b.kv_ops[1].block = 8; }},
      {"source of KV operation 1", [](Batch& b) { b.kv_ops[1].source = 8; }},
      {"source of KV operation 2", [](Batch& b) { b.kv_ops[2].source = 3; }},
      {"n_tokens of KV operation 3", [](Batch& b) { b.kv_ops[3].n_tokens = UINT32_MAX; }},
      {"group of KV operation 4", [](Batch& b) { b.kv_ops[4].group = 2; }},
      {"kind of KV operation 5", [](Batch& b) { b.kv_ops[5].kind = static_cast<KvOp::Kind>(77); }},
  };
  for (const BadBatch& bad : cases) {
    Batch batch = good_batch();
    bad.change(batch);
    try {
      validate(batch, limits());
      ADD_FAILURE() << bad.says << ": nothing was thrown";
    } catch (const ProtocolError& error) {
      EXPECT_NE(std::string(error.what()).find(bad.says), std::string::npos) << bad.says << ": " << error.what();
    }
  }
}

TEST(ValidateBatch, RefusesWhatIsNotSupported) {
  Batch batch = good_batch();
  batch.ancestors = {0};
  EXPECT_THROW(validate(batch, limits()), NotSupportedError);
  batch = good_batch();
  batch.adapters = {0};
  EXPECT_THROW(validate(batch, limits()), NotSupportedError);
}

TEST(ValidateBatch, WantsEncoderRowsToSeeExactlyTheirOwnSlot) {
  BatchLimits l = limits();
  l.n_blocks = {0};
  Batch batch = good_batch();
  batch.kv_ops.clear();
  batch.visible = {{0, 2}, {0, 2}, {2, 3}};
  EXPECT_NO_THROW(validate(batch, l));
  batch.visible[1] = {1, 2};
  EXPECT_THROW(validate(batch, l), ProtocolError);
  batch.visible[1] = {0, 3};
  EXPECT_THROW(validate(batch, l), ProtocolError);
  batch.visible = {{0, 1}, {1, 2}, {2, 3}};
  batch.slots = {1, 0, 1};
  batch.positions[2] = {7, 7, 7, 7};
  EXPECT_THROW(validate(batch, l), ProtocolError);  // slot 1 in two places
}

}  // namespace
}  // namespace caravan::stage
