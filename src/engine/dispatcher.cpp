#include "engine/dispatcher.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace caravan::engine {
namespace {

// A replica that has all of a sequence's tokens cached gets it although it computes so many sequences more than another
// one that has none; for a part of the tokens, that part of them.
constexpr double kCachedWorth = 2;

}  // namespace

void Dispatcher::set_plan(const PlanSummary& plan) {
  n_slots_ = n_parallel_ == 0 ? plan.max_slots : std::min(n_parallel_, plan.max_slots);
  std::map<uint64_t, std::unique_ptr<Scheduler>> replicas;
  for (size_t i = 0; i < plan.replicas.size(); ++i) {
    auto known = replicas_.extract(plan.replicas[i].id);
    if (known.empty()) {
      replicas.emplace(plan.replicas[i].id, std::make_unique<Scheduler>(plan, i, max_in_flight_));
    } else {
      known.mapped()->set_speed(plan.replicas[i].speed);
      replicas.insert(std::move(known));
    }
  }
  for (auto& [id, sequence] : sequences_)
    if (sequence->slot && !replicas.contains(sequence->replica)) sequence->lose_cache();
  for (const auto& [id, gone] : replicas_) n_preemptions_ += gone->n_preemptions();
  replicas_ = std::move(replicas);
}

void Dispatcher::lose_plan() {
  for (auto& [id, sequence] : sequences_)
    if (sequence->slot) sequence->lose_cache();
  for (const auto& [id, gone] : replicas_) n_preemptions_ += gone->n_preemptions();
  replicas_.clear();
}

void Dispatcher::add(std::unique_ptr<Sequence> sequence) {
  const uint64_t id = sequence->id;
  sequences_.emplace(id, std::move(sequence));
}

std::unique_ptr<Sequence> Dispatcher::remove(uint64_t id) {
  auto node = sequences_.extract(id);
  CARAVAN_ASSERT(!node.empty(), "only a sequence that was added is removed");
  if (node.mapped()->slot) replicas_.at(node.mapped()->replica)->release(*node.mapped());
  return std::move(node.mapped());
}

void Dispatcher::discard(Sequence& sequence, uint32_t first, uint32_t n) {
  CARAVAN_ASSERT(first + n < sequence.n_tokens() && !sequence.awaits_output, "there is something to go on from");
  if (sequence.full_history.empty()) sequence.full_history = sequence.tokens;
  if (sequence.slot) replicas_.at(sequence.replica)->release(sequence);
  const auto begin = sequence.tokens.begin() + first;
  sequence.tokens.erase(begin, begin + n);
  sequence.n_discarded += n;
  sequence.n_evaluated = 0;
}

Sequence* Dispatcher::find(const BatchPart& part) {
  const auto at = sequences_.find(part.sequence);
  if (at == sequences_.end() || at->second->incarnation != part.incarnation) return nullptr;
  return at->second.get();
}

void Dispatcher::erase_cached(std::span<const int32_t> tokens) {
  for (auto& [id, replica] : replicas_) replica->erase_cached(tokens);
}

// Where a waiting sequence is computed: the least busy for its speed, or one that has much of it cached; nullptr: there
// is no room for it.
Scheduler* Dispatcher::replica_for(const Sequence& waiting) const {
  double speeds = 0;
  for (const auto& [id, replica] : replicas_) speeds += replica->speed();
  Scheduler* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [id, replica] : replicas_) {
    if (replica->n_running() > 0 && !replica->fits_now(waiting)) continue;
    if (replicas_.size() == 1) return replica.get();
    const double mean_speed = speeds / static_cast<double>(replicas_.size());
    const double slower = replica->speed() > 0 ? mean_speed / replica->speed() : 1;
    const double cached = static_cast<double>(replica->n_cached(waiting)) / waiting.n_tokens();
    const double cost = (replica->n_running() + 1) * slower - kCachedWorth * cached;
    if (cost >= least) continue;
    least = cost;
    best = replica.get();
  }
  return best;
}

void Dispatcher::admit() {
  if (replicas_.empty() || n_waiting() == 0) return;
  for (auto& [id, replica] : replicas_) replica->drop_left_windows();
  std::vector<bool> used(n_slots_);
  for (const auto& [id, sequence] : sequences_)
    if (sequence->slot) used[*sequence->slot] = true;
  for (auto& [id, sequence] : sequences_) {
    if (sequence->slot) continue;
    auto slot = std::find(used.begin(), used.end(), false);
    if (sequence->wanted_slot) {
      slot = used.begin() + static_cast<ptrdiff_t>(*sequence->wanted_slot % used.size());
      if (*slot) continue;
    }
    if (slot == used.end()) return;
    Scheduler* const replica = replica_for(*sequence);
    if (replica == nullptr) return;
    *slot = true;
    sequence->slot = static_cast<stage::Slot>(slot - used.begin());
    replica->admit(*sequence);
  }
}

uint32_t Dispatcher::n_running() const {
  return static_cast<uint32_t>(std::count_if(sequences_.begin(), sequences_.end(),
                                             [](const auto& entry) { return entry.second->slot.has_value(); }));
}

uint64_t Dispatcher::n_preemptions() const {
  uint64_t n = n_preemptions_;
  for (const auto& [id, replica] : replicas_) n += replica->n_preemptions();
  return n;
}

}  // namespace caravan::engine
