// Small vocabularies of every kind, made by hand, for tests and for the fuzz target.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
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
    if (model == "llama" || model == "t5") out.set("tokenizer.ggml.scores", gguf::Value::of(scores));
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

// The bytes of a charsmap (vocab/charsmap.h) that replaces the keys, none empty, by their values. Built here by first
// fit, with a base of its own for every node that has children.
inline std::vector<uint8_t> charsmap_bytes(const std::map<std::string, std::string>& replacements) {
  struct Node {
    std::map<uint8_t, size_t> children;
    int64_t value = -1;
  };
  std::vector<Node> nodes(1);
  std::string values;
  for (const auto& [from, to] : replacements) {
    size_t node = 0;
    for (const char c : from) {
      const auto [child, is_new] = nodes[node].children.try_emplace(static_cast<uint8_t>(c), nodes.size());
      node = child->second;
      if (is_new) nodes.emplace_back();
    }
    nodes[node].value = static_cast<int64_t>(values.size());
    values += to + '\0';
  }

  std::vector<uint32_t> units(256);
  std::vector<bool> used(256), base_used;
  std::vector<size_t> places(nodes.size());  // a node's unit; parents come before children
  used[0] = true;
  for (size_t n = 0; n < nodes.size(); n++) {
    std::vector<uint32_t> labels;
    if (nodes[n].value >= 0) labels.push_back(0);
    for (const auto& [byte, child] : nodes[n].children) labels.push_back(byte);
    if (labels.empty()) continue;
    uint32_t base = 1;
    const auto is_taken = [&] {
      if (base < base_used.size() && base_used[base]) return true;
      for (const uint32_t label : labels) {
        if ((base ^ label) < used.size() && used[base ^ label]) return true;
      }
      return false;
    };
    while (is_taken()) base++;
    const size_t size = (base / 256 + 1) * 256;
    if (units.size() < size) units.resize(size), used.resize(size);
    base_used.resize(units.size());
    base_used[base] = true;
    units[places[n]] |= (static_cast<uint32_t>(places[n]) ^ base) << 10 | (nodes[n].value >= 0 ? 1u << 8 : 0);
    for (const uint32_t label : labels) used[base ^ label] = true;
    if (nodes[n].value >= 0) units[base] = 1u << 31 | static_cast<uint32_t>(nodes[n].value);
    for (const auto& [byte, child] : nodes[n].children) {
      places[child] = base ^ byte;
      units[places[child]] = byte;
    }
  }
  std::vector<uint8_t> bytes(4 + units.size() * 4);
  const auto n_bytes = static_cast<uint32_t>(units.size() * 4);
  std::memcpy(bytes.data(), &n_bytes, 4);
  std::memcpy(bytes.data() + 4, units.data(), n_bytes);
  bytes.insert(bytes.end(), values.begin(), values.end());
  return bytes;
}

// What small_unigram() normalises: white space, wide and ligature forms, a character with its accent, a removed one.
inline std::map<std::string, std::string> small_replacements() {
  return {{"\t", " "},           {"\u3000", " "}, {"\uFF21", "A"}, {"\uFF41", "a"},   {"\uFB01", "fi"},
          {"e\u0301", "\u00E9"}, {"\u00AD", ""},  {"\u2460", "1"}, {"e\u0301!", "?"}, {"\u4E2D", "ab"}};
}

// Unigram: <pad>, </s>, <unk>, pieces with scores, one user-defined token, a charsmap; XLM-R's spaces.
inline VocabularyBuilder small_unigram() {
  VocabularyBuilder v;
  v.model = "t5";
  v.add("<pad>", kControl);
  v.add("</s>", kControl);
  v.add("<unk>", kUnknown);
  const std::pair<const char*, float> pieces[] = {
      {"▁", -3},  {"h", -6},  {"e", -5},       {"l", -5},  {"o", -5},    {"w", -7},      {"r", -6},
      {"d", -7},  {"a", -5},  {"é", -8},       {"he", -8}, {"ll", -8},   {"hello", -12}, {"▁hello", -9},
      {"▁w", -7}, {"or", -8}, {"▁world", -10}, {"aa", -9}, {"aaa", -14}, {"fi", -7},     {"A", -9},
      {"ab", -9}, {"b", -7},  {"1", -6},       {"lo", -9}, {"ell", -11}};
  for (const auto& [text, score] : pieces) v.add(text, 1, score);
  v.add("<tool>", kUserDefined);
  const auto bytes = charsmap_bytes(small_replacements());
  v.set("tokenizer.ggml.precompiled_charsmap", gguf::Value::of(std::vector<int32_t>(bytes.begin(), bytes.end())));
  v.set("tokenizer.ggml.add_space_prefix", gguf::Value::of(true));
  v.set("tokenizer.ggml.remove_extra_whitespaces", gguf::Value::of(true));
  return v;
}

// RWKV: <s>, the 256 bytes (id 1 + byte) as escapes or themselves, longer tokens.
inline VocabularyBuilder small_rwkv() {
  VocabularyBuilder v;
  v.model = "rwkv";
  v.add("<s>", kControl);
  for (int byte = 0; byte < 256; byte++) {
    std::array<char, 5> text{};
    if (byte >= 32 && byte < 127 && byte != '\\') {
      text[0] = static_cast<char>(byte);
    } else {
      std::snprintf(text.data(), text.size(), "\\x%02x", static_cast<unsigned>(byte));
    }
    v.add(text.data());
  }
  for (const char* text :
       {"he", "hell", "hello", " world", " w", "\\n\\n", "\\t", "\\\\n", "é", "\\xf0\\x9f", "a\\'b"}) {
    v.add(text);
  }
  return v;
}

}  // namespace caravan::testing
