// caravan synth: random-weight models of known shapes, for measuring and for tests. Nothing is downloaded; what they
// say is noise, but their logits are finite and their sizes, types and speed are those of the real models.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "gguf/file_type.h"

namespace caravan::app {

// The subcommand. Returns the exit status; throws RequestError for bad arguments.
int run_synth(int argc, char** argv);

// A model's dimensions, in the words of GGUF's keys.
struct ModelShape {
  std::string_view name, architecture;
  uint32_t n_layer, n_embd, n_ff, n_head, n_head_kv, head_size, n_vocab, n_ctx;
  float rope_freq_base, norm_epsilon;
  bool has_output;    // false: the embeddings are the output matrix, too
  float rope_factor;  // Llama 3's frequency scaling: 0 none, else the largest divisor
  uint32_t n_expert = 0, n_expert_used = 0;
};

// All known shapes, and one by name (nullptr: unknown).
std::span<const ModelShape> model_shapes();
const ModelShape* find_model_shape(std::string_view name);

// Sum of all tensors' elements.
uint64_t count_parameters(const ModelShape& shape);

struct SynthOptions {
  uint64_t seed = 1;
  std::optional<uint32_t> n_layer;  // instead of the shape's
  std::optional<uint32_t> n_vocab;  // instead of the shape's, at least 257
  int n_threads = 1;
};

// Writes a model of that shape and file type. The same arguments give the same bytes, whatever the number of threads.
// Weights are normal with standard deviation 1 / sqrt(row length); to be quick, each tensor is tiled from a pool of
// quantised groups of 256 values, chosen at random. Throws RequestError for impossible options, SystemError.
void write_synthetic_model(const std::filesystem::path& path, const ModelShape& shape, const gguf::FileType& type,
                           const SynthOptions& options);

}  // namespace caravan::app
