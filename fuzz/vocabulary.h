// A vocabulary of the 256 bytes and three special tokens, for fuzz targets.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gguf/metadata.h"
#include "vocab/vocabulary.h"

namespace caravan::fuzz {

// <unk>, <s>, </s> (end of generation), then the bytes.
inline std::unique_ptr<const vocab::Vocabulary> byte_vocabulary() {
  std::vector<std::string> texts = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};  // unknown, control, control
  constexpr char kHex[] = "0123456789ABCDEF";
  for (int byte = 0; byte < 256; ++byte) {
    texts.push_back(std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">");
    types.push_back(6);  // a byte
  }
  gguf::Metadata metadata("fuzzing");
  metadata.set("tokenizer.ggml.model", gguf::Value::of("llama"));
  metadata.set("tokenizer.ggml.scores", gguf::Value::of(std::vector<float>(texts.size(), 0.0f)));
  metadata.set("tokenizer.ggml.tokens", gguf::Value::of(std::move(texts)));
  metadata.set("tokenizer.ggml.token_type", gguf::Value::of(types));
  metadata.set("tokenizer.ggml.bos_token_id", gguf::Value::of(uint32_t{1}));
  metadata.set("tokenizer.ggml.eos_token_id", gguf::Value::of(uint32_t{2}));
  return vocab::Vocabulary::load(metadata);
}

}  // namespace caravan::fuzz
