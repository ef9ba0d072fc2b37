// Files of a folder serve whatever bytes they hold, under any name, hashed or not yet.
#include "weights/model_library.h"

#include <gtest/gtest.h>

#include <fstream>

#include "weights/memory_chunks.h"
#include "weights/pull.h"
#include "weights/test_model.h"

namespace caravan::weights {
namespace {

using caravan::testing::TemporaryDirectory;
using testing::MemoryTensors;
using testing::TestModel;
namespace fs = std::filesystem;

const std::vector<std::string> kNames{"big", "small"};

// Bytes that the library delivers of the test model.
uint64_t delivered(ModelLibrary& library, const TestModel& test, const Manifest& manifest) {
  LibrarySource source(library);
  ModelSource server(test.model());
  std::vector<WeightSource*> sources{&source, &server};
  std::vector<ChunkRef> chunks;
  for (const TensorEntry& tensor : manifest.tensors)
    for (uint64_t i = 0; i < n_chunks(tensor.size_bytes); ++i) chunks.push_back({&tensor, i});
  pull(chunks, sources, [](const ChunkRef&, std::span<const std::byte>) {});
  return source.delivered_bytes();
}

struct Fixture {
  Fixture() {
    fs::create_directories(folder.path() / "models" / "deep");
    fs::copy_file(test.path(), file);
  }
  HashMemory memory() const { return HashMemory(folder.path() / "hashes"); }
  const TestModel test;
  const Manifest manifest = make_manifest(test.model(), kNames, Hashing::sha256, nullptr, 1);
  const TemporaryDirectory folder;
  const fs::path models = folder.path() / "models";
  const fs::path file = models / "deep" / "another name.gguf";
};

TEST(ModelLibrary, ServesAFileOfAnyNameBeforeItIsHashed) {
  const Fixture f;
  ModelLibrary library(f.models, f.memory());
  const ModelLibrary::Rest rest(library);  // no background hashing from here on
  EXPECT_EQ(delivered(library, f.test, f.manifest), f.manifest.size_bytes());
}

TEST(ModelLibrary, HashesInTheBackgroundOnceForAllStarts) {
  const Fixture f;
  {
    ModelLibrary library(f.models, f.memory());
    library.wait_until_hashed();
    EXPECT_EQ(library.status().hashed_bytes, f.manifest.size_bytes());
    EXPECT_TRUE(library.contains(f.manifest.tensors[0].chunks[0]));
    EXPECT_FALSE(library.contains(Digest{}));
  }
  ModelLibrary library(f.models, f.memory());
  EXPECT_EQ(library.status().hashed_bytes, f.manifest.size_bytes());
  EXPECT_EQ(library.status().n_models, 1u);
  EXPECT_EQ(delivered(library, f.test, f.manifest), f.manifest.size_bytes());
  const auto bytes = library.read(f.manifest.tensors[0].chunks[2]);
  ASSERT_TRUE(bytes);
  EXPECT_EQ(sha256(*bytes), f.manifest.tensors[0].chunks[2]);
}

TEST(ModelLibrary, FindsHashedBytesUnderOtherTensorNames) {
  const Fixture f;
  ModelLibrary library(f.models, f.memory());
  library.wait_until_hashed();
  Manifest renamed = f.manifest;
  for (TensorEntry& tensor : renamed.tensors) tensor.name += ".renamed";
  LibrarySource source(library);
  for (const TensorEntry& tensor : renamed.tensors)
    for (uint64_t i = 0; i < n_chunks(tensor.size_bytes); ++i) {
      std::vector<std::byte> bytes(ChunkRef{&tensor, i}.size_bytes());
      EXPECT_TRUE(source.fetch({&tensor, i}, bytes));
      EXPECT_EQ(sha256(bytes), tensor.chunks[i]);
    }
}

TEST(ModelLibrary, TakesNoNameForItsContent) {
  const Fixture f;
  ModelLibrary library(f.models, f.memory());
  const ModelLibrary::Rest rest(library);
  Manifest other = f.manifest;  // of the same names and shapes, other bytes
  for (TensorEntry& tensor : other.tensors)
    for (Digest& digest : tensor.chunks) digest = sha256(std::as_bytes(std::span(digest.bytes)));
  LibrarySource source(library);
  for (int pass = 0; pass < 2; ++pass)
    for (const TensorEntry& tensor : other.tensors)
      for (uint64_t i = 0; i < n_chunks(tensor.size_bytes); ++i) {
        std::vector<std::byte> bytes(ChunkRef{&tensor, i}.size_bytes());
        EXPECT_EQ(source.may_have({&tensor, i}), pass == 0) << "what was read once is known not to be it";
        EXPECT_FALSE(source.fetch({&tensor, i}, bytes));
      }
  EXPECT_EQ(library.status().hashed_bytes, f.manifest.size_bytes());
}

TEST(ModelLibrary, NoticesFilesThatComeChangeAndGo) {
  const Fixture f;
  ModelLibrary library(f.models, f.memory());
  library.wait_until_hashed();
  fs::rename(f.file, f.folder.path() / "elsewhere");
  library.refresh();
  EXPECT_EQ(library.status().n_models, 0u);
  EXPECT_EQ(library.status().hashed_bytes, 0u);
  EXPECT_EQ(delivered(library, f.test, f.manifest), 0u);
  std::ofstream(f.models / "broken.gguf") << "GGUF, but not really";
  fs::rename(f.folder.path() / "elsewhere", f.models / "back.gguf");
  EXPECT_EQ(delivered(library, f.test, f.manifest), f.manifest.size_bytes());
  EXPECT_EQ(library.status().n_models, 1u);
}

TEST(ModelLibrary, NeverServesBytesThatChangedUnderIt) {
  const Fixture f;
  ModelLibrary library(f.models, f.memory());
  library.wait_until_hashed();
  const auto time = fs::last_write_time(f.file);
  const gguf::Model copy = gguf::Model::open(f.file);
  {
    std::fstream stream(f.file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(static_cast<std::streamoff>(copy.get("big").offset + kChunkBytes));
    stream << "other bytes";
  }
  fs::last_write_time(f.file, time);                          // nobody could tell from outside
  const uint64_t n = delivered(library, f.test, f.manifest);  // pull() checks what it hands out
  EXPECT_LT(n, f.manifest.size_bytes());
  library.wait_until_hashed();
  EXPECT_EQ(delivered(library, f.test, f.manifest), f.manifest.size_bytes() - kChunkBytes);
}

TEST(ModelLibrary, RefusesAFolderThatIsNone) {
  EXPECT_THROW(ModelLibrary("/there/is/no/such/folder", HashMemory()), SystemError);
}

}  // namespace
}  // namespace caravan::weights
