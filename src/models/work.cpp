#include "models/work.h"

#include <set>
#include <string>
#include <tuple>

namespace caravan::models {
namespace {

Work sum_of(const WorkByType& by_type) {
  Work sum;
  for (const auto& [type, work] : by_type) sum += work;
  return sum;
}

}  // namespace

Work ModelWork::per_prompt_row() const {
  Work sum;
  for (const WorkByType& layer : layers) sum += sum_of(layer);
  return sum;
}

Work ModelWork::per_token() const {
  Work sum = per_prompt_row();
  sum += sum_of(output);
  return sum;
}

ModelWork model_work(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors) {
  ModelWork work;
  work.layers.resize(hp.n_layer);
  std::set<std::pair<std::string, TensorDecl::Scope>> counted;
  for (const TensorDecl& decl : slice_tensors(arch, hp, whole_model(hp))) {
    if (decl.presence == TensorDecl::Presence::unused) continue;
    if (decl.scope != TensorDecl::Scope::layer && decl.scope != TensorDecl::Scope::output) continue;
    auto found = tensors.find(decl.name);
    if (found == tensors.end()) found = tensors.find(decl.fallback);
    // Optional and absent, or counted: one tensor may stand for several (attn_qkv).
    if (found == tensors.end() || !counted.insert({found->first, decl.scope}).second) continue;

    const auto& [dtype, ne] = found->second;
    const bool of_expert = decl.expert_axis.has_value() && hp.n_expert > 0;
    const double share = of_expert ? static_cast<double>(hp.n_expert_used) / hp.n_expert : 1.0;
    const auto n_rows = static_cast<double>(tensor::n_elements(ne)) / static_cast<double>(ne[0]);
    Work one;
    one.bytes = static_cast<double>(tensor::row_bytes(dtype, static_cast<uint64_t>(ne[0]))) * n_rows * share;
    if (decl.role == graph::WeightRole::matrix) one.multiplies = static_cast<double>(ne[0]) * n_rows * share;
    (decl.scope == TensorDecl::Scope::output ? work.output : work.layers[decl.layer])[dtype] += one;
  }
  return work;
}

std::vector<uint32_t> layer_kinds(const Arch& arch, const Hyperparameters& hp, const graph::TensorMap& tensors) {
  struct Form {
    std::vector<std::tuple<std::string, tensor::DType, tensor::Shape>> tensors;
    std::vector<std::tuple<size_t, uint32_t, uint32_t, uint32_t>> caches;  // group, heads and their widths
    auto operator<=>(const Form&) const = default;
  };
  std::vector<Form> forms(hp.n_layer);
  for (const TensorDecl& decl : slice_tensors(arch, hp, whole_model(hp))) {
    if (decl.scope != TensorDecl::Scope::layer || decl.presence == TensorDecl::Presence::unused) continue;
    auto found = tensors.find(decl.name);
    if (found == tensors.end()) found = tensors.find(decl.fallback);
    if (found == tensors.end()) continue;
    const std::string prefix = "blk." + std::to_string(decl.layer) + ".";
    const std::string& name = decl.name;
    const auto& [dtype, ne] = found->second;
    forms[decl.layer].tensors.emplace_back(name.starts_with(prefix) ? name.substr(prefix.size()) : name, dtype, ne);
  }
  const std::vector<CacheGroup> groups = arch.cache_groups(hp);
  for (size_t i = 0; i < groups.size(); ++i)
    for (const CacheLayer& layer : groups[i].layers)
      forms[layer.layer].caches.emplace_back(i, layer.n_head_kv, layer.head_dim_k, layer.head_dim_v);
  std::map<Form, uint32_t> numbers;
  std::vector<uint32_t> kinds;
  for (Form& form : forms)
    kinds.push_back(numbers.emplace(std::move(form), static_cast<uint32_t>(numbers.size())).first->second);
  return kinds;
}

std::vector<tensor::DType> main_types(const ModelWork& work) {
  constexpr double kNoteworthy = 1.0 / 50;
  WorkByType sums = work.output;
  for (const WorkByType& layer : work.layers)
    for (const auto& [type, part] : layer) sums[type] += part;
  double bytes = 0;
  for (const auto& [type, part] : sums) bytes += part.bytes;
  std::vector<tensor::DType> types;
  for (const auto& [type, part] : sums)
    if (part.bytes >= kNoteworthy * bytes) types.push_back(type);
  return types;
}

}  // namespace caravan::models
