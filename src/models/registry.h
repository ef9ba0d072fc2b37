// The table of supported architectures.
#pragma once

#include <span>
#include <string_view>

#include "models/arch.h"

namespace caravan::models {

// All supported architectures.
std::span<const Arch* const> all_archs();

// The architecture of that name (GGUF general.architecture). Throws NotSupportedError naming it and listing what is
// supported.
const Arch& find_arch(std::string_view name);

// The architecture that metadata names.
const Arch& find_arch(const gguf::Metadata& metadata);

}  // namespace caravan::models
