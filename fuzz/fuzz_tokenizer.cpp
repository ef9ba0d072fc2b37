// Any text through one small vocabulary of each kind. The first byte chooses options; the rest is the text.
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../tests/vocab/small_vocabularies.h"
#include "vocab/utf8.h"
#include "vocab/vocabulary.h"

namespace {

using namespace caravan;
using namespace caravan::vocab;

struct Entry {
  std::unique_ptr<const Vocabulary> vocabulary;
  bool keeps_text;  // valid UTF-8 comes back as it was: byte-level BPE, RWKV
};

std::vector<Entry> load_vocabularies() {
  std::vector<Entry> out;
  for (const char* pre : {"gpt-2", "default", "llama-bpe", "deepseek-llm", "deepseek-v3", "gpt-4o", "tiny_aya",
                          "kimi-k2", "youtu", "exaone-moe", "afmoe", "chameleon", "jais-2"}) {
    out.push_back({Vocabulary::load(testing::small_bpe(pre).metadata()), true});
  }
  out.push_back({Vocabulary::load(testing::small_bpe("gemma4").metadata()), false});
  out.push_back({Vocabulary::load(testing::small_spm().metadata()), false});
  out.push_back({Vocabulary::load(testing::small_bert().metadata()), false});
  out.push_back({Vocabulary::load(testing::small_unigram().metadata()), false});
  out.push_back({Vocabulary::load(testing::small_rwkv().metadata()), true});
  return out;
}

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto vocabularies = load_vocabularies();
  if (size == 0) return 0;
  const auto parse = data[0] & 1 ? ParseSpecial::yes : ParseSpecial::no;
  const auto add = data[0] & 2 ? AddSpecial::yes : AddSpecial::no;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  for (const auto& [vocabulary, keeps_text] : vocabularies) {
    const auto tokens = vocabulary->tokenize(text, add, parse);
    IncrementalDetokenizer detokenizer(*vocabulary, RenderSpecial::yes);
    std::string streamed;
    for (const TokenId token : tokens) {
      const std::string characters = detokenizer.push(token);
      require(is_valid_utf8(characters));
      streamed += characters;
    }
    streamed += detokenizer.finish();
    const std::string whole = vocabulary->detokenize(tokens, RenderSpecial::yes);
    require(streamed == replace_invalid_utf8(whole));
    if (keeps_text && add == AddSpecial::no && is_valid_utf8(text)) require(whole == text);
  }
  return 0;
}
