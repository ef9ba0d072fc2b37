// One answer of the engine, piece by piece, that Ctrl-C ends.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"

namespace caravan::app {

struct Answer {
  enum class End { eos, limit, word, interrupted };
  End end = End::eos;
  std::vector<int32_t> tokens;  // without the end-of-generation token
  engine::Timings timings;
  uint32_t n_prompt_tokens = 0;
};

// Generates until the answer ends or Ctrl-C is pressed (interrupts.h). Throws RequestError when it fails.
Answer generate(engine::Engine& engine, engine::GenerateParams params,
                const std::function<void(std::string_view text)>& on_text);

// "[ prompt: 12 tokens, 345.0 tokens/s | generation: 67 tokens, 89.0 tokens/s ]"
std::string describe(const engine::Timings& timings);

}  // namespace caravan::app
