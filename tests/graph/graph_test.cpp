// Builder, shape inference, validation and dumps.
#include "graph/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "graph/builder.h"

namespace caravan::graph {
namespace {

using tensor::DType;
using ::testing::HasSubstr;

const TensorMap kTensors{
    {"token_embd.weight", {DType::q4_0, {64, 100, 1, 1}}}, {"norm.weight", {DType::f32, {64, 1, 1, 1}}},
    {"wide.weight", {DType::f16, {64, 96, 1, 1}}},         {"experts.weight", {DType::f16, {64, 32, 4, 1}}},
    {"down.weight", {DType::f16, {32, 64, 4, 1}}},         {"odd.weight", {DType::i32, {256, 4, 1, 1}}},
    {"factors.weight", {DType::f32, {8, 1, 1, 1}}},
};

template <typename Function>
std::string format_error(Function&& function) {
  try {
    function();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Builder, NamesTheMissingTensorAndItsShape) {
  Builder b(kTensors);
  EXPECT_EQ(format_error([&] { b.matrix("blk.0.attn_q.weight", {64, 32}); }),
            "tensor 'blk.0.attn_q.weight' is missing; expected with shape [64, 32]");
}

TEST(Builder, NamesExpectedAndFoundShapeOfATensor) {
  Builder b(kTensors);
  EXPECT_EQ(format_error([&] { b.matrix("wide.weight", {64, 97}); }),
            "tensor 'wide.weight': expected shape [64, 97], found [64, 96]");
}

TEST(Builder, RefusesATypeThatCannotBeDequantised) {
  Builder b(kTensors);
  EXPECT_THROW(b.matrix("odd.weight", {256, 4}), NotSupportedError);
}

TEST(Builder, GivesOneValuePerTensorAndRole) {
  Builder b(kTensors);
  const ValueId embedding = b.embedding("token_embd.weight", {64, 100});
  EXPECT_EQ(embedding, b.embedding("token_embd.weight", {64, 100}));
  EXPECT_NE(embedding, b.matrix("token_embd.weight", {64, 100}));
  EXPECT_EQ(b.tokens(), b.tokens());
  EXPECT_EQ(b.optional_vector("absent.bias", {64}), kNoValue);
}

TEST(Builder, InfersTheShapesOfALayer) {
  Builder b(kTensors);
  const ValueId x = b.get_rows(b.embedding("token_embd.weight", {64, 100}), b.tokens());
  EXPECT_EQ(to_string(b.type(x).ne), "[64, rows]");
  const ValueId h = b.rms_norm(x, b.vector("norm.weight", {64}), 1e-5F);
  const ValueId qkv = b.mul_mat(b.matrix("wide.weight", {64, 96}), h);
  EXPECT_EQ(to_string(b.type(qkv).ne), "[96, rows]");
  const ValueId q = b.reshape(b.slice(qkv, 0, 0, 64), {16, 4, kRows});
  const ValueId k = b.reshape(b.slice(qkv, 0, 64, 16), {16, 1, kRows});
  const ValueId v = b.reshape(b.slice(qkv, 0, 80, 16), {16, 1, kRows});
  const ValueId attention = b.paged_attention(q, k, v, {});
  EXPECT_EQ(to_string(b.type(attention).ne), "[64, rows]");
  EXPECT_EQ(to_string(b.type(b.permute(q, 0, 2, 1, 3)).ne), "[16, rows, 4]");
  EXPECT_EQ(to_string(b.type(b.top_k(x, 3)).ne), "[3, rows]");
  EXPECT_EQ(b.type(b.top_k(x, 3)).element, Element::i32);
  EXPECT_EQ(to_string(b.type(b.sum_rows(x)).ne), "[1, rows]");
  EXPECT_EQ(to_string(b.type(b.concat(x, qkv, 0)).ne), "[160, rows]");
  EXPECT_EQ(to_string(b.type(b.select_output_rows(x)).ne), "[64, output_rows]");
  const ValueId logits = b.slice(x, 0, 0, 4);
  EXPECT_EQ(to_string(b.type(b.mul_mat_id(b.matrix("experts.weight", {64, 32, 4}), b.reshape(x, {64, 1, kRows}),
                                          b.top_k(logits, 2)))
                          .ne),
            "[32, 2, rows]");
}

TEST(Builder, RefusesOperandsThatDoNotFit) {
  Builder b(kTensors);
  const ValueId x = b.hidden(64);
  const ValueId wide = b.matrix("wide.weight", {64, 96});
  const ValueId norm = b.vector("norm.weight", {64});
  const ValueId y = b.mul_mat(wide, x);
  const ValueId heads = b.reshape(x, {16, 4, kRows});
  struct Case {
    std::string_view expected;
    std::function<void()> build;
  };
  const std::vector<Case> cases{
      {"row lengths differ", [&] { b.mul_mat(wide, y); }},
      {"does not repeat", [&] { b.add(x, y); }},
      {"does not repeat", [&] { b.add(norm, x); }},
      {"weight: expected [96], found [64]", [&] { b.rms_norm(y, norm, 1e-5F); }},
      {"eps", [&] { b.rms_norm(x, norm, -1); }},
      {"has not as many elements", [&] { b.reshape(x, {32, kRows}); }},
      {"has not as many elements", [&] { b.reshape(x, {64, kOutputRows}); }},
      {"no dimension can be", [&] { b.reshape(x, {64, 0, kRows}); }},
      {"is not within", [&] { b.slice(x, 0, 60, 5); }},
      {"fixed length", [&] { b.slice(x, 1, 0, 1); }},
      {"name every dimension once", [&] { b.permute(x, 0, 0, 1, 2); }},
      {"n_rot", [&] { b.rope(heads, b.positions(), {.n_rot = 18}); }},
      {"n_rot", [&] { b.rope(heads, b.positions(), {.n_rot = 3}); }},
      {"frequency factors", [&] { b.rope(heads, b.positions(), {.n_rot = 8}, b.vector("factors.weight", {8})); }},
      {"YaRN", [&] { b.rope(heads, b.positions(), {.n_rot = 16, .ext_factor = 1}); }},
      {"temperature", [&] { b.rope(heads, b.positions(), {.n_rot = 16, .temperature_scale = 1}); }},
      {"positions must be i32", [&] { b.rope(heads, norm, {.n_rot = 16}); }},
      {"indices must be i32", [&] { b.get_rows(x, x); }},
      {"is not within 1..64", [&] { b.top_k(x, 65); }},
      {"no multiple",
       [&] { b.paged_attention(heads, b.reshape(y, {16, 6, kRows}), b.reshape(y, {16, 6, kRows}), {}); }},
      {"v: expected", [&] { b.paged_attention(heads, heads, b.reshape(y, {16, 6, kRows}), {}); }},
      {"up: expected", [&] { b.swiglu(x, y); }},
      {"takes 2 to 2 operands, found 1", [&] { b.node(Op::add, {x}); }},
      {"parameters of another op", [&] { b.node(Op::scale, {x}); }},
      {"operand 999 does not exist", [&] { b.node(Op::silu, {999}); }},
      {"role matrix cannot be operand 1 of add", [&] { b.add(x, wide); }},
      {"role embedding", [&] { b.add(x, b.embedding("token_embd.weight", {64, 100})); }},
      {"a weight of role vector cannot be operand 0 of mul_mat_id",
       [&] { b.mul_mat_id(norm, b.reshape(x, {64, 1, kRows}), b.reshape(b.tokens(), {1, kRows})); }},
      {"can only be read by get_rows", [&] { b.silu(b.cache({0, 0, CacheRef::Part::k}, 64)); }},
      {"is no cache", [&] { b.set_rows(x, x, b.tokens()); }},
      {"two shapes", [&] { b.hidden(65); }},
  };
  for (const Case& c : cases) EXPECT_THAT(format_error(c.build), HasSubstr(c.expected));
}

TEST(Builder, NamesOpAndOperandsInErrors) {
  Builder b(kTensors);
  const ValueId y = b.mul_mat(b.matrix("wide.weight", {64, 96}), b.hidden(64));
  EXPECT_EQ(format_error([&] { b.mul_mat(b.matrix("wide.weight", {64, 96}), y); }),
            "mul_mat(wide.weight [64, 96], %2 [96, rows]): row lengths differ: [64, 96] and [96, rows]");
}

Graph small_graph() {
  Builder b(kTensors);
  const ValueId hidden = b.hidden(64);  // operands one by one: their ids must not depend on the compiler
  const ValueId x = b.rms_norm(hidden, b.vector("norm.weight", {64}), 1e-5F);
  b.output("y", b.name(b.silu(b.mul_mat(b.matrix("wide.weight", {64, 96}), x)), "activated"));
  return b.finish();
}

TEST(Graph, DumpsOneLinePerNode) {
  EXPECT_EQ(dump(small_graph()),
            "%2 f32[64, rows] = rms_norm(hidden, norm.weight) {eps=1e-05}\n"
            "%4 f32[96, rows] = mul_mat(wide.weight, %2)\n"
            "%5 f32[96, rows] = silu(%4)  # activated\n"
            "output y = activated\n");
}

TEST(Validate, AcceptsWhatTheBuilderMakes) { EXPECT_NO_THROW(validate(small_graph())); }

TEST(Validate, FindsWhatIsWrongInAGraphFromElsewhere) {
  struct Case {
    std::string_view expected;
    std::function<void(Graph&)> damage;
  };
  const std::vector<Case> cases{
      {"used before it is defined",
       [](Graph& g) {
         std::swap(g.nodes[1], g.nodes[2]);
         std::swap(g.values[4].index, g.values[5].index);
       }},
      {"must come after its operands",
       [](Graph& g) {
         std::swap(g.values[4].index, g.values[5].index);
         g.nodes[1].output = g.nodes[2].inputs[0] = 5;
         g.nodes[2].output = 4;
       }},
      {"does not exist", [](Graph& g) { g.nodes[0].inputs[0] = -7; }},
      {"does not define it", [](Graph& g) { g.values[4].index = 17; }},
      {"does not define it", [](Graph& g) { g.nodes[1].output = 5; }},
      {"is declared f32[95, rows], expected f32[96, rows]", [](Graph& g) { g.values[4].type.ne[0] = 95; }},
      {"no op has number", [](Graph& g) { g.nodes[1].op = static_cast<Op>(1000); }},
      {"no weight 5", [](Graph& g) { g.values[1].index = 5; }},
      {"value has shape", [](Graph& g) { g.weights[0].ne[0] = 32; }},
      {"dimension -9", [](Graph& g) { g.values[0].type.ne[1] = -9; }},
      {"output 'y' is not", [](Graph& g) { g.outputs[0].value = 0; }},
      {"output 'y' is not", [](Graph& g) { g.outputs[0].value = 99; }},
      {"declared twice", [](Graph& g) { g.outputs.push_back(g.outputs[0]); }},
      {"parameters of another op", [](Graph& g) { g.nodes[0].params = NoParams{}; }},
  };
  for (const Case& c : cases) {
    Graph graph = small_graph();
    c.damage(graph);
    EXPECT_THAT(format_error([&] { validate(graph); }), HasSubstr(c.expected));
  }
}

TEST(OpTable, HasDistinctNames) {
  for (const OpInfo& a : all_ops())
    for (const OpInfo& b : all_ops()) EXPECT_TRUE(a.op == b.op || a.name != b.name) << a.name;
}

TEST(Lower, LeavesNoFusedOps) {
  Builder b(kTensors);
  const ValueId x = b.rms_norm(b.hidden(64), b.vector("norm.weight", {64}), 1e-5F);
  const ValueId heads = b.reshape(x, {16, 4, kRows});
  const ValueId attention = b.paged_attention(heads, heads, heads, {.scale = 0.25F, .softcap = 30});
  MoeParams moe;
  moe.n_expert_used = 2;
  const ValueId experts = b.matrix("experts.weight", {64, 32, 4});
  b.output("y", b.moe(attention, b.slice(x, 0, 0, 4), experts, experts, b.matrix("down.weight", {32, 64, 4}), moe));
  const Graph lowered = lower(b.finish());
  EXPECT_NO_THROW(validate(lowered));
  for (const Node& node : lowered.nodes) EXPECT_FALSE(op_info(node.op).is_fused) << op_name(node.op);
  EXPECT_EQ(to_string(lowered.type(lowered.outputs[0].value).ne), "[64, rows]");
}

}  // namespace
}  // namespace caravan::graph
