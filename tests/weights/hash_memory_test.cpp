// Hashes are computed once per file, as long as it has not changed; damaged records are as good as none.
#include "weights/hash_memory.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "weights/test_model.h"

namespace caravan::weights {
namespace {

using caravan::testing::TemporaryDirectory;
using testing::TestModel;
namespace fs = std::filesystem;

const std::vector<std::string> kNames{"big", "small"};

FileHashes example() {
  FileHashes hashes;
  hashes.file = {"/models/a.gguf", 12345678, -5};
  hashes.tensors["empty"] = {32, 0, {}};
  hashes.tensors["one"] = {64, 10, {sha256({})}};
  hashes.tensors["three"] = {128, 2 * kChunkBytes + 1, std::vector<Digest>(3, sha256({}))};
  return hashes;
}

TEST(HashRecord, ReadsBackWhatWasWritten) { EXPECT_EQ(decode_hashes(encode_hashes(example()), "test"), example()); }

TEST(HashRecord, RefusesEveryTruncationAndEveryFlippedByte) {
  const auto record = encode_hashes(example());
  for (size_t n = 0; n < record.size(); ++n)
    EXPECT_THROW(decode_hashes(std::span(record).first(n), "test"), FormatError) << n;
  for (size_t i = 0; i < record.size(); ++i) {
    auto damaged = record;
    damaged[i] ^= std::byte{0x40};
    EXPECT_THROW(decode_hashes(damaged, "test"), FormatError) << i;
  }
}

TEST(ModelHashes, AreComputedOnceAndThenRemembered) {
  const TestModel test;
  const TemporaryDirectory folder;
  Manifest expected;
  {
    ModelHashes hashes(test.model(), HashMemory(folder.path() / "hashes"));
    EXPECT_FALSE(hashes.recalled());
    EXPECT_EQ(hashes.unknown_bytes(kNames), test.model().weight_bytes());
    hashes.compute(kNames, nullptr, 2);
    EXPECT_EQ(hashes.unknown_bytes(kNames), 0u);
    expected = hashes.manifest(kNames);
  }
  const Manifest direct = make_manifest(test.model(), kNames, Hashing::sha256, nullptr, 1);
  const ModelHashes again(test.model(), HashMemory(folder.path() / "hashes"));
  EXPECT_TRUE(again.recalled());
  ASSERT_EQ(again.unknown_bytes(kNames), 0u);
  const Manifest recalled = again.manifest(kNames);
  for (size_t i = 0; i < kNames.size(); ++i) {
    EXPECT_EQ(recalled.tensors[i].chunks, expected.tensors[i].chunks);
    EXPECT_EQ(recalled.tensors[i].chunks, direct.tensors[i].chunks);
  }
}

TEST(ModelHashes, OfAFileThatChangedAreForgotten) {
  const TestModel test;
  const TemporaryDirectory folder;
  ModelHashes(test.model(), HashMemory(folder.path())).compute(kNames, nullptr, 1);
  fs::last_write_time(test.path(), fs::last_write_time(test.path()) + std::chrono::seconds(1));
  const ModelHashes hashes(test.model(), HashMemory(folder.path()));
  EXPECT_FALSE(hashes.recalled());
  EXPECT_EQ(hashes.unknown_bytes(kNames), test.model().weight_bytes());
}

TEST(ModelHashes, WithADamagedRecordAreComputedAgain) {
  const TestModel test;
  const TemporaryDirectory folder;
  ModelHashes(test.model(), HashMemory(folder.path())).compute(kNames, nullptr, 1);
  for (const auto& entry : fs::directory_iterator(folder.path())) fs::resize_file(entry.path(), 50);
  EXPECT_FALSE(ModelHashes(test.model(), HashMemory(folder.path())).recalled());
}

TEST(ModelHashes, CanBeForgottenForGood) {
  const TestModel test;
  const TemporaryDirectory folder;
  ModelHashes hashes(test.model(), HashMemory(folder.path()));
  hashes.compute(kNames, nullptr, 1);
  hashes.forget();
  EXPECT_EQ(hashes.unknown_bytes(kNames), test.model().weight_bytes());
  EXPECT_FALSE(ModelHashes(test.model(), HashMemory(folder.path())).recalled());
}

TEST(ModelHashes, AreComputedEvenWhereNothingCanBeRemembered) {
  const TestModel test;
  const TemporaryDirectory folder;
  std::ofstream(folder.path() / "file") << "x";
  for (const fs::path& where : {fs::path(), folder.path() / "file"}) {
    ModelHashes hashes(test.model(), HashMemory(where));
    hashes.compute(kNames, nullptr, 1);
    EXPECT_EQ(hashes.unknown_bytes(kNames), 0u);
  }
}

}  // namespace
}  // namespace caravan::weights
