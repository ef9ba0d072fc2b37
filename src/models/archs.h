// The architectures, one per file; registry.cpp lists them.
#pragma once

#include "models/arch.h"

namespace caravan::models {

extern const Arch kLlama;       // llama.cpp
extern const Arch kQwen2;       // qwen2.cpp
extern const Arch kQwen3;       // qwen3.cpp
extern const Arch kGemma2;      // gemma2.cpp
extern const Arch kGemma3;      // gemma3.cpp
extern const Arch kPhi3;        // phi3.cpp
extern const Arch kMistral3;    // mistral3.cpp
extern const Arch kGlm4;        // glm4.cpp
extern const Arch kCommandR;    // command_r.cpp
extern const Arch kCohere2;     // cohere2.cpp
extern const Arch kOlmo2;       // olmo2.cpp
extern const Arch kStarcoder2;  // starcoder2.cpp
extern const Arch kFalcon;      // falcon.cpp
extern const Arch kGpt2;        // gpt2.cpp
extern const Arch kSmollm3;     // smollm3.cpp
extern const Arch kGranite;     // granite.cpp
extern const Arch kQwen3Moe;    // qwen3moe.cpp
extern const Arch kGptOss;      // gpt_oss.cpp
extern const Arch kDeepseek2;   // deepseek2.cpp
extern const Arch kBert;        // bert.cpp
extern const Arch kNomicBert;   // nomic_bert.cpp

}  // namespace caravan::models
