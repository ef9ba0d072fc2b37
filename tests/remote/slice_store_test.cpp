// Reservations, sharing, keeping and evicting of weights on a backend.
#include "remote/slice_store.h"

#include <gtest/gtest.h>

#include <future>

#include "fake_host.h"

namespace caravan::remote {
namespace {

using testing::FakeHost;
using testing::FakeModel;

Digest key_of(const FakeModel& model) { return stage::content_key(model.request); }

struct Loader {
  Loader(SliceStore& store, FakeHost& host, FakeModel& model)
      : lease(store.reserve(0, host.need(0, model.request), key_of(model))) {
    weights::WeightSource* const sources[] = {&model.source};
    loaded = store.load(lease, model.request, sources, [](uint64_t) {}, {});
  }
  SliceStore::Lease lease;
  SliceStore::Loaded loaded;
};

// A FakeModel of n bytes needs n + 4000 (KV) + 160 (scratch).
constexpr uint64_t kOwn = 4160;

TEST(SliceStore, CountsWeightsOnceAndSessionsEach) {
  FakeHost host(100000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(20000);
  const Loader first(store, host, model), second(store, host, model);
  EXPECT_FALSE(first.loaded.shared);
  EXPECT_TRUE(second.loaded.shared);
  EXPECT_EQ(first.loaded.weights, second.loaded.weights);
  EXPECT_EQ(host.n_loads, 1);
  EXPECT_EQ(store.memory_free().at(0), 100000 - 20000 - 2 * kOwn);
}

TEST(SliceStore, RefusesWithNeedAndHave) {
  FakeHost host(30000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(20000, 1), other(20000, 2);
  const Loader first(store, host, model);
  try {
    store.reserve(0, host.need(0, other.request), key_of(other));
    FAIL() << "reserved";
  } catch (const ResourceError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("need 24 KiB"), std::string::npos) << text;
    EXPECT_NE(text.find("have 5.7 KiB of 29 KiB free"), std::string::npos) << text;
  }
  EXPECT_EQ(store.memory_free().at(0), 30000 - 20000 - kOwn);  // the refusal took nothing
}

TEST(SliceStore, RefusesNeedsThatOverflow) {
  FakeHost host(30000);
  SliceStore store(host, std::chrono::seconds(300));
  EXPECT_THROW(store.reserve(0, {~uint64_t{0}, 1, 0}, Digest{}), Error);
  EXPECT_THROW(store.reserve(0, {~uint64_t{0} - 1, 0, 0}, Digest{}), ResourceError);
  EXPECT_THROW(store.reserve(1, {1, 1, 1}, Digest{}), ProtocolError);
}

TEST(SliceStore, KeepsWeightsNobodyUsesUntilTheTimeIsOver) {
  FakeHost host(100000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(20000);
  {
    const Loader gone(store, host, model);
  }
  EXPECT_EQ(host.n_weights, 1);
  EXPECT_EQ(store.memory_free().at(0), 100000u);  // kept weights count as free
  store.expire(SliceStore::Clock::now() + std::chrono::seconds(200));
  EXPECT_EQ(host.n_weights, 1);
  {
    EXPECT_TRUE(Loader(store, host, model).loaded.shared);
  }
  store.expire(SliceStore::Clock::now() + std::chrono::seconds(301));
  EXPECT_EQ(host.n_weights, 0);
  EXPECT_EQ(store.n_resident(), 0u);
}

TEST(SliceStore, EvictsTheLongestUnusedFirstAndNeverWhatIsUsed) {
  FakeHost host(70000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel a(20000, 1), b(20000, 2), c(20000, 3), d(20000, 4);
  const Loader used(store, host, a);
  {
    const Loader gone(store, host, b);
  }
  {
    const Loader gone(store, host, c);
  }  // evicts b: 3 x 20000 + 2 x 4160 are under 70000, so nothing yet
  EXPECT_EQ(store.n_resident(), 3u);
  const Loader last(store, host, d);  // in b's place
  EXPECT_EQ(store.n_resident(), 3u);
  {
    const auto lease = store.reserve(0, {20000, 0, 0}, key_of(c));  // takes no more memory: c is still there
    EXPECT_TRUE(store.load(lease, c.request, {}, [](uint64_t) {}, {}).shared);
  }
  EXPECT_THROW(Loader(store, host, b), ResourceError);  // a and d are used, c goes, and it is not enough
}

TEST(SliceStore, LetsTheNextLoadWhenTheFirstFails) {
  FakeHost host(100000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(20000), empty(20000);
  empty.source.tensors.clear();
  EXPECT_THROW(Loader(store, host, empty), weights::SourceError);
  EXPECT_EQ(store.n_resident(), 0u);
  EXPECT_EQ(store.memory_free().at(0), 100000u);
  EXPECT_FALSE(Loader(store, host, model).loaded.shared);
}

TEST(SliceStore, GoesOnWithALoadThatBrokeOff) {
  // Delivers two chunks and breaks.
  class BreakingSource : public weights::WeightSource {
   public:
    explicit BreakingSource(weights::WeightSource& source) : source_(source) {}
    bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
      if (++n_ > 2) throw Error("the connection was lost");
      return source_.fetch(chunk, out);
    }

   private:
    weights::WeightSource& source_;
    int n_ = 0;
  };
  FakeHost host(64 << 20);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(4 * weights::kChunkBytes);
  {
    BreakingSource breaking(model.source);
    weights::WeightSource* const sources[] = {&breaking};
    const auto lease = store.reserve(0, host.need(0, model.request), key_of(model));
    EXPECT_THROW(store.load(lease, model.request, sources, [](uint64_t) {}, {}), weights::SourceError);
  }
  EXPECT_EQ(store.n_resident(), 0u);
  EXPECT_EQ(store.memory_free().at(0), uint64_t{64} << 20) << "what broke off makes room when it must";
  model.source.n_bytes = 0;
  const Loader loader(store, host, model);
  EXPECT_FALSE(loader.loaded.shared);
  // The second chunk may have been on its way to the device.
  EXPECT_GE(model.source.n_bytes, 2 * weights::kChunkBytes);
  EXPECT_LE(model.source.n_bytes, 3 * weights::kChunkBytes);
  EXPECT_EQ(host.n_loads, 1);
}

TEST(SliceStore, WaitsForASliceThatIsBeingLoadedAndGivesUpOnRequest) {
  // A source that waits for a signal stands for a slow network.
  class SlowSource : public weights::WeightSource {
   public:
    explicit SlowSource(weights::WeightSource& source) : source_(source) {}
    void announce(std::span<const weights::ChunkRef>) override {}
    bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
      asked.set_value();
      released.get_future().wait();
      return source_.fetch(chunk, out);
    }
    std::promise<void> asked, released;

   private:
    weights::WeightSource& source_;
  };
  FakeHost host(100000);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(20000);
  SlowSource slow(model.source);
  const auto lease = store.reserve(0, host.need(0, model.request), key_of(model));
  const auto second = store.reserve(0, host.need(0, model.request), key_of(model));
  auto loading = std::async(std::launch::async, [&] {
    weights::WeightSource* const sources[] = {&slow};
    return store.load(lease, model.request, sources, [](uint64_t) {}, {});
  });
  slow.asked.get_future().wait();
  std::stop_source stop;
  auto given_up = std::async(std::launch::async,
                             [&] { return store.load(second, model.request, {}, [](uint64_t) {}, stop.get_token()); });
  stop.request_stop();
  EXPECT_THROW(given_up.get(), Error);
  auto waiting =
      std::async(std::launch::async, [&] { return store.load(second, model.request, {}, [](uint64_t) {}, {}); });
  slow.released.set_value();
  EXPECT_FALSE(loading.get().shared);
  EXPECT_TRUE(waiting.get().shared);
  EXPECT_EQ(host.n_loads, 1);
}

TEST(SliceStore, TellsWhoWaitsOfTheProgressOfWhoLoads) {
  // Passes a gate before each chunk but the first.
  class GatedSource : public weights::WeightSource {
   public:
    explicit GatedSource(weights::WeightSource& source) : source_(source) {}
    bool fetch(const weights::ChunkRef& chunk, std::span<std::byte> out) override {
      (chunk.index == 0 ? first : rest).pass();
      return source_.fetch(chunk, out);
    }
    testing::Gate first, rest;

   private:
    weights::WeightSource& source_;
  };
  FakeHost host(64 << 20);
  SliceStore store(host, std::chrono::seconds(300));
  FakeModel model(2 * weights::kChunkBytes);
  GatedSource gated(model.source);
  gated.first.close();
  gated.rest.close();
  const auto lease = store.reserve(0, host.need(0, model.request), key_of(model));
  const auto second = store.reserve(0, host.need(0, model.request), key_of(model));
  auto loading = std::async(std::launch::async, [&] {
    weights::WeightSource* const sources[] = {&gated};
    return store.load(lease, model.request, sources, [](uint64_t) {}, {});
  });
  gated.first.wait_for_visitor();
  std::atomic<uint64_t> told{UINT64_MAX};
  auto waiting = std::async(std::launch::async, [&] {
    return store.load(second, model.request, {}, [&](uint64_t bytes) { told = bytes; }, {});
  });
  EXPECT_TRUE(testing::eventually([&] { return told == 0; }));
  gated.first.open();
  EXPECT_TRUE(testing::eventually([&] { return told == weights::kChunkBytes; }));
  gated.rest.open();
  EXPECT_FALSE(loading.get().shared);
  EXPECT_TRUE(waiting.get().shared);
}

}  // namespace
}  // namespace caravan::remote
