// The buffer planner.
#include "graph/buffers.h"

#include <gtest/gtest.h>

#include <random>

#include "graph/builder.h"

namespace caravan::graph {
namespace {

TEST(PlanBuffers, KeepsOverlappingLifetimesApart) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<BufferUse> uses(random() % 40 + 1);
    for (BufferUse& use : uses) {
      use.size_bytes = random() % 1000;
      use.first = static_cast<int>(random() % 20);
      use.last = use.first + static_cast<int>(random() % 6);
    }
    const BufferPlan plan = plan_buffers(uses, 64);
    for (size_t i = 0; i < uses.size(); ++i) {
      EXPECT_EQ(plan.offsets[i] % 64, 0U);
      EXPECT_LE(plan.offsets[i] + uses[i].size_bytes, plan.size_bytes);
      for (size_t j = 0; j < i; ++j) {
        if (uses[i].last < uses[j].first || uses[j].last < uses[i].first) continue;
        EXPECT_TRUE(plan.offsets[i] + uses[i].size_bytes <= plan.offsets[j] ||
                    plan.offsets[j] + uses[j].size_bytes <= plan.offsets[i])
            << "round " << round << ", uses " << i << " and " << j;
      }
    }
  }
}

TEST(PlanBuffers, ReusesBytesAfterTheLastUse) {
  const std::vector<BufferUse> chain{{640, 0, 1}, {640, 1, 2}, {640, 2, 3}, {640, 3, 4}};
  EXPECT_EQ(plan_buffers(chain).size_bytes, 1280U);
}

struct Fixture {
  TensorMap tensors;
  Builder b{tensors};
};

TEST(AssignBuffers, LetsElementWiseOpsOverwriteWhatNobodyReadsLater) {
  Fixture f;
  const ValueId x = f.b.hidden(64);
  const ValueId a = f.b.silu(x);      // the input is not ours to overwrite
  const ValueId c = f.b.scale(a, 2);  // a is read once more
  const ValueId d = f.b.relu(f.b.add(c, a));
  f.b.output("d", d);
  const Graph graph = f.b.finish();
  const ValueBuffers buffers = assign_buffers(graph, {8, 1, 1, 1});
  const auto buffer = [&](ValueId id) { return buffers.buffer[static_cast<size_t>(id)]; };
  EXPECT_EQ(buffer(x), -1);
  EXPECT_NE(buffer(a), buffer(c));
  EXPECT_EQ(buffer(c), buffer(d));
  EXPECT_EQ(buffers.uses.size(), 2U);
  EXPECT_EQ(buffers.uses[0].size_bytes, 64U * 8 * 4);
  EXPECT_EQ(buffers.uses[static_cast<size_t>(buffer(d))].last, static_cast<int>(graph.nodes.size()));
}

TEST(AssignBuffers, SharesStorageAmongViewsAndKeepsItForTheirReaders) {
  Fixture f;
  const ValueId a = f.b.silu(f.b.hidden(64));
  const ValueId half = f.b.slice(a, 0, 32, 32);
  const ValueId c = f.b.scale(a, 2);  // may not overwrite a: half is read below
  const ValueId d = f.b.cont(half);
  f.b.output("c", c);
  f.b.output("d", d);
  const ValueBuffers buffers = assign_buffers(f.b.finish(), {8, 1, 1, 1});
  const auto buffer = [&](ValueId id) { return buffers.buffer[static_cast<size_t>(id)]; };
  EXPECT_EQ(buffer(half), buffer(a));
  EXPECT_NE(buffer(c), buffer(a));
  EXPECT_EQ(buffers.storage[static_cast<size_t>(half)], a);
}

TEST(AssignBuffers, DoesNotOverwriteAnOperandThatIsAlsoReadThroughAnotherView) {
  Fixture f;
  const ValueId a = f.b.silu(f.b.reshape(f.b.hidden(64), {8, 8, kRows}));
  const ValueId sum = f.b.add(a, f.b.permute(a, 1, 0, 2, 3));
  f.b.output("sum", sum);
  const ValueBuffers buffers = assign_buffers(f.b.finish(), {8, 1, 1, 1});
  EXPECT_NE(buffers.buffer[static_cast<size_t>(sum)], buffers.buffer[static_cast<size_t>(a)]);
}

}  // namespace
}  // namespace caravan::graph
