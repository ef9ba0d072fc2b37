// The folder of chunks: what was written is read again, limits hold, damage and full disks harm nobody.
#include "weights/chunk_cache.h"

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "base/file.h"
#include "support/kit.h"
#include "weights/memory_chunks.h"
#include "weights/pull.h"

namespace caravan::weights {
namespace {

using caravan::testing::TemporaryDirectory;
using testing::MemoryTensors;
using testing::PartialSource;
namespace fs = std::filesystem;

constexpr uint64_t kMiB = uint64_t{1} << 20;

std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files.push_back(entry.path());
  return files;
}

std::vector<std::byte> bytes_of(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// Everything a test writes is older than what it does later.
void age(const fs::path& folder, std::chrono::seconds by) {
  for (const fs::path& file : files_below(folder)) fs::last_write_time(file, fs::last_write_time(file) - by);
}

TEST(ChunkCache, GivesBackWhatWasWrittenAlsoToTheNextProcess) {
  const TemporaryDirectory folder;
  const auto bytes = bytes_of(100000, 1);
  const Digest digest = sha256(bytes);
  std::vector<std::byte> out(bytes.size());
  {
    ChunkCache cache(folder.path() / "deep" / "cache", kMiB);
    EXPECT_FALSE(cache.contains(digest));
    EXPECT_FALSE(cache.read(digest, out));
    cache.write(digest, bytes, ChunkCache::Clock::now());
  }
  ChunkCache cache(folder.path() / "deep" / "cache", kMiB);
  EXPECT_TRUE(cache.contains(digest));
  ASSERT_TRUE(cache.read(digest, out));
  EXPECT_EQ(out, bytes);
  EXPECT_EQ(cache.status().held_bytes, bytes.size());
  EXPECT_EQ(cache.status().read_bytes, bytes.size());
  EXPECT_TRUE(files_below(folder.path() / "deep" / "cache" / "tmp").empty());
}

TEST(ChunkCache, EvictsTheLongestUnusedFirst) {
  const TemporaryDirectory folder;
  ChunkCache cache(folder.path(), 10 * 1000);
  std::vector<Digest> digests;
  for (uint32_t i = 0; i < 10; ++i) {
    const auto bytes = bytes_of(1000, i);
    digests.push_back(sha256(bytes));
    cache.write(digests.back(), bytes, ChunkCache::Clock::now());
    cache.flush();
    age(folder.path() / "chunks", std::chrono::seconds(10));
  }
  std::vector<std::byte> out(1000);
  EXPECT_TRUE(cache.read(digests[0], out));  // used again
  const auto more = bytes_of(1000, 99);
  cache.write(sha256(more), more, ChunkCache::Clock::now() - std::chrono::seconds(1));
  cache.flush();
  EXPECT_TRUE(cache.contains(digests[0]));
  EXPECT_FALSE(cache.contains(digests[1]));
  EXPECT_TRUE(cache.contains(sha256(more)));
  EXPECT_LE(cache.status().held_bytes, 10000u);
  EXPECT_GE(cache.status().evicted_bytes, 1000u);
}

TEST(ChunkCache, KeepsAPartOfWhatIsLargerThanTheLimit) {
  const TemporaryDirectory folder;
  const MemoryTensors tensors({4000, 4000, 4000, 4000, 4000});
  ChunkCache cache(folder.path(), 10000);
  for (int load = 0; load < 3; ++load) {
    CacheSource cached(cache);
    PartialSource server(tensors, {0, 1, 2, 3, 4});
    std::vector<WeightSource*> sources{&cached, &server};
    pull(tensors.chunks(), sources, [](const ChunkRef&, std::span<const std::byte>) {});
    cache.flush();
    EXPECT_EQ(cached.delivered_bytes(), load == 0 ? 0u : 8000u) << "load " << load;
    EXPECT_LE(cache.status().held_bytes, 10000u);
    age(folder.path() / "chunks", std::chrono::seconds(10));
  }
  EXPECT_GE(cache.status().n_not_kept, 3u);
}

TEST(ChunkCache, DeletesDamagedFilesAndHoldsTheRightBytesAfterwards) {
  const TemporaryDirectory folder;
  const MemoryTensors tensors({4000, kChunkBytes + 400});
  ChunkCache cache(folder.path(), 100 * kMiB);
  const auto load = [&] {
    CacheSource cached(cache);
    PartialSource server(tensors, {0, 1, 2});
    std::vector<WeightSource*> sources{&cached, &server};
    size_t n = 0;
    pull(tensors.chunks(), sources, [&](const ChunkRef& chunk, std::span<const std::byte> bytes) {
      EXPECT_TRUE(std::ranges::equal(bytes, tensors.bytes_of(chunk)));
      ++n;
    });
    EXPECT_EQ(n, 3u);
    cache.flush();
    return server.delivered_bytes();
  };
  EXPECT_EQ(load(), tensors.manifest.size_bytes());
  EXPECT_EQ(load(), 0u);
  const auto files = files_below(folder.path() / "chunks");
  ASSERT_EQ(files.size(), 3u);
  for (const fs::path& file : files) {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(17);
    const char flipped = static_cast<char>(stream.get() ^ 1);
    stream.seekp(17);
    stream.put(flipped);
  }
  EXPECT_EQ(load(), tensors.manifest.size_bytes());
  EXPECT_EQ(cache.status().n_corrupt, 3u);
  EXPECT_EQ(load(), 0u);
  fs::resize_file(files[0], 10);
  EXPECT_GT(load(), 0u);
  EXPECT_EQ(load(), 0u);
}

TEST(ChunkCache, IsSharedByProcessesThatWriteAndEvictAtTheSameTime) {
  const TemporaryDirectory folder;
  std::vector<std::unique_ptr<ChunkCache>> caches;
  for (int i = 0; i < 3; ++i) caches.push_back(std::make_unique<ChunkCache>(folder.path(), 50 * 1000));
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < caches.size(); ++t)
    threads.emplace_back([&, t] {
      std::vector<std::byte> out(1000);
      for (uint32_t i = 0; i < 200; ++i) {
        const auto bytes = bytes_of(1000, i + t * 50);
        const Digest digest = sha256(bytes);
        if (caches[t]->read(digest, out)) {
          EXPECT_EQ(sha256(out), digest);
        }
        caches[t]->write(digest, bytes, ChunkCache::Clock::now() + std::chrono::hours(1));
      }
    });
  for (auto& thread : threads) thread.join();
  caches.clear();
  for (const fs::path& file : files_below(folder.path() / "chunks"))
    EXPECT_EQ(sha256(read_file(file)).hex(), file.filename().string());
}

TEST(ChunkCache, GivesAChunkOfUnknownSizeThatIsNoLongerThanAnyMayBe) {
  const TemporaryDirectory folder;
  ChunkCache cache(folder.path(), 100 * kMiB);
  const auto bytes = bytes_of(1000, 1);
  const Digest digest = sha256(bytes), absent{};
  cache.write(digest, bytes, ChunkCache::Clock::now());
  cache.flush();
  EXPECT_EQ(cache.read(digest), bytes);
  EXPECT_EQ(cache.status().read_bytes, 1000u);
  EXPECT_EQ(cache.read(absent), std::nullopt);
  fs::resize_file(folder.path() / "chunks" / digest.hex().substr(0, 2) / digest.hex(), kChunkBytes + 1);
  EXPECT_EQ(cache.read(digest), std::nullopt);
  EXPECT_FALSE(cache.contains(digest));
}

TEST(ChunkCache, GoesOnWhereNothingCanBeWritten) {
  const TemporaryDirectory folder;
  ChunkCache cache(folder.path(), 100 * kMiB);
  fs::remove_all(folder.path() / "tmp");  // files can no longer be created there
  const auto bytes = bytes_of(1000, 1);
  for (int i = 0; i < 10; ++i) cache.write(sha256(bytes), bytes, ChunkCache::Clock::now());
  cache.flush();
  EXPECT_FALSE(cache.contains(sha256(bytes)));
  EXPECT_EQ(cache.status().n_not_kept, 10u);
}

TEST(ChunkCache, RemovesWhatACrashLeft) {
  const TemporaryDirectory folder;
  fs::create_directories(folder.path() / "tmp");
  std::ofstream(folder.path() / "tmp" / "old") << "half a chunk";
  std::ofstream(folder.path() / "tmp" / "new") << "of a process that still writes";
  fs::last_write_time(folder.path() / "tmp" / "old", ChunkCache::Clock::now() - std::chrono::hours(2));
  const ChunkCache cache(folder.path(), kMiB);
  EXPECT_FALSE(fs::exists(folder.path() / "tmp" / "old"));
  EXPECT_TRUE(fs::exists(folder.path() / "tmp" / "new"));
}

TEST(ChunkCache, RefusesAFolderThatCannotBe) {
  const TemporaryDirectory folder;
  std::ofstream(folder.path() / "file") << "x";
  EXPECT_THROW(ChunkCache(folder.path() / "file", kMiB), SystemError);
}

}  // namespace
}  // namespace caravan::weights
