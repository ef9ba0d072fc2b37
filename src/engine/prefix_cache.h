// KV blocks found by the tokens whose keys and values they hold. Every sequence leaves its blocks here, while it runs
// and when it ends; a new one takes those of its longest prefix instead of computing it again.
//
// A tree over token ids: each node is one logical block, its path from the root is everything before it, since what a
// block holds depends on all of that. Leaves may be shorter than a block. A node has a block per cache group; in a
// group with a window old ones may be missing. Blocks of the cache and free blocks are one pool: an idle block (held by
// no table) is evicted, least recently used first, when a free one is needed. Nothing is ever written into a block that
// is here: a prefix that ends inside a block is copied (KvOp::copy_block).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/block_table.h"
#include "engine/pipeline.h"

namespace caravan::engine {

// The longest usable prefix of some tokens.
struct PrefixMatch {
  uint32_t n_tokens = 0;           // in whole blocks
  std::vector<BlockTable> tables;  // per cache group: what a sequence of n_tokens needs, from its window on
  // A block whose first n_partial tokens continue the prefix: one per cache group, to be copied.
  uint32_t n_partial = 0;
  std::vector<uint32_t> partial;
};

// Owned and used by the scheduler, on its thread. The allocators are the scheduler's and outlive this.
class PrefixCache {
 public:
  PrefixCache() = default;
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // Starts empty under a plan; allocators holds one per cache group. What was there before is forgotten without telling
  // the allocators, which must be new.
  void reset(const PlanSummary& plan, std::vector<BlockAllocator>* allocators);

  // What the cache holds for a prefix of tokens of at most max_tokens. Holds nothing: the blocks may be evicted until
  // use() or BlockAllocator::share().
  PrefixMatch find(std::span<const int32_t> tokens, uint32_t max_tokens) const;

  // Blocks of match are held from now on, those of its tables for a sequence's table, the partial ones until
  // release_partial(); all count as just used.
  void hold(const PrefixMatch& match);
  void release_partial(const PrefixMatch& match);

  // Takes in the blocks of a running sequence: tokens are all that its tables have been scheduled to hold. Only whole
  // blocks, as the last one is still written to.
  void insert(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables);
  // The same at the end of a sequence, before its tables are released: the last, partial block too, and the whole path
  // counts as just used.
  void insert_ended(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables);

  // Makes at least n blocks of a group free, by forgetting idle ones that were not used for the longest time. The group
  // must have n available ones.
  void evict(uint32_t group, uint32_t n);

  // Forgets what is kept for these tokens and shared with no longer path, from the end on. Held blocks stay with their
  // holders.
  void erase(std::span<const int32_t> tokens);

  // Forgets everything.
  void clear();

 private:
  // Children are in the order of their tokens; none's tokens begin with those of another.
  struct Node;
  using Children = std::map<std::vector<int32_t>, std::unique_ptr<Node>>;
  struct Node {
    Node* parent = nullptr;
    uint32_t depth = 0;                           // logical index; the root has none
    std::vector<int32_t> tokens;                  // 1 to block_tokens
    std::vector<std::optional<uint32_t>> blocks;  // per cache group
    Children children;
  };
  // What is known of a physical block.
  struct Entry {
    Node* node = nullptr;  // null: not in the cache
    uint64_t used = 0;     // clock_ of the last use
  };

  uint32_t n_groups() const { return static_cast<uint32_t>(groups_.size()); }
  std::vector<const Node*> path_of(std::span<const int32_t> tokens) const;
  uint32_t usable_depth(const std::vector<const Node*>& path) const;
  void add_partial(PrefixMatch& match, const Node& parent, std::span<const int32_t> rest) const;
  Node* child_for(Node& parent, std::span<const int32_t> tokens);
  void adopt(Node& node, const std::vector<BlockTable>& tables);
  void insert_path(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables, bool ended);
  void forget_block(Node& node, uint32_t group);
  void forget_subtree(Node& node);
  void remove(Node& node);
  void remove_empty(Node* node);
  static void destroy(Children children);

  std::vector<GroupLimits> groups_;
  uint32_t block_tokens_ = 1;
  std::vector<BlockAllocator>* allocators_ = nullptr;
  Node root_;
  std::vector<std::vector<Entry>> entries_;  // per group and physical block
  uint64_t clock_ = 0;
};

}  // namespace caravan::engine
