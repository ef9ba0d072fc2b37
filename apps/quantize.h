// Quantising a model: which type each tensor gets, and the conversion, in pieces on several threads.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gguf/file_type.h"
#include "gguf/reader.h"

namespace caravan::app {

struct QuantizeOptions {
  const gguf::FileType* file_type = nullptr;  // nullptr: every tensor keeps its type
  bool pure = false;                          // all matrices get the file type's base type
  bool allow_requantize = false;              // else only F32, F16 and BF16 are converted
  bool leave_output = false;                  // output.weight keeps its type
  bool keep_split = false;                    // as many files as the model has
  std::optional<tensor::DType> output_type, token_embedding_type;
  // A regular expression searched in the tensor's name, and its type; the first that is found decides.
  std::vector<std::pair<std::string, tensor::DType>> tensor_types;
  int n_threads = 1;
};

struct PlannedTensor {
  const gguf::TensorInfo* source = nullptr;
  tensor::DType type = tensor::DType::f32;
  bool is_fallback = false;  // rows do not fit the blocks of the type that the file type asks for
  uint64_t size_bytes = 0;
};

// The type of each tensor of the model, in its order. Throws RequestError where a type cannot be written, a row does
// not fit the type that was asked for by name, or a quantised tensor would be converted without allow_requantize.
std::vector<PlannedTensor> plan_quantization(const gguf::Model& model, const QuantizeOptions& options);

// Writes the model with the planned types under path (with keep_split: under the names of the parts of that prefix).
// general.file_type and general.quantization_version are set, split.* keys follow the new files. Memory: a few MiB per
// thread. Throws FormatError naming tensor and element for values that the target cannot hold (infinities, NaN, and for
// other types than F32 and BF16 those beyond 65504), SystemError.
void write_quantized(const gguf::Model& model, const std::vector<PlannedTensor>& plan, const QuantizeOptions& options,
                     const std::filesystem::path& path);

}  // namespace caravan::app
