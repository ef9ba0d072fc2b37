#include "engine/block_allocator.h"

#include "base/error.h"

namespace caravan::engine {

BlockAllocator::BlockAllocator(uint32_t n_blocks) : blocks_(n_blocks) {
  free_.reserve(n_blocks);
  for (uint32_t block = n_blocks; block > 0; --block) free_.push_back(block - 1);
}

std::optional<uint32_t> BlockAllocator::allocate() {
  if (free_.empty()) return std::nullopt;
  const uint32_t block = free_.back();
  free_.pop_back();
  blocks_[block].holders = 1;
  return block;
}

void BlockAllocator::share(uint32_t block) {
  Block& b = blocks_.at(block);
  CARAVAN_ASSERT(b.holders > 0 || b.kept, "only a block with contents can be shared");
  if (b.holders == 0) --n_idle_;
  ++b.holders;
}

void BlockAllocator::release(uint32_t block) {
  Block& b = blocks_.at(block);
  CARAVAN_ASSERT(b.holders > 0, "a block is released once per holder");
  if (--b.holders > 0) return;
  if (b.kept) {
    ++n_idle_;
  } else {
    free_.push_back(block);
  }
}

void BlockAllocator::keep(uint32_t block) {
  Block& b = blocks_.at(block);
  CARAVAN_ASSERT(b.holders > 0 && !b.kept, "a block is kept once, while a table holds it");
  b.kept = true;
}

void BlockAllocator::forget(uint32_t block) {
  Block& b = blocks_.at(block);
  CARAVAN_ASSERT(b.kept, "only a kept block is forgotten");
  b.kept = false;
  if (b.holders > 0) return;
  --n_idle_;
  free_.push_back(block);
}

}  // namespace caravan::engine
