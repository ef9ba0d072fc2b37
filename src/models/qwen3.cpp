// qwen3: qwen2 with an RMS norm on every query and key head before rotation.
// Source: Qwen Team 2025, arXiv:2505.09388. Rerankers hold a classifier too, which generation has no use for.
#include "models/archs.h"
#include "models/decoder.h"

namespace caravan::models {
namespace {

Hyperparameters read(const gguf::Metadata& metadata) {
  return read_decoder(metadata, {.query_key_norm = QueryKeyNorm::head});
}

std::vector<TensorDecl> tensors(const Hyperparameters& hp) {
  std::vector<TensorDecl> decls = decoder_tensors(hp);
  TensorDecl& classifier = decls.emplace_back();
  classifier.name = "cls.output.weight";
  classifier.scope = TensorDecl::Scope::output;
  classifier.presence = TensorDecl::Presence::unused;
  return decls;
}

}  // namespace

const Arch kQwen3{"qwen3", read, tensors, decoder_cache_groups, build_decoder};

}  // namespace caravan::models
