// The table of file types and their mixtures of tensor types.
#include "gguf/file_type.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <optional>

namespace caravan::gguf {
namespace {

using tensor::DType;

constexpr FileType kFileTypes[] = {
    {"F32", 0, DType::f32},      {"F16", 1, DType::f16},      {"BF16", 32, DType::bf16},   {"Q8_0", 7, DType::q8_0},
    {"Q6_K", 18, DType::q6_k},   {"Q5_K_M", 17, DType::q5_k}, {"Q5_K_S", 16, DType::q5_k}, {"Q4_K_M", 15, DType::q4_k},
    {"Q4_K_S", 14, DType::q4_k}, {"Q5_1", 9, DType::q5_1},    {"Q5_0", 8, DType::q5_0},    {"Q4_1", 3, DType::q4_1},
    {"Q4_0", 2, DType::q4_0},
};

bool is_float(DType type) { return type == DType::f32 || type == DType::f16 || type == DType::bf16; }

// The layer of "blk.<number>.<rest>", or nullopt.
std::optional<uint32_t> layer_of(std::string_view name) {
  if (!name.starts_with("blk.")) return std::nullopt;
  uint32_t layer = 0;
  const auto [end, error] = std::from_chars(name.data() + 4, name.data() + name.size(), layer);
  if (error != std::errc() || end == name.data() + name.size() || *end != '.') return std::nullopt;
  return layer;
}

// The layers that a medium mixture spends more bits on: the first eighth, the last eighth, every third between.
bool is_favoured_layer(uint32_t layer, uint32_t n_layer) {
  const uint32_t eighth = n_layer / 8;
  return layer < eighth || layer >= 7 * n_layer / 8 || (layer - eighth) % 3 == 2;
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

// The mixture alone, before row lengths are looked at.
DType mixture_type(const FileType& file_type, const MixtureContext& context, std::string_view name) {
  const DType base = file_type.base_type;
  const std::string_view kind = file_type.name;
  if (is_float(base) || base == DType::q8_0) return base;
  if (name == "output.weight" || (!context.has_output && name == "token_embd.weight")) return DType::q6_k;

  const auto layer = layer_of(name);
  if (!layer) return base;
  const bool is_k_medium = kind == "Q4_K_M" || kind == "Q5_K_M";
  if (contains(name, "attn_v.")) {
    if (context.n_expert == 8) return DType::q8_0;  // shared by all experts and small: worth it
    if (is_k_medium && is_favoured_layer(*layer, context.n_layer)) return DType::q6_k;
    if (kind == "Q4_K_S" && *layer < 4) return DType::q5_k;
  } else if (contains(name, "attn_k.")) {
    if (context.n_expert == 8) return DType::q8_0;
  } else if (contains(name, "ffn_down")) {
    if (is_k_medium && is_favoured_layer(*layer, context.n_layer)) return DType::q6_k;
    if (kind == "Q4_K_S" && *layer < context.n_layer / 8) return DType::q5_k;
  } else if (contains(name, "attn_output.")) {
    if (context.n_expert == 8 && base == DType::q4_k) return DType::q5_k;
  }
  return base;
}

// What holds rows of n values instead of type.
DType fit_row(DType type, int64_t n) {
  const auto fits = [n](DType t) { return n % tensor::dtype_info(t).block_length == 0; };
  if (fits(type)) return type;
  DType fallback = type;
  if (type == DType::q4_k) fallback = DType::q5_0;
  if (type == DType::q5_k) fallback = DType::q5_1;
  if (type == DType::q6_k) fallback = DType::q8_0;
  return fits(fallback) ? fallback : DType::f16;
}

}  // namespace

std::span<const FileType> file_types() { return kFileTypes; }

const FileType* find_file_type(std::string_view name) {
  for (const FileType& type : kFileTypes)
    if (std::equal(type.name.begin(), type.name.end(), name.begin(), name.end(),
                   [](unsigned char a, unsigned char b) { return std::toupper(a) == std::toupper(b); }))
      return &type;
  return nullptr;
}

std::string file_type_names() {
  std::string names;
  for (const FileType& type : kFileTypes) {
    if (!names.empty()) names += ", ";
    names += type.name;
  }
  return names;
}

DType choose_tensor_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                         std::span<const int64_t> ne) {
  const bool is_matrix = ne.size() >= 2 && name.ends_with(".weight");
  if (!is_matrix || contains(name, "_norm.") || contains(name, "ffn_gate_inp.")) return DType::f32;
  return fit_row(mixture_type(file_type, context, name), ne[0]);
}

}  // namespace caravan::gguf
