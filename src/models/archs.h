// The architectures, one per file; registry.cpp lists them.
#pragma once

#include "models/arch.h"

namespace caravan::models {

extern const Arch kLlama;   // llama.cpp
extern const Arch kGemma3;  // gemma3.cpp
extern const Arch kBert;    // bert.cpp

}  // namespace caravan::models
