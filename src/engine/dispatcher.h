// Which replica of the model computes which sequence. Holds all accepted sequences and a scheduler for each replica of
// the plan; knows neither threads nor streams nor text.
//
// A sequence waits here until there is a slot, and then goes to one replica, where its keys and values are, until it
// ends, is preempted or loses the replica. Slots are those of all replicas together: the one of a sequence is used at
// no other replica meanwhile.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine/pipeline.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace caravan::engine {

class Dispatcher {
 public:
  // n_parallel 0: the plan's max_slots. max_in_flight: as of Scheduler.
  Dispatcher(uint32_t n_parallel, uint32_t max_in_flight) : n_parallel_(n_parallel), max_in_flight_(max_in_flight) {}

  // Takes the limits and replicas of a new plan. Sequences stay on replicas that are in it already; all others wait, to
  // be computed again from their first token.
  void set_plan(const PlanSummary& plan);

  // There is no replica any more.
  void lose_plan();

  // Adds a sequence that waits for a place. Its tokens are fewer than effective_context(plan).
  void add(std::unique_ptr<Sequence> sequence);

  // Removes a sequence; its blocks and slot are free from the next batch on. Results still in flight are void.
  std::unique_ptr<Sequence> remove(uint64_t id);

  // The sequence that a part of a completed batch belongs to, or nullptr when it is gone or lost its cache since.
  Sequence* find(const BatchPart& part);

  // All sequences, oldest first. A function given the sequences must not add or remove.
  const std::map<uint64_t, std::unique_ptr<Sequence>>& sequences() const { return sequences_; }

  // Discards tokens [first, first + n) of a running sequence without a result in flight: what follows them moves up and
  // is computed again. Some token is left after them.
  void discard(Sequence& sequence, uint32_t first, uint32_t n);

  // Forgets what is cached for these tokens, as far as no longer text shares it.
  void erase_cached(std::span<const int32_t> tokens);

  // Gives waiting sequences slots and replicas, oldest first; only those that wait for a certain slot are overtaken.
  void admit();

  // By ReplicaSummary::id.
  const std::map<uint64_t, std::unique_ptr<Scheduler>>& replicas() const { return replicas_; }

  uint32_t n_slots() const { return n_slots_; }
  uint32_t n_running() const;
  uint32_t n_waiting() const { return static_cast<uint32_t>(sequences_.size()) - n_running(); }
  uint64_t n_preemptions() const;

 private:
  Scheduler* replica_for(const Sequence& waiting) const;

  const uint32_t n_parallel_;
  const uint32_t max_in_flight_;
  uint32_t n_slots_ = 0;
  std::map<uint64_t, std::unique_ptr<Sequence>> sequences_;  // by age
  std::map<uint64_t, std::unique_ptr<Scheduler>> replicas_;
  uint64_t n_preemptions_ = 0;  // of replicas that are gone
};

}  // namespace caravan::engine
