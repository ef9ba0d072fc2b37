// Arbitrary bytes as a grammar and, after a zero byte, as an answer to it. What is accepted must be compiled, stepped
// and masked without fault, and the mask must agree with each token alone.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "engine/grammar_mask.h"
#include "vocabulary.h"

namespace caravan {
namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void check(engine::GrammarMachine& machine, engine::GrammarMasks& masks, const engine::TokenTrie& trie,
           std::string_view answer) {
  auto state = machine.initial();
  constexpr size_t kMaxMasks = 8;
  for (size_t i = 0; state != engine::GrammarMachine::kDead; ++i) {
    if (i < kMaxMasks) {
      const engine::TokenMask mask = masks.mask(state);
      for (int32_t token = 0; token < static_cast<int32_t>(trie.n_tokens()); ++token)
        require(mask.allows(token) == masks.allows(state, token), "the mask says what each token alone says");
    }
    if (i >= answer.size()) break;
    const auto next = machine.step(state, static_cast<uint8_t>(answer[i]));
    engine::GrammarMachine other(machine.automaton());
    if (i < kMaxMasks)
      require((other.step(machine.copy_state(state, other), static_cast<uint8_t>(answer[i])) == 0) == (next == 0),
              "a copied state goes on like its original");
    state = next;
  }
}

}  // namespace
}  // namespace caravan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  static const auto vocabulary = fuzz::byte_vocabulary();
  static const engine::TokenTrie trie(*vocabulary);
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(bytes.find('\0'), size);
  const auto find = [](std::string_view text) -> std::optional<int32_t> {
    if (text == "<s>") return 1;
    return std::nullopt;
  };
  try {
    const engine::GrammarAutomaton automaton(
        engine::parse_gbnf(bytes.substr(0, end), {static_cast<uint32_t>(vocabulary->size()), find}));
    engine::GrammarMachine machine(automaton);
    engine::GrammarMasks masks(machine, trie, {{1, "<s>"}});
    check(machine, masks, trie, bytes.substr(std::min(end + 1, size)));
  } catch (const RequestError&) {
  }
  return 0;
}
