// The table of file types and their mixtures of tensor types.
#include "gguf/file_type.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <optional>

namespace caravan::gguf {
namespace {

using tensor::DType;

// Those of one or two bits that cannot be written need data about the importance of weights, or have no quantiser here.
constexpr FileType kFileTypes[] = {
    // name, number, type of most matrices, can be written, description
    {"F32", 0, DType::f32, true, "all F32"},
    {"F16", 1, DType::f16, true, "F16"},
    {"BF16", 32, DType::bf16, true, "BF16"},
    {"Q8_0", 7, DType::q8_0, true, "Q8_0"},
    {"Q6_K", 18, DType::q6_k, true, "Q6_K"},
    {"Q5_K_M", 17, DType::q5_k, true, "Q5_K - Medium"},
    {"Q5_K_S", 16, DType::q5_k, true, "Q5_K - Small"},
    {"Q5_1", 9, DType::q5_1, true, "Q5_1"},
    {"Q5_0", 8, DType::q5_0, true, "Q5_0"},
    {"Q4_K_M", 15, DType::q4_k, true, "Q4_K - Medium"},
    {"Q4_K_S", 14, DType::q4_k, true, "Q4_K - Small"},
    {"IQ4_NL", 25, DType::iq4_nl, true, "IQ4_NL - 4.5 bpw"},
    {"IQ4_XS", 30, DType::iq4_xs, true, "IQ4_XS - 4.25 bpw"},
    {"Q4_1", 3, DType::q4_1, true, "Q4_1"},
    {"Q4_0", 2, DType::q4_0, true, "Q4_0"},
    {"MXFP4_MOE", 38, DType::mxfp4, true, "MXFP4 MoE"},
    {"Q3_K_L", 13, DType::q3_k, true, "Q3_K - Large"},
    {"Q3_K_M", 12, DType::q3_k, true, "Q3_K - Medium"},
    {"Q3_K_S", 11, DType::q3_k, true, "Q3_K - Small"},
    {"Q2_K", 10, DType::q2_k, true, "Q2_K - Medium"},
    {"TQ2_0", 37, DType::tq2_0, true, "TQ2_0 - 2.06 bpw ternary"},
    {"TQ1_0", 36, DType::tq1_0, true, "TQ1_0 - 1.69 bpw ternary"},
    {"Q2_K_S", 21, DType::q2_k, false, "Q2_K - Small"},
    {"IQ3_M", 27, DType::iq3_s, false, "IQ3_S mix - 3.66 bpw"},
    {"IQ3_S", 26, DType::iq3_s, false, "IQ3_S - 3.4375 bpw"},
    {"IQ3_XS", 22, DType::iq3_s, false, "IQ3_XS - 3.3 bpw"},
    {"IQ3_XXS", 23, DType::iq3_xxs, false, "IQ3_XXS - 3.0625 bpw"},
    {"IQ2_M", 29, DType::iq2_s, false, "IQ2_M - 2.7 bpw"},
    {"IQ2_S", 28, DType::iq2_xs, false, "IQ2_S - 2.5 bpw"},
    {"IQ2_XS", 20, DType::iq2_xs, false, "IQ2_XS - 2.3125 bpw"},
    {"IQ2_XXS", 19, DType::iq2_xxs, false, "IQ2_XXS - 2.0625 bpw"},
    {"IQ1_M", 31, DType::iq1_m, false, "IQ1_M - 1.75 bpw"},
    {"IQ1_S", 24, DType::iq1_s, false, "IQ1_S - 1.5625 bpw"},
    {"NVFP4", 39, DType::nvfp4, false, "NVFP4"},
    {"Q1_0", 40, DType::q1_0, false, "Q1_0"},
    {"Q2_0", 41, DType::q2_0, false, "Q2_0"},
};

constexpr std::pair<std::string_view, std::string_view> kShortNames[] = {
    {"Q3_K", "Q3_K_M"}, {"Q4_K", "Q4_K_M"}, {"Q5_K", "Q5_K_M"}};

// Parts of the names of matrices that keep their type: small, or used otherwise than in matrix products.
constexpr std::string_view kKeptParts[] = {"_norm.weight",
                                           "ffn_gate_inp.weight",
                                           "altup",
                                           "laurel",
                                           "per_layer_model_proj",
                                           "ssm_conv1d",
                                           "shortconv.conv.weight",
                                           "attn_rel_b.weight",
                                           "time_mix_first.weight",
                                           "time_mix_w0.weight",
                                           "time_mix_w1.weight",
                                           "time_mix_w2.weight",
                                           "time_mix_v0.weight",
                                           "time_mix_v1.weight",
                                           "time_mix_v2.weight",
                                           "time_mix_a0.weight",
                                           "time_mix_a1.weight",
                                           "time_mix_a2.weight",
                                           "time_mix_g1.weight",
                                           "time_mix_g2.weight",
                                           "time_mix_decay_w1.weight",
                                           "time_mix_decay_w2.weight",
                                           "time_mix_lerp_fused.weight"};

bool equal_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::toupper(x) == std::toupper(y); });
}

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

