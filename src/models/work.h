// What computing with a model takes: the bytes of weights that a token reads and the multiplications it makes, per
// layer and type of tensor. For the planner's predictions and for benchmarks.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "models/arch.h"

namespace caravan::models {

// For one token: of experts only those that are used.
struct Work {
  double bytes = 0;       // read, in the file's own types
  double multiplies = 0;  // by matrices; twice as many operations
  Work& operator+=(const Work& other) {
    bytes += other.bytes;
    multiplies += other.multiplies;
    return *this;
  }
};

// Types of the matrices with the work in each. Vectors (norms, biases) count as bytes of their type.
using WorkByType = std::map<tensor::DType, Work>;

struct ModelWork {
  std::vector<WorkByType> layers;  // per layer; what every slice holds is left out
  WorkByType output;               // per row whose output is wanted

  // Everything that a generated token takes.
  Work per_token() const;
  // Of the layers alone: what a row of a prompt takes.
  Work per_prompt_row() const;
};

// The types that hold a noteworthy part of a model's matrices, a fiftieth of all bytes or more: whose speed matters.
std::vector<tensor::DType> main_types(const ModelWork& work);

// Layers that take the same time: their tensors have the same types and shapes, and their caches are in the same
// groups. Per layer the number of its kind, counted from 0 in the order in which kinds first occur.
std::vector<uint32_t> layer_kinds(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors);

// The work of a model whose file has these tensors. Throws FormatError when they do not fit the architecture.
ModelWork model_work(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors);

}  // namespace caravan::models
