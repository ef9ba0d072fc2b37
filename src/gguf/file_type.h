// File types: the names under which whole files are quantised ("Q4_K_M"), their numbers in general.file_type, and the
// rule that gives each tensor its own type. Names, numbers and mixtures are llama.cpp's, so that a file of a name means
// the same everywhere. Table: docs/gguf.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "tensor/dtype.h"

namespace caravan::gguf {

struct FileType {
  std::string_view name;    // as users write it: "Q4_K_M"
  uint32_t number;          // general.file_type
  tensor::DType base_type;  // of most matrices
};

// Those that we can write.
std::span<const FileType> file_types();
// The row of that name, case-insensitively, or nullptr.
const FileType* find_file_type(std::string_view name);
// "F32, F16, ...", for messages.
std::string file_type_names();

// What the mixtures depend on besides the tensor.
struct MixtureContext {
  uint32_t n_layer = 0;
  uint32_t n_expert = 0;
  bool has_output = true;  // false: token_embd.weight is the output matrix, too
};

// The type of one tensor in a file of that type. Vectors, norms and routers stay F32; rows that are no multiple of a
// K-quant's block fall back to Q5_0 (for Q4_K), Q5_1 (for Q5_K), Q8_0 (for Q6_K) or, where nothing fits, F16.
//   name: e.g. "blk.3.attn_v.weight";  ne: its dimensions, the contiguous one first
tensor::DType choose_tensor_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                                 std::span<const int64_t> ne);

}  // namespace caravan::gguf
