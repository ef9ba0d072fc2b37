#include "models/registry.h"

#include <fmt/format.h>

#include <array>

#include "base/error.h"
#include "models/archs.h"

namespace caravan::models {

std::span<const Arch* const> all_archs() {
  static constexpr std::array kArchs{&kLlama,   &kQwen2,    &kQwen3,    &kGemma2, &kGemma3,     &kPhi3,   &kMistral3,
                                     &kGlm4,    &kCommandR, &kCohere2,  &kOlmo2,  &kStarcoder2, &kFalcon, &kGpt2,
                                     &kSmollm3, &kGranite,  &kQwen3Moe, &kGptOss, &kDeepseek2,  &kBert,   &kNomicBert};
  return kArchs;
}

const Arch& find_arch(std::string_view name) {
  std::string supported;
  for (const Arch* arch : all_archs()) {
    if (arch->name == name) return *arch;
    supported += (supported.empty() ? "" : ", ") + std::string(arch->name);
  }
  throw NotSupportedError(
      fmt::format("model architecture '{}' is not supported; supported architectures: {}", name, supported));
}

const Arch& find_arch(const gguf::Metadata& metadata) { return find_arch(metadata.get_string("general.architecture")); }

}  // namespace caravan::models
