// A model that is placed several times: disjoint groups of devices, each of which holds all layers and serves a share
// of the sequences, when that is faster than holding it once. Pure functions over the cost model.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "plan/cost_model.h"

namespace caravan::plan {

struct Replica {
  std::vector<StageSpan> stages;  // all layers, in order
  double speed = 0;               // tokens per second of typical requests, as many as it gets of the slots
};

struct Replicas {
  std::vector<Replica> replicas;  // two or more, no device in two of them
  // Prompt and generation are those of the replica where they are fastest: an idle server uses that. Streams are all
  // replicas' together.
  Prediction prediction;
  double score = 0;  // comparable with CostModel::score() of a model that is placed once
};

// The number of sequences out of n_slots that each replica computes when all slots are taken and every sequence goes to
// the least busy for its speed.
std::vector<uint32_t> share_slots(uint32_t n_slots, const std::vector<double>& speeds);

// The best replicas found for all layers of the model; fits says whether a device's memory holds a run of layers.
// nullopt: there is no room for two, or not two slots. Groups are made of the devices that hold the model alone, and of
// others, the one with the most room together with those with the least; then groups are joined, and devices moved or
// exchanged between them, as long as that raises the score. Not thread-safe per model.
std::optional<Replicas> fastest_replicas(const CostModel& model, const std::vector<size_t>& devices,
                                         const std::function<bool(const StageSpan&)>& fits, Goal goal);

}  // namespace caravan::plan
