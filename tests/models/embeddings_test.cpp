// From text to embeddings, against the kit's references.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/cpu_features.h"
#include "base/file.h"
#include "device/cpu/cpu_device.h"
#include "support/kit.h"
#include "support/reference_evaluator.h"
#include "support/sequence_runner.h"
#include "vocab/vocabulary.h"

namespace caravan::models {
namespace {

using testing::Row;

std::vector<Row> hidden_rows(const gguf::Model& model, std::span<const int32_t> tokens) {
  device::cpu::CpuDevice device(1, select_isa(), 0);
  const stage::CacheConfig cache = testing::test_cache(model);
  const Arch& arch = find_arch(model.metadata());
  const Hyperparameters hp = arch.read(model.metadata());
  testing::SliceChain chain(device, model, {whole_model(hp)}, cache);
  testing::BatchBuilder builder(arch.cache_groups(hp), cache);
  std::vector<Row> rows;
  for (const auto& row : testing::sequence_rows(chain, builder, tokens, 64, stage::OutputKind::hidden)) {
    rows.emplace_back(row.begin(), row.end());
  }
  return rows;
}

double cosine(const Row& a, const Row& b) {
  const double dot = std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  return dot / std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0) *
                         std::inner_product(b.begin(), b.end(), b.begin(), 0.0));
}

// Mean- and CLS-pooled embeddings of the reference's texts.
void expect_reference(const std::filesystem::path& path, const std::filesystem::path& reference_path) {
  const auto reference = nlohmann::json::parse(read_text_file(reference_path));
  const gguf::Model model = gguf::Model::open(path);
  const auto vocabulary = vocab::Vocabulary::load(model.metadata());
  for (size_t i = 0; i < reference["texts"].size(); ++i) {
    const std::vector<int32_t> tokens =
        vocabulary->tokenize(reference["texts"][i].get<std::string>(), vocab::AddSpecial::yes, vocab::ParseSpecial::no);
    const auto rows = hidden_rows(model, tokens);
    Row mean(rows[0].size(), 0);
    for (const Row& row : rows) {
      for (size_t j = 0; j < row.size(); ++j) mean[j] += row[j] / static_cast<double>(rows.size());
    }
    const auto& expected = reference["normalised_embeddings"];
    EXPECT_GT(cosine(mean, expected["mean"][i].get<Row>()), 0.99999);
    EXPECT_GT(cosine(rows[0], expected["cls"][i].get<Row>()), 0.99999);
  }
}

TEST(KitEmbeddings, MatchTheReference) {
  CARAVAN_REQUIRE_KIT(kit);
  for (const std::string name : {"bert-dense", "nomic-bert-dense"}) {
    SCOPED_TRACE(name);
    expect_reference(kit / "models" / (name + ".gguf"), kit / "refs" / (name + ".json"));
  }
}

}  // namespace
}  // namespace caravan::models
