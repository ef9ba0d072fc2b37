// File types: the names under which whole files are quantised ("Q4_K_M"), their numbers in general.file_type, and the
// rule that gives each tensor its own type. Names, numbers and mixtures are llama.cpp's, so that a file of a name means
// the same everywhere. Table: docs/gguf.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "gguf/metadata.h"
#include "tensor/dtype.h"

namespace caravan::gguf {

struct FileType {
  std::string_view name;         // as users write it: "Q4_K_M"
  uint32_t number;               // general.file_type
  tensor::DType base_type;       // of most matrices
  bool can_write;                // false: we only read files of it
  std::string_view description;  // for people: "Q4_K - Medium"
};

// All that general.file_type can name.
std::span<const FileType> file_types();
// The row of that name or short name ("Q4_K" is Q4_K_M), case-insensitively, or nullptr.
const FileType* find_file_type(std::string_view name);
// The row of that general.file_type, or nullptr.
const FileType* find_file_type(uint32_t number);
// The names of those that can be written, "F32, F16, ...", for messages.
std::string file_type_names();
// What general.file_type says, for people: "Q4_K - Medium", "file type 99", or "unknown" when the key is missing.
std::string file_type_description(const Metadata& metadata);

// What the mixtures depend on besides the tensor.
struct MixtureContext {
  uint32_t n_layer = 0;
  uint32_t n_expert = 0;
  bool has_output = true;      // false: token_embd.weight is the output matrix, too
  uint32_t n_head_per_kv = 1;  // heads that share a key and value head
  std::string architecture{};  // general.architecture
};

// The context of a model. Throws FormatError when the metadata lacks the architecture or the number of layers.
MixtureContext mixture_context(const Metadata& metadata, bool has_output);

// Whether a file type decides about this tensor: matrices of weights do; vectors, norms, routers, positions and some
// small matrices of recurrent models keep the type they have.
//   name: e.g. "blk.3.attn_v.weight";  ne: its dimensions, the contiguous one first
bool takes_file_type(std::string_view name, std::span<const int64_t> ne);

// The type that the file type asks for, of a tensor that it decides about, before row lengths are looked at.
tensor::DType mixture_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                           std::span<const int64_t> ne);

// The type of one tensor in a file of that type, F32 where the file type does not decide. Rows that are no multiple of
// the type's block length get what fitting_type() says.
tensor::DType choose_tensor_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                                 std::span<const int64_t> ne);

// What holds rows of n values instead of type: the type itself, or where its blocks do not fit Q4_0 or IQ4_NL for the
// types of less than four bits, IQ4_NL for IQ4_XS, Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K; where nothing fits,
// F16.
tensor::DType fitting_type(tensor::DType type, int64_t n);

}  // namespace caravan::gguf
