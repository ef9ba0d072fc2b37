#include "models/arch.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/error.h"

namespace caravan::models {
namespace {

bool in_slice(const TensorDecl& decl, const Slice& slice) {
  switch (decl.scope) {
    case TensorDecl::Scope::embedding:
      return slice.embeds;
    case TensorDecl::Scope::output:
      return slice.outputs;
    case TensorDecl::Scope::layer:
      return decl.layer >= slice.layer_begin && decl.layer < slice.layer_end;
    case TensorDecl::Scope::every:
      return true;
  }
  return false;
}

void check_shape(const TensorDecl& decl, const graph::TensorDesc& found) {
  if (found.ne != decl.ne) {
    throw FormatError(fmt::format("tensor '{}': expected shape {}, found {}", decl.name, graph::to_string(decl.ne),
                                  graph::to_string(found.ne)));
  }
}

// The tensor of the file that serves a declaration: itself, its fallback, or none (optional).
std::optional<std::string> resolve(const TensorDecl& decl, const graph::TensorMap& file) {
  if (decl.presence == TensorDecl::Presence::unused) return std::nullopt;
  if (const auto found = file.find(decl.name); found != file.end()) {
    check_shape(decl, found->second);
    return decl.name;
  }
  if (!decl.fallback.empty() && file.contains(decl.fallback)) return decl.fallback;
  if (decl.presence == TensorDecl::Presence::optional) return std::nullopt;
  throw FormatError(fmt::format("tensor '{}' is missing: expected shape {}{}", decl.name, graph::to_string(decl.ne),
                                decl.fallback.empty() ? "" : ", or '" + decl.fallback + "' in its place"));
}

}  // namespace

graph::TensorMap tensor_map(const gguf::Model& model) {
  graph::TensorMap map;
  for (const gguf::TensorInfo& tensor : model.tensors()) map[tensor.name] = {tensor.type, tensor.ne};
  return map;
}

graph::TensorMap tensor_map(const weights::Manifest& manifest) {
  graph::TensorMap map;
  for (const weights::TensorEntry& tensor : manifest.tensors) map[tensor.name] = {tensor.type, tensor.ne};
  return map;
}

std::vector<TensorDecl> slice_tensors(const Arch& arch, const Hyperparameters& hp, const Slice& slice) {
  if (slice.layer_begin > slice.layer_end || slice.layer_end > hp.n_layer ||
      (slice.layer_begin == slice.layer_end && !slice.embeds && !slice.outputs)) {
    throw FormatError(fmt::format("slice of layers {} to {}: expected a part of the model's {} layers",
                                  slice.layer_begin, slice.layer_end, hp.n_layer));
  }
  if ((slice.embeds && slice.layer_begin != 0) || (slice.outputs && slice.layer_end != hp.n_layer)) {
    throw FormatError(
        fmt::format("slice of layers {} to {}: only the first slice embeds tokens and only the last one "
                    "gives outputs",
                    slice.layer_begin, slice.layer_end));
  }
  std::vector<TensorDecl> decls = arch.tensors(hp);
  std::erase_if(decls, [&](const TensorDecl& decl) { return !in_slice(decl, slice); });
  return decls;
}

std::vector<std::string> slice_tensor_names(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                                            const graph::TensorMap& file) {
  std::vector<std::string> names;
  std::set<std::string> seen;
  for (const TensorDecl& decl : slice_tensors(arch, hp, slice)) {
    auto name = resolve(decl, file);
    if (name && seen.insert(*name).second) names.push_back(std::move(*name));
  }
  return names;
}

void check_manifest(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                    const weights::Manifest& manifest) {
  const auto names = slice_tensor_names(arch, hp, slice, tensor_map(manifest));
  const std::set<std::string, std::less<>> expected(names.begin(), names.end());
  for (const weights::TensorEntry& tensor : manifest.tensors) {
    if (!expected.contains(tensor.name)) {
      throw FormatError(fmt::format("tensor '{}' {} does not belong to layers {} to {} of a {} model", tensor.name,
                                    graph::to_string(tensor.ne), slice.layer_begin, slice.layer_end, arch.name));
    }
  }
}

void check_model(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& file) {
  std::set<std::string, std::less<>> known;
  for (TensorDecl& decl : arch.tensors(hp)) known.insert(std::move(decl.name));
  for (const auto& [name, desc] : file) {
    // Activation scales of files that were calibrated for other devices; results do not depend on them.
    if (name.ends_with(".input_scale")) continue;
    if (!known.contains(name)) {
      throw NotSupportedError(fmt::format("tensor '{}' {} is not one that architecture '{}' is known to have here",
                                          name, graph::to_string(desc.ne), arch.name));
    }
  }
}

graph::Graph build_graph(const Arch& arch, const Hyperparameters& hp, const Slice& slice,
                         const graph::TensorMap& tensors) {
  graph::Builder builder(tensors);
  arch.build(builder, hp, slice);
  return builder.finish();
}

std::vector<CacheLayer> slice_cache_layers(const CacheGroup& group, const Slice& slice) {
  std::vector<CacheLayer> layers;
  for (const CacheLayer& layer : group.layers) {
    if (layer.layer >= slice.layer_begin && layer.layer < slice.layer_end) layers.push_back(layer);
  }
  return layers;
}

}  // namespace caravan::models
