// Chunks come from the first source that has them and are trusted only after their hash was checked.
#include "weights/source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "weights/test_model.h"

namespace caravan::weights {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::TestModel;

// Answers every request in one fixed way and counts them.
class FakeSource : public WeightSource {
 public:
  enum class Behaviour { absent, wrong_bytes, failing };
  explicit FakeSource(Behaviour behaviour) : behaviour_(behaviour) {}
  void announce(std::span<const ChunkRef>) override {}
  bool fetch(const ChunkRef&, std::span<std::byte> out) override {
    ++n_fetches;
    if (behaviour_ == Behaviour::failing) throw ProtocolError("the peer hung up");
    if (behaviour_ == Behaviour::absent) return false;
    std::fill(out.begin(), out.end(), std::byte{1});
    return true;
  }
  int n_fetches = 0;

 private:
  Behaviour behaviour_;
};

std::vector<std::byte> fetch(const ChunkRef& chunk, const std::vector<WeightSource*>& sources) {
  std::vector<std::byte> bytes(chunk.size_bytes());
  read_chunk(chunk, sources, bytes);
  return bytes;
}

TEST(WeightSource, DeliversEveryChunkOfAModel) {
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), {"big", "small"}, Hashing::sha256, nullptr, 1);
  ModelSource source(test.model());
  for (const TensorEntry& entry : manifest.tensors) {
    std::vector<std::byte> whole;
    for (uint64_t i = 0; i < n_chunks(entry.size_bytes); ++i) {
      const auto bytes = fetch({&entry, i}, {&source});
      whole.insert(whole.end(), bytes.begin(), bytes.end());
    }
    EXPECT_EQ(whole, test.model().read(test.model().get(entry.name))) << entry.name;
  }
}

TEST(WeightSource, FallsBackToTheNextSourceAfterAbsentWrongAndFailing) {
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), {"small"}, Hashing::sha256, nullptr, 1);
  FakeSource absent(FakeSource::Behaviour::absent), wrong(FakeSource::Behaviour::wrong_bytes),
      failing(FakeSource::Behaviour::failing), unused(FakeSource::Behaviour::failing);
  ModelSource good(test.model());
  const auto bytes = fetch({&manifest.tensors[0], 0}, {&absent, &wrong, &failing, &good, &unused});
  EXPECT_EQ(bytes, test.model().read(test.model().get("small")));
  EXPECT_EQ(absent.n_fetches, 1);
  EXPECT_EQ(wrong.n_fetches, 1);
  EXPECT_EQ(failing.n_fetches, 1);
  EXPECT_EQ(unused.n_fetches, 0);
}

TEST(WeightSource, SaysWhyEverySourceFailed) {
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), {"big"}, Hashing::sha256, nullptr, 1);
  FakeSource absent(FakeSource::Behaviour::absent), wrong(FakeSource::Behaviour::wrong_bytes),
      failing(FakeSource::Behaviour::failing);
  try {
    fetch({&manifest.tensors[0], 2}, {&absent, &wrong, &failing});
    FAIL() << "unverified bytes were accepted";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("chunk 2 of tensor 'big'"), HasSubstr("source 1: does not have it"),
                                    HasSubstr("source 2: expected SHA-256"), HasSubstr("source 3: the peer hung up")));
  }
}

TEST(WeightSource, TakesUnhashedChunksAsTheyAre) {
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), {"small"}, Hashing::none, nullptr, 1);
  FakeSource wrong(FakeSource::Behaviour::wrong_bytes);
  EXPECT_EQ(fetch({&manifest.tensors[0], 0}, {&wrong})[0], std::byte{1});
}

TEST(WeightSource, HasNoTensorOfAnotherSize) {
  const TestModel test;
  Manifest manifest = make_manifest(test.model(), {"small"}, Hashing::none, nullptr, 1);
  manifest.tensors[0].size_bytes = 404;
  ModelSource source(test.model());
  std::vector<std::byte> bytes(404);
  EXPECT_FALSE(source.fetch({&manifest.tensors[0], 0}, bytes));
}

}  // namespace
}  // namespace caravan::weights
