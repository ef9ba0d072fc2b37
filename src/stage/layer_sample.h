// How long a layer of a model takes on a device, measured as it will run: a stage of one such layer, with weights that
// are made up, is given batches of one row and more. True for every architecture, as no product, norm or attention is
// left out.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "device/device.h"
#include "gguf/reader.h"
#include "stage/profile.h"
#include "stage/stage.h"

namespace caravan::stage {

// What a device has to measure so that the speed of a model on it can be predicted.
struct SpeedQuestions {
  // A layer of each kind, of at most a few, with its number (models::layer_kinds()): what measure_layer() takes.
  std::vector<std::pair<uint32_t, LoadRequest>> layers;
  std::vector<tensor::DType> other_types;  // of what is not in layers
  std::vector<tensor::DType> all_types;    // where no layers can be measured
};

//   hyperparameters as loads get them;  cache: its types and block_tokens count. Manifests are without hashes.
// Throws FormatError when the model does not fit its architecture.
SpeedQuestions speed_questions(const gguf::Model& model, const gguf::Metadata& hyperparameters,
                               const CacheConfig& cache);

// Times the layer of a sample, at the place in a typical request where so many rows come: single rows read a full
// context, chunks of a prompt have half of one before them. Weights are read from memory where most_bytes has room for
// several copies (need and kProfileBytes). Takes up to half a second, more on devices that are slow for the layer, and
// nothing else should compute meanwhile. Throws FormatError for a request that is not one layer or does not fit its
// architecture, ResourceError when the layer needs more than most_bytes, NotSupportedError as loading does.
LayerTimes measure_layer(device::Device& device, LoadRequest sample, uint64_t most_bytes);

}  // namespace caravan::stage
