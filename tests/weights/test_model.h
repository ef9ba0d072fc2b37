// A GGUF file with one tensor of three chunks and one of a fraction of a chunk, for the tests of this folder.
#pragma once

#include <cstring>
#include <random>

#include "gguf/reader.h"
#include "gguf/writer.h"
#include "support/kit.h"
#include "weights/manifest.h"

namespace caravan::weights::testing {

class TestModel {
 public:
  TestModel() : path_(folder_.path() / "model.gguf"), model_(write_and_open(path_)) {}
  const std::filesystem::path& path() const { return path_; }
  const gguf::Model& model() const { return model_; }

 private:
  static gguf::Model write_and_open(const std::filesystem::path& path) {
    gguf::Writer writer(path, gguf::Metadata());
    constexpr int64_t kBigValues = static_cast<int64_t>(2 * kChunkBytes / 4 + 1000);
    writer.declare("small", tensor::DType::f32, std::vector<int64_t>{100});
    writer.declare("big", tensor::DType::f32, std::vector<int64_t>{kBigValues});
    writer.begin_data();
    std::mt19937 random(5);
    for (size_t i = 0; i < 2; ++i) {
      std::vector<uint32_t> words(writer.tensors()[i].size_bytes / 4);
      for (uint32_t& word : words) word = static_cast<uint32_t>(random());
      writer.write(i, 0, std::as_bytes(std::span(words)));
    }
    writer.finish();
    return gguf::Model::open(path);
  }

  caravan::testing::TemporaryDirectory folder_;
  std::filesystem::path path_;
  gguf::Model model_;
};

}  // namespace caravan::weights::testing
