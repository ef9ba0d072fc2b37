// A vocabulary of all bytes and some words.
#pragma once

#include <array>
#include <cstdio>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gguf/metadata.h"
#include "vocab/vocabulary.h"

namespace caravan::engine::test {

// A SentencePiece vocabulary: <unk>, <s>, </s> (end of generation), the 256 bytes, then the words.
inline std::unique_ptr<const vocab::Vocabulary> word_vocabulary(const std::vector<std::string>& words) {
  std::vector<std::string> texts = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "<0x%02X>", static_cast<unsigned>(byte));
    texts.emplace_back(text);
    types.push_back(6);
  }
  for (const std::string& word : words) {
    texts.push_back(word);
    types.push_back(1);
  }
  gguf::Metadata metadata("test");
  metadata.set("tokenizer.ggml.model", gguf::Value::of("llama"));
  metadata.set("tokenizer.ggml.scores", gguf::Value::of(std::vector<float>(texts.size(), 0.0f)));
  metadata.set("tokenizer.ggml.tokens", gguf::Value::of(std::move(texts)));
  metadata.set("tokenizer.ggml.token_type", gguf::Value::of(types));
  metadata.set("tokenizer.ggml.bos_token_id", gguf::Value::of(uint32_t{1}));
  metadata.set("tokenizer.ggml.eos_token_id", gguf::Value::of(uint32_t{2}));
  return vocab::Vocabulary::load(metadata);
}

inline std::vector<std::string> random_words(std::mt19937& random, size_t n) {
  std::set<std::string> words;
  while (words.size() < n) {
    std::string word;
    for (size_t i = 0; i < 2 + random() % 4; ++i) word += std::array{"a", "b", "\xC3\xA9"}[random() % 3];
    words.insert(word);
  }
  return {words.begin(), words.end()};
}

}  // namespace caravan::engine::test
