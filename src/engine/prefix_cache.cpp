#include "engine/prefix_cache.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace caravan::engine {
namespace {

std::vector<int32_t> to_vector(std::span<const int32_t> tokens) { return {tokens.begin(), tokens.end()}; }

uint32_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t most = std::min(a.size(), b.size());
  return static_cast<uint32_t>(std::mismatch(a.begin(), a.begin() + static_cast<ptrdiff_t>(most), b.begin()).first -
                               a.begin());
}

}  // namespace

PrefixCache::~PrefixCache() { destroy(std::move(root_.children)); }

// Not recursive, as the default would be: a path can be as long as the context.
void PrefixCache::destroy(Children children) {
  std::vector<Children> open;
  open.push_back(std::move(children));
  while (!open.empty()) {
    const Children next = std::move(open.back());
    open.pop_back();
    for (const auto& [tokens, child] : next)
      if (!child->children.empty()) open.push_back(std::move(child->children));
  }
}

void PrefixCache::reset(const PlanSummary& plan, std::vector<BlockAllocator>* allocators) {
  groups_ = plan.groups;
  block_tokens_ = plan.block_tokens;
  allocators_ = allocators;
  destroy(std::exchange(root_.children, {}));
  entries_.clear();
  for (const GroupLimits& group : groups_) entries_.emplace_back(group.n_blocks);
}

// The nodes of the whole blocks that tokens begin with.
std::vector<const PrefixCache::Node*> PrefixCache::path_of(std::span<const int32_t> tokens) const {
  std::vector<const Node*> path;
  const Node* node = &root_;
  for (; tokens.size() >= block_tokens_; tokens = tokens.subspan(block_tokens_)) {
    const auto child = node->children.find(to_vector(tokens.first(block_tokens_)));
    if (child == node->children.end()) break;
    node = child->second.get();
    path.push_back(node);
  }
  return path;
}

// The longest part of a path, in blocks, after which every group still has what the next row sees.
uint32_t PrefixCache::usable_depth(const std::vector<const Node*>& path) const {
  // n_present[group]: blocks that are there without a gap up to the node looked at.
  std::vector<uint32_t> n_present(n_groups(), 0);
  uint32_t usable = 0;
  for (uint32_t depth = 1; depth <= path.size(); ++depth) {
    bool complete = true;
    for (uint32_t group = 0; group < n_groups(); ++group) {
      n_present[group] = path[depth - 1]->blocks[group] ? n_present[group] + 1 : 0;
      const uint32_t from = groups_[group].first_visible(depth * block_tokens_) / block_tokens_;
      complete = complete && n_present[group] >= depth - from;
    }
    if (complete) usable = depth;
  }
  return usable;
}

// The child that shares most with rest: the tokens of children are in order, so it is next to where rest would be.
void PrefixCache::add_partial(PrefixMatch& match, const Node& parent, std::span<const int32_t> rest) const {
  if (rest.empty() || parent.children.empty()) return;
  const auto after = parent.children.lower_bound(to_vector(rest.first(std::min<size_t>(rest.size(), block_tokens_))));
  const Node* best = nullptr;
  const auto consider = [&](const Node& child) {
    const uint32_t n = common_prefix(child.tokens, rest);
    const bool complete = std::all_of(child.blocks.begin(), child.blocks.end(), [](const auto& b) { return !!b; });
    if (n > match.n_partial && complete) match.n_partial = n, best = &child;
  };
  if (after != parent.children.end()) consider(*after->second);
  if (after != parent.children.begin()) consider(*std::prev(after)->second);
  if (best == nullptr) return;
  for (const auto& block : best->blocks) match.partial.push_back(*block);
}

PrefixMatch PrefixCache::find(std::span<const int32_t> tokens, uint32_t max_tokens) const {
  tokens = tokens.first(std::min<size_t>(tokens.size(), max_tokens));
  const std::vector<const Node*> path = path_of(tokens);
  const uint32_t depth = usable_depth(path);
  PrefixMatch match;
  match.n_tokens = depth * block_tokens_;
  match.tables.resize(n_groups());
  for (uint32_t group = 0; group < n_groups(); ++group) {
    BlockTable& table = match.tables[group];
    table.n_dropped = groups_[group].first_visible(match.n_tokens) / block_tokens_;
    for (uint32_t i = table.n_dropped; i < depth; ++i) table.blocks.push_back(*path[i]->blocks[group]);
  }
  if (depth == path.size()) add_partial(match, path.empty() ? root_ : *path.back(), tokens.subspan(match.n_tokens));
  return match;
}

void PrefixCache::hold(const PrefixMatch& match) {
  ++clock_;
  const auto hold_block = [&](uint32_t group, uint32_t block) {
    (*allocators_)[group].share(block);
    entries_[group][block].used = clock_;
  };
  for (uint32_t group = 0; group < n_groups(); ++group) {
    for (const uint32_t block : match.tables[group].blocks) hold_block(group, block);
    if (match.n_partial > 0) hold_block(group, match.partial[group]);
  }
}

void PrefixCache::release_partial(const PrefixMatch& match) {
  for (uint32_t group = 0; group < match.partial.size(); ++group) (*allocators_)[group].release(match.partial[group]);
}