// What the rules below look at.
struct MixtureCase {
  std::string_view kind;  // the file type's name
  DType base;
  const MixtureContext& context;
  uint32_t layer;
  bool is_first_eighth() const { return layer < context.n_layer / 8; }
  bool is_favoured() const { return is_favoured_layer(layer, context.n_layer); }
  bool is_falcon() const { return context.architecture == "falcon"; }
  bool is(std::string_view name) const { return kind == name; }
};

// attn_v, and the matrices that hold it with others.
DType value_type(const MixtureCase& c) {
  const bool shared_widely = c.context.n_head_per_kv >= 4;
  DType type = c.base;
  if (c.is("Q2_K")) type = shared_widely ? DType::q4_k : DType::q3_k;
  if (c.is("Q3_K_M")) type = c.layer < 2 ? DType::q5_k : DType::q4_k;
  if (c.is("Q3_K_L")) type = DType::q5_k;
  if ((c.is("IQ4_NL") || c.is("IQ4_XS")) && shared_widely) type = DType::q5_k;
  if ((c.is("Q4_K_M") || c.is("Q5_K_M")) && c.is_favoured()) type = DType::q6_k;
  if (c.is("Q4_K_S") && c.layer < 4) type = DType::q5_k;
  // The 70B llamas' value matrix is an eighth of the query's: more bits cost little.
  const bool is_llama_70b = c.context.architecture == "llama" && c.context.n_layer == 80 && c.context.n_head_per_kv > 1;
  if (is_llama_70b && (type == DType::q3_k || type == DType::q4_k)) type = DType::q5_k;
  return c.context.n_expert == 8 ? DType::q8_0 : type;  // shared by all experts and small: worth it
}

DType ffn_down_type(const MixtureCase& c) {
  if (c.is("Q2_K")) return DType::q3_k;
  if (c.is("Q3_K_M")) {
    if (c.layer < c.context.n_layer / 16) return DType::q5_k;
    return !c.is_falcon() || c.is_favoured() ? DType::q4_k : DType::q3_k;
  }
  if (c.is("Q3_K_L")) return c.is_falcon() ? DType::q4_k : DType::q5_k;
  if (c.is("Q4_K_M") && c.is_falcon()) {
    if (c.layer < c.context.n_layer / 16) return DType::q6_k;
    return c.is_favoured() ? DType::q5_k : DType::q4_k;
  }
  if ((c.is("Q4_K_M") || c.is("Q5_K_M")) && c.is_favoured()) return DType::q6_k;
  if ((c.is("IQ4_NL") || c.is("IQ4_XS")) && c.is_first_eighth()) return DType::q5_k;
  if (c.is("Q4_K_S") && c.is_first_eighth() && !c.is_falcon()) return DType::q5_k;
  return c.base;
}

