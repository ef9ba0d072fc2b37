// Manifests: hashes of every chunk whatever the number of threads, and checks of those from outside.
#include "weights/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "weights/test_model.h"

namespace caravan::weights {
namespace {

using ::testing::HasSubstr;
using testing::TestModel;

std::string refusal(const Manifest& manifest) {
  try {
    validate(manifest);
    return "accepted";
  } catch (const FormatError& error) {
    return error.what();
  }
}

TEST(Manifest, HashesEveryChunkOnAnyNumberOfThreads) {
  const TestModel test;
  const std::vector<std::string> names{"big", "small"};
  const Manifest one = make_manifest(test.model(), names, Hashing::sha256, nullptr, 1);
  ASSERT_EQ(one.tensors.size(), 2U);
  EXPECT_EQ(one.tensors[0].name, "big") << "in the order asked for";
  ASSERT_EQ(one.tensors[0].chunks.size(), 3U);
  ASSERT_EQ(one.tensors[1].chunks.size(), 1U);
  const auto bytes = test.model().read(test.model().get("big"));
  for (size_t i = 0; i < 3; ++i) {
    const size_t begin = i * kChunkBytes;
    const size_t size = std::min<size_t>(kChunkBytes, bytes.size() - begin);
    EXPECT_EQ(one.tensors[0].chunks[i], sha256(std::span(bytes).subspan(begin, size))) << "chunk " << i;
  }
  for (const int n_threads : {0, 2, 3, 50}) {
    Progress progress("hashing", one.size_bytes());
    const Manifest other = make_manifest(test.model(), names, Hashing::sha256, &progress, n_threads);
    for (size_t i = 0; i < 2; ++i) EXPECT_EQ(other.tensors[i].chunks, one.tensors[i].chunks) << n_threads;
  }
  EXPECT_EQ(refusal(one), "accepted");
  EXPECT_EQ(one.size_bytes(), test.model().weight_bytes());
  EXPECT_EQ(one.find("small"), &one.tensors[1]);
  EXPECT_EQ(one.find("none"), nullptr);
}

TEST(Manifest, HasNoHashesWhenNoneAreWanted) {
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), {"small"}, Hashing::none, nullptr, 1);
  EXPECT_TRUE(manifest.tensors[0].chunks.empty());
  EXPECT_EQ(refusal(manifest), "accepted");
}

TEST(Manifest, NamesTheTensorThatTheModelLacks) {
  const TestModel test;
  EXPECT_THROW(make_manifest(test.model(), {"absent"}, Hashing::none, nullptr, 1), FormatError);
}

TEST(Manifest, ReportsAFileThatShrankWhileItWasHashed) {
  const TestModel test;
  std::filesystem::resize_file(test.path(), kChunkBytes);
  EXPECT_THROW(make_manifest(test.model(), {"big", "small"}, Hashing::sha256, nullptr, 3), FormatError);
}

TEST(Manifest, RefusesEntriesThatContradictThemselves) {
  const TestModel test;
  const Manifest good = make_manifest(test.model(), {"big", "small"}, Hashing::sha256, nullptr, 2);
  const auto changed = [&](auto change) {
    Manifest manifest = good;
    change(manifest.tensors[0]);
    return refusal(manifest);
  };
  EXPECT_THAT(changed([](TensorEntry& e) { e.name = ""; }), HasSubstr("no name"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.name = "small"; }), HasSubstr("tensor 'small' occurs twice"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.type = static_cast<tensor::DType>(77); }), HasSubstr("type 77"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.size_bytes -= 4; }), HasSubstr("bytes for its type and shape, found"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.ne[1] = 0; }), HasSubstr("dimension 1 is 0"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.ne = {int64_t{1} << 40, int64_t{1} << 40, 1, 1}; }),
              HasSubstr("overflows"));
  EXPECT_THAT(changed([](TensorEntry& e) { e.chunks.pop_back(); }),
              HasSubstr("expected 3 chunk hashes or none, found 2"));
}

}  // namespace
}  // namespace caravan::weights