// The child with these tokens, made if there is none; nullptr when a longer one holds them already. Shorter ones that
// it replaces go.
PrefixCache::Node* PrefixCache::child_for(Node& parent, std::span<const int32_t> tokens) {
  const auto [at, added] = parent.children.try_emplace(to_vector(tokens));
  if (!added) return at->second.get();
  const auto next = std::next(at);
  if (next != parent.children.end() && common_prefix(next->second->tokens, tokens) == tokens.size()) {
    parent.children.erase(at);
    return nullptr;
  }
  at->second = std::make_unique<Node>();
  Node& node = *at->second;
  node.parent = &parent;
  node.depth = &parent == &root_ ? 0 : parent.depth + 1;
  node.tokens = to_vector(tokens);
  node.blocks.resize(n_groups());
  // Every prefix of these tokens that is a child sorts directly before them.
  while (at != parent.children.begin()) {
    Node& shorter = *std::prev(at)->second;
    if (common_prefix(shorter.tokens, tokens) < shorter.tokens.size()) break;
    forget_subtree(shorter);
    parent.children.erase(std::prev(at));
  }
  return &node;
}

// Keeps the blocks that tables have for the node and that the node lacks.
void PrefixCache::adopt(Node& node, const std::vector<BlockTable>& tables) {
  for (uint32_t group = 0; group < n_groups(); ++group) {
    const BlockTable& table = tables[group];
    if (node.blocks[group] || node.depth < table.n_dropped) continue;
    const uint32_t block = table.blocks.at(node.depth - table.n_dropped);
    Entry& entry = entries_[group][block];
    CARAVAN_ASSERT(entry.node == nullptr, "one block holds the tokens of one node");
    (*allocators_)[group].keep(block);
    entry = {&node, clock_};
    node.blocks[group] = block;
  }
}

void PrefixCache::insert_path(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables, bool ended) {
  ++clock_;
  Node* node = &root_;
  while (!tokens.empty() && (ended || tokens.size() >= block_tokens_)) {
    const auto block = tokens.first(std::min<size_t>(tokens.size(), block_tokens_));
    tokens = tokens.subspan(block.size());
    node = child_for(*node, block);
    if (node == nullptr) return;
    adopt(*node, tables);
    if (!ended) continue;
    for (uint32_t group = 0; group < n_groups(); ++group)
      if (node->blocks[group]) entries_[group][*node->blocks[group]].used = clock_;
  }
  if (node != &root_) remove_empty(node);  // a window may have left all of a path's last block
}

void PrefixCache::insert(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables) {
  insert_path(tokens, tables, false);
}

void PrefixCache::insert_ended(std::span<const int32_t> tokens, const std::vector<BlockTable>& tables) {
  insert_path(tokens, tables, true);
}

void PrefixCache::forget_block(Node& node, uint32_t group) {
  if (!node.blocks[group]) return;
  const uint32_t block = *node.blocks[group];
  node.blocks[group].reset();
  entries_[group][block] = {};
  (*allocators_)[group].forget(block);
}

void PrefixCache::forget_subtree(Node& top) {
  std::vector<Node*> open{&top};
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    for (uint32_t group = 0; group < n_groups(); ++group) forget_block(*node, group);
    for (auto& [tokens, child] : node->children) open.push_back(child.get());
  }
}

// Takes a node and all below it out of the tree.
void PrefixCache::remove(Node& node) {
  forget_subtree(node);
  destroy(std::move(node.children));
  const auto at = node.parent->children.find(node.tokens);
  node.parent->children.erase(at);
}

// Takes out a node that holds nothing and leads nowhere, and its ancestors of that kind.
void PrefixCache::remove_empty(Node* node) {
  const auto holds = [](const Node& n) {
    return !n.children.empty() || std::any_of(n.blocks.begin(), n.blocks.end(), [](const auto& b) { return !!b; });
  };
  while (node != &root_ && !holds(*node)) {
    Node* parent = node->parent;
    remove(*node);
    node = parent;
  }
}

void PrefixCache::evict(uint32_t group, uint32_t n) {
  BlockAllocator& allocator = (*allocators_)[group];
  if (allocator.n_free() >= n) return;
  // Of blocks used together the one that fewest others need goes first: the deepest, but in a window the one before
  // all others.
  struct Victim {
    uint64_t used;
    uint32_t order, block;
  };
  const bool window = groups_[group].kind == GroupLimits::Kind::window;
  std::vector<Entry>& entries = entries_[group];
  std::vector<Victim> idle;
  for (uint32_t block = 0; block < entries.size(); ++block) {
    if (entries[block].node == nullptr || !allocator.idle(block)) continue;
    const uint32_t depth = entries[block].node->depth;
    idle.push_back({entries[block].used, window ? depth : std::numeric_limits<uint32_t>::max() - depth, block});
  }
  const auto later = [](const Victim& a, const Victim& b) {
    return std::tie(a.used, a.order, a.block) > std::tie(b.used, b.order, b.block);
  };
  std::make_heap(idle.begin(), idle.end(), later);
  while (allocator.n_free() < n && !idle.empty()) {
    std::pop_heap(idle.begin(), idle.end(), later);
    Node* node = entries[idle.back().block].node;
    idle.pop_back();
    if (node == nullptr) continue;  // went with one above it
    if (window) {
      forget_block(*node, group);
      remove_empty(node);
    } else {
      Node* parent = node->parent;
      remove(*node);  // nothing below can be reached without it
      remove_empty(parent);
    }
  }
  CARAVAN_ASSERT(allocator.n_free() >= n, "only as many as are available are asked for");
}

void PrefixCache::erase(std::span<const int32_t> tokens) {
  Node* node = &root_;
  while (!tokens.empty()) {
    const auto child = node->children.find(to_vector(tokens.first(std::min<size_t>(tokens.size(), block_tokens_))));
    if (child == node->children.end()) break;
    node = child->second.get();
    tokens = tokens.subspan(node->tokens.size());
  }
  while (node != &root_ && node->children.empty()) {
    Node* parent = node->parent;
    remove(*node);
    node = parent;
  }
}

void PrefixCache::clear() {
  while (!root_.children.empty()) remove(*root_.children.begin()->second);
}

}  // namespace caravan::engine
