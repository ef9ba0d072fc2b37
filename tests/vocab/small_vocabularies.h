// Small vocabularies of every kind, made by hand, for tests and for the fuzz target.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "gguf/metadata.h"

namespace caravan::testing {

// GPT-2's printable character for a byte, as UTF-8.
inline std::string spell_byte(int byte) {
  const auto stands_for_itself = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  };
  int character = byte;
  if (!stands_for_itself(byte)) {
    character = 256;
    for (int b = 0; b < byte; b++) character += stands_for_itself(b) ? 0 : 1;
  }
  if (character < 128) return std::string(1, static_cast<char>(character));
  return {static_cast<char>(0xC0 | character >> 6), static_cast<char>(0x80 | (character & 63))};
}

inline std::string spell(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += spell_byte(static_cast<uint8_t>(c));
  return out;
}

inline std::string byte_token_text(int byte) {
  std::array<char, 7> text{};
  std::snprintf(text.data(), text.size(), "<0x%02X>", static_cast<unsigned>(byte));
  return text.data();
}

// Collects tokens; ids count from 0 in order of add().
struct VocabularyBuilder {
  std::string model, pre;
  std::vector<std::string> texts, merges;
  std::vector<float> scores;
  std::vector<int32_t> types;
  std::vector<std::pair<std::string, gguf::Value>> more;

  int32_t add(std::string text, int32_t type = 1, float score = 0) {
    texts.push_back(std::move(text));
    types.push_back(type);
    scores.push_back(score);
    return static_cast<int32_t>(texts.size()) - 1;
  }
  void set(const std::string& key, gguf::Value value) { more.emplace_back(key, std::move(value)); }

  gguf::Metadata metadata() const {
    gguf::Metadata out("small vocabulary");
    out.set("general.architecture", gguf::Value::of("llama"));
    out.set("tokenizer.ggml.model", gguf::Value::of(model));
    if (!pre.empty()) out.set("tokenizer.ggml.pre", gguf::Value::of(pre));
    out.set("tokenizer.ggml.tokens", gguf::Value::of(texts));
    out.set("tokenizer.ggml.token_type", gguf::Value::of(types));
    if (model == "llama") out.set("tokenizer.ggml.scores", gguf::Value::of(scores));
    if (model == "gpt2" || model == "gemma4") out.set("tokenizer.ggml.merges", gguf::Value::of(merges));
    for (const auto& [key, value] : more) out.set(key, value);
    return out;
  }
};

// Types, as GGUF numbers them.
inline constexpr int32_t kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6;

// Byte-level BPE: token b is byte b, then merged tokens from 256 on, then special ones.
inline VocabularyBuilder small_bpe(const std::string& pre = "gpt-2") {
  VocabularyBuilder v;
  v.model = "gpt2";
  v.pre = pre;
  for (int byte = 0; byte < 256; byte++) v.add(spell_byte(byte));
  const std::pair<const char*, const char*> merges[] = {
      {"h", "e"},   {"l", "l"}, {"he", "ll"},     {"hell", "o"},    {" ", "w"},           {"o", "r"},
      {" w", "or"}, {"l", "d"}, {" wor", "ld"},   {" ", " "},       {"\n", "\n"},         {"a", "a"},
      {"aa", "aa"}, {"1", "2"}, {"\xC3", "\xA9"}, {"\xF0", "\x9F"}, {"\xF0\x9F", "\x98"}, {"o", "h"}};
  for (const auto& [left, right] : merges) {
    v.merges.push_back(spell(left) + " " + spell(right));
    v.add(spell(std::string(left) + right));
  }
  v.set("tokenizer.ggml.bos_token_id", gguf::Value::of(static_cast<uint32_t>(v.add("<|start|>x", kControl))));
  v.set("tokenizer.ggml.eos_token_id", gguf::Value::of(static_cast<uint32_t>(v.add("<|stop|>", kControl))));
  v.add("<|eot_id|>", kControl);
  v.add("<tool>", kUserDefined);
  v.add("<tool>s", kUserDefined);
  return v;
}

// SPM: <unk>, <s>, </s>, 256 byte tokens (id 3 + byte), pieces, one user-defined token.
inline VocabularyBuilder small_spm() {
  VocabularyBuilder v;
  v.model = "llama";
  v.add("<unk>", kUnknown);
  v.add("<s>", kControl);
  v.add("</s>", kControl);
  for (int byte = 0; byte < 256; byte++) v.add(byte_token_text(byte), kByte);
  const std::pair<const char*, float> pieces[] = {
      {"▁", -1},     {"h", -2},       {"e", -3},       {"l", -4},    {"o", -5},   {"w", -6},
      {"r", -7},     {"d", -8},       {"a", -9},       {"é", -10},   {"he", -11}, {"ll", -12},
      {"hell", -13}, {"hello", -14},  {"▁hello", -15}, {"▁w", -16},  {"or", -17}, {"▁wor", -18},
      {"ld", -19},   {"▁world", -20}, {"aa", -21},     {"aaaa", -21}};
  for (const auto& [text, score] : pieces) v.add(text, 1, score);
  v.add("<tool>", kUserDefined);
  return v;
}

// WordPiece: the five special tokens, words, continuations, punctuation.
inline VocabularyBuilder small_bert() {
  VocabularyBuilder v;
  v.model = "bert";
  v.add("[PAD]", kControl);
  v.add("[UNK]", kControl);
  v.add("[CLS]", kControl);
  v.add("[SEP]", kControl);
  v.add("[MASK]", kControl);
  for (const char* word :
       {"▁hello", "▁hell", "o", "▁wor", "ld", "s", "▁,", "▁!", "▁中", "▁a", "▁cafe", "▁Cafe", "▁café", "▁$"}) {
    v.add(word);
  }
  v.set("tokenizer.ggml.unknown_token_id", gguf::Value::of(uint32_t{1}));
  v.set("tokenizer.ggml.cls_token_id", gguf::Value::of(uint32_t{2}));
  v.set("tokenizer.ggml.seperator_token_id", gguf::Value::of(uint32_t{3}));
  v.set("tokenizer.ggml.padding_token_id", gguf::Value::of(uint32_t{0}));
  v.set("tokenizer.ggml.mask_token_id", gguf::Value::of(uint32_t{4}));
  return v;
}

}  // namespace caravan::testing
