// Many chunks from several sources: each once, in order within its tensor, whatever fails.
#include "weights/pull.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "weights/memory_chunks.h"

namespace caravan::weights {
namespace {

using testing::MemoryTensors;
using testing::PartialSource;

const std::vector<uint64_t> kSizes{100, kChunkBytes * 3 + 4, kChunkBytes, 8, kChunkBytes * 2};
constexpr size_t kChunks = 1 + 4 + 1 + 1 + 2;

std::set<size_t> numbers(size_t from, size_t to) {
  std::set<size_t> set;
  for (size_t i = from; i < to; ++i) set.insert(i);
  return set;
}

// Pulls everything and checks what is handed out.
void pull_and_check(const MemoryTensors& tensors, const std::vector<WeightSource*>& sources) {
  const auto chunks = tensors.chunks();
  std::map<const TensorEntry*, uint64_t> next;
  size_t n = 0;
  pull(chunks, sources, [&](const ChunkRef& chunk, std::span<const std::byte> bytes) {
    EXPECT_EQ(chunk.index, next[chunk.tensor]++);
    EXPECT_TRUE(std::ranges::equal(bytes, tensors.bytes_of(chunk)));
    ++n;
  });
  EXPECT_EQ(n, chunks.size());
}

TEST(Pull, TakesEachChunkFromTheFirstSourceThatMayHaveIt) {
  const MemoryTensors tensors(kSizes);
  PartialSource first(tensors, {0, 3, 7}), second(tensors, {3, 4, 5}), last(tensors, numbers(0, kChunks));
  second.fetchers = 2;
  pull_and_check(tensors, {&first, &second, &last});
  EXPECT_EQ(first.looked_for.size(), kChunks);
  EXPECT_EQ(second.looked_for, (std::vector<size_t>{1, 2, 4, 5, 6, 8}));
  EXPECT_EQ(last.looked_for, (std::vector<size_t>{1, 2, 6, 8}));
  EXPECT_EQ(first.announced, (std::vector<size_t>{0, 3, 7}));
  EXPECT_EQ(second.announced, (std::vector<size_t>{4, 5}));
  EXPECT_EQ(last.announced, (std::vector<size_t>{1, 2, 6, 8}));
  EXPECT_EQ(first.n_fetches, 3u);
  EXPECT_EQ(second.n_fetches, 2u);
  EXPECT_EQ(last.n_fetches, 4u);
  EXPECT_EQ(first.delivered_bytes() + second.delivered_bytes() + last.delivered_bytes(), tensors.manifest.size_bytes());
}

TEST(Pull, TellsThatItAsksSources) {
  const MemoryTensors tensors(kSizes);
  PartialSource first(tensors, {0, 3}), last(tensors, numbers(0, kChunks));
  WeightSource* const sources[] = {&first, &last};
  const auto ignore = [](const ChunkRef&, std::span<const std::byte>) {};
  size_t n = 0;
  pull(tensors.chunks(), sources, ignore, {}, [&] { ++n; });
  EXPECT_EQ(n, kChunks + kChunks - 2) << "once for each chunk and source that is asked for it";
  EXPECT_THROW(pull(tensors.chunks(), sources, ignore, {}, [] { throw Error("given up"); }), Error);
}

TEST(Pull, OffersEarlierSourcesWhatALaterOneDelivered) {
  const MemoryTensors tensors(kSizes);
  PartialSource first(tensors, {1}), second(tensors, {2}), last(tensors, numbers(0, kChunks));
  pull_and_check(tensors, {&first, &second, &last});
  EXPECT_EQ(first.n_offers, kChunks - 1);
  EXPECT_EQ(second.n_offers, kChunks - 2);
  EXPECT_EQ(last.n_offers, 0u);
  EXPECT_EQ(first.n_wrong_offers + second.n_wrong_offers, 0u);
}

TEST(Pull, AsksTheNextSourceAfterWrongBytesAbsenceAndBreaking) {
  const MemoryTensors tensors(kSizes);
  PartialSource wrong(tensors, numbers(0, kChunks)), absent(tensors, {}), breaking(tensors, numbers(0, kChunks)),
      last(tensors, numbers(0, kChunks));
  wrong.wrong = numbers(0, kChunks);
  absent.claims_all = true;
  breaking.breaks_at = 2;
  pull_and_check(tensors, {&wrong, &absent, &breaking, &last});
  EXPECT_EQ(wrong.n_rejected, kChunks);
  EXPECT_EQ(breaking.n_fetches, 3u) << "a source that broke is not asked again";
  EXPECT_EQ(last.n_fetches, kChunks - 2);
}

TEST(Pull, HelpsASlowSourceWithTheTensorsThatItHasNotBegun) {
  const MemoryTensors tensors(kSizes);
  PartialSource slow(tensors, numbers(0, kChunks)), last(tensors, numbers(0, kChunks));
  slow.is_slow = true;
  std::atomic<bool> slow_has_begun = false;
  slow.begins_to_fetch = [&] {
    slow_has_begun = true;
    while (last.n_fetches < kChunks - 1) std::this_thread::yield();
  };
  last.begins_to_fetch = [&] {
    while (!slow_has_begun) std::this_thread::yield();
  };
  std::vector<WeightSource*> sources{&slow, &last};
  const auto chunks = tensors.chunks();
  size_t n = 0;
  pull(chunks, sources, [&](const ChunkRef&, std::span<const std::byte>) { ++n; },
       {.before_help = std::chrono::milliseconds(0), .seconds_left = 0});
  EXPECT_EQ(n, kChunks);
  EXPECT_EQ(slow.n_fetches, 1u);
  EXPECT_EQ(last.n_fetches, kChunks - 1);
  EXPECT_EQ(last.announced.size(), kChunks - 1);
  EXPECT_EQ(last.announced.front(), 7u) << "the last tensor comes first, from its beginning";
}

TEST(Pull, GivesBackWhatCannotBeHelpedWith) {
  const MemoryTensors tensors(kSizes);
  for (const bool absent : {true, false}) {
    PartialSource slow(tensors, numbers(0, kChunks)), last(tensors, numbers(0, absent ? 0 : kChunks));
    slow.is_slow = true;
    last.claims_all = true;
    last.wrong = numbers(0, kChunks);
    std::atomic<bool> slow_has_begun = false;
    slow.begins_to_fetch = [&] {
      slow_has_begun = true;
      while (last.n_fetches == 0) std::this_thread::yield();
    };
    last.begins_to_fetch = [&] {
      while (!slow_has_begun) std::this_thread::yield();
    };
    std::vector<WeightSource*> sources{&slow, &last};
    const auto chunks = tensors.chunks();
    size_t n = 0;
    pull(chunks, sources, [&](const ChunkRef&, std::span<const std::byte>) { ++n; },
         {.before_help = std::chrono::milliseconds(0), .seconds_left = 0});
    EXPECT_EQ(n, kChunks);
    EXPECT_EQ(slow.n_fetches, kChunks);
    EXPECT_GT(last.n_fetches, 0u);
  }
}

TEST(Pull, DoesNotHelpASourceThatIsFastEnough) {
  const MemoryTensors tensors(kSizes);
  PartialSource fast(tensors, numbers(0, kChunks)), last(tensors, numbers(0, kChunks));
  fast.is_slow = true;
  std::vector<WeightSource*> sources{&fast, &last};
  const auto chunks = tensors.chunks();
  pull(chunks, sources, [](const ChunkRef&, std::span<const std::byte>) {},
       {.before_help = std::chrono::milliseconds(0), .seconds_left = 1e12});
  EXPECT_EQ(last.n_fetches, 0u);
}

// Every way to spread nine chunks over a source that holds some and one that is asked for the rest after all.
TEST(Pull, EndsForEverySpreadOfTheChunks) {
  const MemoryTensors tensors(kSizes);
  for (uint32_t held = 0; held < (1u << kChunks); held += 37) {
    std::set<size_t> first_has, wrong;
    for (size_t i = 0; i < kChunks; ++i) {
      if ((held >> i & 1) != 0) first_has.insert(i);
      if ((held >> (kChunks - 1 - i) & 1) != 0) wrong.insert(i);
    }
    PartialSource first(tensors, first_has), last(tensors, numbers(0, kChunks));
    first.wrong = wrong;
    pull_and_check(tensors, {&first, &last});
  }
}

TEST(Pull, SaysWhichChunkNobodyDeliversAndWhy) {
  const MemoryTensors tensors(kSizes);
  PartialSource wrong(tensors, numbers(0, kChunks)), absent(tensors, {});
  wrong.wrong = {4};
  absent.claims_all = true;
  try {
    pull_and_check(tensors, {&wrong, &absent});
    FAIL() << "it was delivered";
  } catch (const SourceError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("chunk 3 of tensor 't1'"), std::string::npos) << text;
    EXPECT_NE(text.find("expected SHA-256"), std::string::npos) << text;
    EXPECT_NE(text.find("does not have it"), std::string::npos) << text;
  }
}

TEST(Pull, PassesOnWhatTheUserOfTheBytesThrows) {
  const MemoryTensors tensors(kSizes);
  PartialSource source(tensors, numbers(0, kChunks));
  std::vector<WeightSource*> sources{&source};
  size_t n = 0;
  EXPECT_THROW(pull(tensors.chunks(), sources,
                    [&](const ChunkRef&, std::span<const std::byte>) {
                      if (++n == 3) throw FormatError("enough");
                    }),
               FormatError);
  EXPECT_EQ(n, 3u);
}

TEST(Pull, OfNothingDoesNothing) {
  PartialSource source(MemoryTensors({}), {});
  std::vector<WeightSource*> sources{&source};
  pull({}, sources, [](const ChunkRef&, std::span<const std::byte>) { FAIL(); });
}

}  // namespace
}  // namespace caravan::weights