DType attention_output_type(const MixtureCase& c) {
  if (c.is_falcon()) return c.is("Q3_K_L") ? DType::q4_k : c.base;
  if (c.context.n_expert == 8) {
    for (const std::string_view kind : {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M"})
      if (c.is(kind)) return DType::q5_k;
    return c.base;
  }
  if (c.is("Q2_K")) return DType::q3_k;
  if (c.is("Q3_K_M")) return DType::q4_k;
  if (c.is("Q3_K_L")) return DType::q5_k;
  return c.base;
}

}  // namespace

std::span<const FileType> file_types() { return kFileTypes; }

const FileType* find_file_type(std::string_view name) {
  for (const auto& [short_name, full_name] : kShortNames)
    if (equal_ignoring_case(short_name, name)) return find_file_type(full_name);
  for (const FileType& type : kFileTypes)
    if (equal_ignoring_case(type.name, name)) return &type;
  return nullptr;
}

const FileType* find_file_type(uint32_t number) {
  for (const FileType& type : kFileTypes)
    if (type.number == number) return &type;
  return nullptr;
}

std::string file_type_names() {
  std::string names;
  for (const FileType& type : kFileTypes) {
    if (!type.can_write) continue;
    if (!names.empty()) names += ", ";
    names += type.name;
  }
  return names;
}

std::string file_type_description(const Metadata& metadata) {
  const auto number = metadata.find_u32("general.file_type");
  if (!number) return "unknown";
  const FileType* type = find_file_type(*number);
  return type != nullptr ? std::string(type->description) : fmt::format("file type {}", *number);
}

MixtureContext mixture_context(const Metadata& metadata, bool has_output) {
  MixtureContext context;
  context.architecture = metadata.get_string("general.architecture");
  const auto key = [&](std::string_view name) { return fmt::format("{}.{}", context.architecture, name); };
  context.n_layer = metadata.get_u32(key("block_count"));
  context.n_expert = metadata.get_u32(key("expert_count"), 0);
  context.has_output = has_output;
  // Either may be an array with a number per layer; the first layer's counts.
  const auto first = [&](const std::string& name) -> int64_t {
    const Value* value = metadata.find(name);
    if (value == nullptr || value->type != ValueType::array) return metadata.get_u32(name, 0);
    const auto numbers = metadata.get_integers(name);
    return numbers.empty() ? 0 : numbers[0];
  };
  const int64_t n_head = first(key("attention.head_count")), n_head_kv = first(key("attention.head_count_kv"));
  if (n_head_kv > 0 && n_head >= n_head_kv) context.n_head_per_kv = static_cast<uint32_t>(n_head / n_head_kv);
  return context;
}

bool takes_file_type(std::string_view name, std::span<const int64_t> ne) {
  const bool is_matrix = std::any_of(ne.begin() + (ne.empty() ? 0 : 1), ne.end(), [](int64_t n) { return n > 1; });
  if (!is_matrix || !name.ends_with("weight")) return false;
  if (name == "position_embd.weight" || name == "token_types.weight") return false;
  return std::none_of(std::begin(kKeptParts), std::end(kKeptParts),
                      [&](std::string_view part) { return contains(name, part); });
}

DType mixture_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                   std::span<const int64_t> ne) {
  const DType base = file_type.base_type;
  const std::string_view kind = file_type.name;
  if (is_float(base)) return base;
  const bool is_embedding = name == "token_embd.weight" || name == "per_layer_token_embd.weight";
  if (name == "output.weight" || (!context.has_output && is_embedding)) {
    const bool fits = ne[0] % tensor::dtype_info(base).block_length == 0;
    if (kind == "MXFP4_MOE" || base == DType::q8_0 || !fits || context.architecture == "falcon") return DType::q8_0;
    return DType::q6_k;
  }
  if (kind == "MXFP4_MOE") return ne.size() >= 3 && ne[2] > 1 ? DType::mxfp4 : DType::q8_0;
  if (is_embedding) return kind == "TQ1_0" || kind == "TQ2_0" ? DType::q4_k : base;

  const auto layer = layer_of(name);
  if (!layer) return base;
  const MixtureCase c{kind, base, context, *layer};
  if (contains(name, "attn_v.weight") || contains(name, "attn_qkv.weight") || contains(name, "attn_kv_b.weight"))
    return value_type(c);
  if (contains(name, "attn_k.weight")) return context.n_expert == 8 ? DType::q8_0 : base;
  if (contains(name, "ffn_down")) return ffn_down_type(c);
  if (contains(name, "attn_output.weight")) return attention_output_type(c);
  return base;
}

DType choose_tensor_type(const FileType& file_type, const MixtureContext& context, std::string_view name,
                         std::span<const int64_t> ne) {
  if (!takes_file_type(name, ne)) return DType::f32;
  const DType type = mixture_type(file_type, context, name, ne);
  return is_float(type) ? type : fitting_type(type, ne[0]);
}

DType fitting_type(DType type, int64_t n) {
  const auto fits = [n](DType t) { return n % tensor::dtype_info(t).block_length == 0; };
  if (fits(type)) return type;
  DType fallback = DType::iq4_nl;  // the IQ types
  if (type == DType::q2_k || type == DType::q3_k || type == DType::tq1_0 || type == DType::tq2_0 ||
      type == DType::q2_0 || type == DType::q1_0)
    fallback = DType::q4_0;
  if (type == DType::q4_k) fallback = DType::q5_0;
  if (type == DType::q5_k) fallback = DType::q5_1;
  if (type == DType::q6_k) fallback = DType::q8_0;
  return fits(fallback) ? fallback : DType::f16;
}

}  // namespace caravan::gguf
