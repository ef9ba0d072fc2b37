#include "engine/block_allocator.h"

#include <gtest/gtest.h>

namespace caravan::engine {
namespace {

TEST(BlockAllocator, GivesEachBlockOnceAndThenNone) {
  BlockAllocator allocator(3);
  EXPECT_EQ(allocator.allocate(), 0u);
  EXPECT_EQ(allocator.allocate(), 1u);
  EXPECT_EQ(allocator.allocate(), 2u);
  EXPECT_EQ(allocator.allocate(), std::nullopt);
  allocator.release(1);
  EXPECT_EQ(allocator.n_free(), 1u);
  EXPECT_EQ(allocator.allocate(), 1u);
}

TEST(BlockAllocator, FreesASharedBlockWithItsLastHolder) {
  BlockAllocator allocator(1);
  const uint32_t block = *allocator.allocate();
  allocator.share(block);
  EXPECT_EQ(allocator.holders(block), 2u);
  allocator.release(block);
  EXPECT_EQ(allocator.n_free(), 0u);
  allocator.release(block);
  EXPECT_EQ(allocator.n_free(), 1u);
}

TEST(BlockAllocator, KeepsABlockBeyondItsLastHolderUntilItIsForgotten) {
  BlockAllocator allocator(2);
  const uint32_t block = *allocator.allocate();
  allocator.keep(block);
  EXPECT_FALSE(allocator.idle(block));
  allocator.release(block);
  EXPECT_TRUE(allocator.idle(block));
  EXPECT_EQ(allocator.n_free(), 1u);
  EXPECT_EQ(allocator.n_available(), 2u);
  allocator.share(block);
  EXPECT_EQ(allocator.n_available(), 1u);
  allocator.forget(block);
  EXPECT_EQ(allocator.n_available(), 1u);
  allocator.release(block);
  EXPECT_EQ(allocator.n_free(), 2u);
}

TEST(BlockAllocatorDeathTest, NoticesABlockReleasedTwice) {
  BlockAllocator allocator(2);
  const uint32_t block = *allocator.allocate();
  allocator.release(block);
  EXPECT_DEATH(allocator.release(block), "once per holder");
}

}  // namespace
}  // namespace caravan::engine
