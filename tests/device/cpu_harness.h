// What tests of the CPU device share: random weights, batches of sequences in a paged cache, and one call to run them.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "device/cpu/cpu_device.h"
#include "graph/builder.h"
#include "tensor/dtype.h"

namespace caravan::device::cpu::test {

using graph::Builder;
using graph::Graph;
using graph::kRows;
using graph::ValueId;
using tensor::DType;

inline std::vector<float> random_values(size_t n, unsigned seed, float spread = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

// Tensors of a file that does not exist: GGUF bytes, and the values they stand for.
struct Model {
  graph::TensorMap tensors;
  std::map<std::string, std::vector<std::byte>> bytes;
  std::map<std::string, std::vector<float>> values;

  void add(const std::string& name, DType dtype, tensor::Shape ne, const std::vector<float>& source) {
    const auto& info = tensor::dtype_info(dtype);
    const auto n = static_cast<int64_t>(source.size());
    tensors[name] = {dtype, ne};
    bytes[name].resize(tensor::row_bytes(dtype, source.size()));
    info.quantize(source.data(), bytes[name].data(), n);
    values[name].resize(source.size());
    info.dequantize(bytes[name].data(), values[name].data(), n);
  }
  void add_random(const std::string& name, DType dtype, tensor::Shape ne, unsigned seed, float spread = 1) {
    add(name, dtype, ne, random_values(static_cast<size_t>(tensor::n_elements(ne)), seed, spread));
  }

  // The graph's weights on a device.
  std::shared_ptr<WeightSet> load(Device& device, const Graph& graph) const {
    auto weights = device.create_weights(graph.weights);
    for (size_t i = 0; i < graph.weights.size(); ++i) weights->upload(i, 0, bytes.at(graph.weights[i].name));
    weights->finish();
    return weights;
  }
};

// A batch that owns what RunInput points to.
struct Batch {
  std::vector<int32_t> tokens, positions, slots, token_index, output_rows;
  std::vector<float> hidden;
  struct Group {
    std::vector<int32_t> from, to;
    std::vector<std::vector<int32_t>> tables;
  };
  std::vector<Group> groups;
  int64_t n_rows = 0;
};

// Runs the batch; all outputs are wanted.
inline std::vector<std::vector<float>> run(Executable& executable, const Batch& batch) {
  const graph::RowCounts counts{batch.n_rows, static_cast<int64_t>(batch.output_rows.size()), 0, 0};
  std::vector<std::vector<float>> outputs;
  std::vector<std::span<float>> spans;
  for (const graph::Output& output : executable.graph().outputs)
    outputs.emplace_back(
        static_cast<size_t>(tensor::n_elements(graph::resolve(executable.graph().type(output.value).ne, counts))));
  for (auto& output : outputs) spans.emplace_back(output);
  std::vector<std::vector<BlockTable>> tables(batch.groups.size());
  std::vector<GroupInput> groups;
  for (size_t i = 0; i < batch.groups.size(); ++i) {
    for (const auto& table : batch.groups[i].tables) tables[i].emplace_back(table);
    groups.push_back({batch.groups[i].from, batch.groups[i].to, tables[i]});
  }
  RunInput input;
  input.n_rows = batch.n_rows;
  input.tokens = batch.tokens;
  input.hidden = batch.hidden;
  input.positions = batch.positions;
  input.slots = batch.slots;
  input.token_index = batch.token_index;
  input.groups = groups;
  input.output_rows = batch.output_rows;
  input.outputs = spans;
  executable.run(input);
  return outputs;
}

// Rows of hidden values only.
inline Batch hidden_batch(std::vector<float> hidden, int64_t n_embd) {
  Batch batch;
  batch.n_rows = static_cast<int64_t>(hidden.size()) / n_embd;
  batch.hidden = std::move(hidden);
  for (int32_t row = 0; row < batch.n_rows; ++row) batch.positions.push_back(row);
  return batch;
}

inline Isa best_isa() { return supported_isas().back(); }

// Builds, loads, compiles and runs once.
inline std::vector<std::vector<float>> compute(const Graph& graph, const Model& model, const Batch& batch,
                                               int n_threads = 2, Isa isa = best_isa()) {
  CpuDevice device(n_threads, isa, 0);
  const auto executable =
      device.compile(graph, model.load(device, graph), nullptr, {batch.n_rows, std::max<int64_t>(1, batch.n_rows), 0});
  return run(*executable, batch);
}

// Sum of squared differences over sum of squares.
inline double nmse(const std::vector<float>& found, const std::vector<float>& expected) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double{found[i]} - expected[i], 2);
    power += std::pow(double{expected[i]}, 2);
  }
  return error / std::max(power, 1e-30);
}

}  // namespace caravan::device::cpu::test
