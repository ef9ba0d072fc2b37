// One lane per source: a queue of chunk numbers in the order of the list, and the threads that fetch them. Whatever
// fails in one lane moves to the next lane whose source may have it, and a lane that is idle takes whole tensors from
// the end of one that is slow.
#include "weights/pull.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/log.h"

namespace caravan::weights {
namespace {

// Chunks that a fetching thread may be ahead of what was used: one that waits while the next is fetched.
constexpr size_t kAhead = 2;
// So many chunks are taken over at a time: enough for a remote source to keep several requests in flight.
constexpr size_t kTakenAtOnce = 4;
// A source that helps is to be so many times as fast: it may share the link with the one that it helps.
constexpr double kHelpFactor = 2;
// How often an idle lane looks whether one is slow.
constexpr auto kLookInterval = std::chrono::milliseconds(100);

class Puller {
 public:
  Puller(std::span<const ChunkRef> chunks, std::span<WeightSource* const> sources, const PullPatience& patience,
         const std::function<void()>& asking)
      : chunks_(chunks), sources_(sources), patience_(patience), lanes_(sources.size()), used_(chunks.size()) {
    assign(asking);
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      std::vector<ChunkRef> mine;
      for (const size_t i : lanes_[lane].queue) mine.push_back(chunks[i]);
      if (!mine.empty()) sources[lane]->announce(mine);
    }
  }

  void run(const std::function<void(const ChunkRef&, std::span<const std::byte>)>& use) {
    began_ = Clock::now();
    {
      std::vector<std::jthread> threads;
      for (size_t lane = 0; lane < lanes_.size() && !chunks_.empty(); ++lane)
        for (int i = 0; i < sources_[lane]->n_fetchers(); ++i) threads.emplace_back([this, lane] { work(lane); });
      try {
        deliver(use);
      } catch (...) {
        fail(std::current_exception());
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Lane {
    std::set<size_t> queue;
    size_t n_held = 0;  // being fetched, or fetched and not used
    uint64_t fetched_bytes = 0;
    bool abandoned = false;
    // Of a lane that helps: when it last took something over, and what it had fetched by then.
    std::optional<Clock::time_point> took_over;
    uint64_t fetched_before = 0;
    bool helps = true;  // until it shows that it is hardly faster
  };
  struct Fetched {
    size_t lane;
    std::vector<std::byte> bytes;
  };

  // Puts every chunk into the queue of the first lane whose source may have it.
  void assign(const std::function<void()>& asking) {
    std::vector<size_t> left(chunks_.size());
    std::iota(left.begin(), left.end(), size_t{0});
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      std::vector<ChunkRef> wanted;
      for (const size_t i : left) wanted.push_back(chunks_[i]);
      sources_[lane]->look_for(wanted);
      std::erase_if(left, [&](size_t i) {
        const bool takes = sources_[lane]->may_have(chunks_[i]);
        if (takes) lanes_[lane].queue.insert(i);
        if (asking) asking();
        return takes;
      });
    }
    if (!left.empty()) pass_on(left.front(), lanes_.size(), "");
  }

  bool finished() const { return failure_ != nullptr || n_used_ == chunks_.size(); }

  void fail(std::exception_ptr failure) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::move(failure);
    changed_.notify_all();
  }

  // Puts chunk i into the queue of the first lane from `lane` on whose source may have it; why: what earlier ones said.
  void pass_on(size_t i, size_t lane, const std::string& why) {
    if (!why.empty()) reasons_[i] += fmt::format("; {}", why);
    for (; lane < lanes_.size(); ++lane) {
      if (lanes_[lane].abandoned || !sources_[lane]->may_have(chunks_[i])) continue;
      lanes_[lane].queue.insert(i);
      return;
    }
    // Who was helped with it has it still.
    const auto helped = helped_with_.find(i);
    if (helped != helped_with_.end() && !lanes_[helped->second].abandoned && given_back_.insert(i).second) {
      lanes_[helped->second].queue.insert(i);
      return;
    }
    throw SourceError(fmt::format("chunk {} of tensor '{}': no weight source delivers it ({} known){}",
                                  chunks_[i].index, chunks_[i].tensor->name, sources_.size(), reasons_[i]));
  }

  // The chunk that everything else may wait for is fetched whatever is held already: so no lane waits for another.
  bool can_take(const Lane& lane, size_t n_fetchers) const {
    return !lane.queue.empty() && (lane.n_held < kAhead * n_fetchers || *lane.queue.begin() == first_unused_);
  }

  void work(size_t lane_number) {
    Lane& lane = lanes_[lane_number];
    WeightSource& source = *sources_[lane_number];
    const auto n_fetchers = static_cast<size_t>(source.n_fetchers());
    const bool may_help =
        std::ranges::any_of(sources_.first(lane_number), [](const WeightSource* s) { return s->may_be_helped(); });
    std::unique_lock lock(mutex_);
    while (true) {
      if (!finished() && !can_take(lane, n_fetchers)) {
        if (!may_help)
          changed_.wait(lock);
        else if (!lane.queue.empty() || !take_over(lane_number))
          changed_.wait_for(lock, kLookInterval);
        continue;
      }
      if (finished()) return;
      const size_t i = *lane.queue.begin();
      lane.queue.erase(lane.queue.begin());
      ++lane.n_held;
      std::vector<std::byte> bytes;
      if (!spare_.empty()) {
        bytes = std::move(spare_.back());
        spare_.pop_back();
      }
      lock.unlock();
      std::string failure;
      bool broken = false;
      try {
        bytes.resize(static_cast<size_t>(chunks_[i].size_bytes()));
        failure = try_source(chunks_[i], source, bytes);
        if (failure.empty())
          for (size_t earlier = 0; earlier < lane_number; ++earlier) sources_[earlier]->offer(chunks_[i], bytes);
      } catch (const std::exception& error) {
        failure = error.what();
        broken = true;
      }
      lock.lock();
      if (failure.empty()) {
        lane.fetched_bytes += chunks_[i].size_bytes();
        fetched_.emplace(i, Fetched{lane_number, std::move(bytes)});
      } else {
        --lane.n_held;
        give_up(lane_number, i, failure, broken);
      }
      changed_.notify_all();
    }
  }

  // Under mutex_: whether it was worth the while that an idle lane took over the last time.
  bool is_help(const Lane& helper, const Lane& slow) const {
    const Clock::time_point now = Clock::now();
    const std::chrono::duration<double> helped = now - *helper.took_over, elapsed = now - began_;
    return static_cast<double>(helper.fetched_bytes - helper.fetched_before) * elapsed.count() >=
           kHelpFactor * static_cast<double>(slow.fetched_bytes) * helped.count();
  }

  // Under mutex_: how long a lane will take for what is in its queue, as fast as it has been until now.
  double seconds_left(const Lane& lane) const {
    const std::chrono::duration<double> elapsed = Clock::now() - began_;
    uint64_t bytes = 0;
    for (const size_t i : lane.queue) bytes += chunks_[i].size_bytes();
    return elapsed.count() * static_cast<double>(bytes) /
           static_cast<double>(std::max<uint64_t>(lane.fetched_bytes, 1));
  }

  // Under mutex_: an idle lane takes tensors that a slow one before it has not begun, the last first; whole ones, since
  // the chunks of a tensor are used in order. False: there are none.
  bool take_over(size_t lane_number) {
    Lane& helper = lanes_[lane_number];
    if (helper.abandoned || !helper.helps || Clock::now() - began_ < patience_.before_help) return false;
    std::vector<ChunkRef> taken;
    for (size_t slow = 0; slow < lane_number; ++slow) {
      Lane& lane = lanes_[slow];
      if (helper.took_over && sources_[slow]->may_be_helped()) helper.helps = is_help(helper, lane);
      while (helper.helps && sources_[slow]->may_be_helped() && !lane.queue.empty() && taken.size() < kTakenAtOnce &&
             seconds_left(lane) >= patience_.seconds_left) {
        const size_t end = *lane.queue.rbegin() + 1;
        size_t begin = end - 1;
        while (begin > 0 && chunks_[begin - 1].tensor == chunks_[begin].tensor) --begin;
        bool whole = end == chunks_.size() || chunks_[end].tensor != chunks_[begin].tensor;
        for (size_t i = begin; i < end; ++i)
          whole = whole && lane.queue.contains(i) && !given_back_.contains(i) &&
                  sources_[lane_number]->may_have(chunks_[i]);
        if (!whole) break;
        for (size_t i = begin; i < end; ++i) {
          lane.queue.erase(i);
          helper.queue.insert(i);
          helped_with_[i] = slow;
          taken.push_back(chunks_[i]);
        }
      }
    }
    if (taken.empty()) return false;
    helper.took_over = Clock::now();
    helper.fetched_before = helper.fetched_bytes;
    sources_[lane_number]->announce(taken);
    return true;
  }

  // Under mutex_. A source that broke is not asked again.
  void give_up(size_t lane_number, size_t i, const std::string& failure, bool broken) {
    Lane& lane = lanes_[lane_number];
    std::set<size_t> moved{i};
    if (broken && !lane.abandoned) {
      spdlog::warn("weights from {}: {}", sources_[lane_number]->name(), failure);
      lane.abandoned = true;
    }
    if (lane.abandoned) moved.merge(lane.queue);
    try {
      for (const size_t chunk : moved)
        pass_on(chunk, lane_number + 1, fmt::format("{}: {}", sources_[lane_number]->name(), failure));
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
    }
  }

  // Under mutex_: a fetched chunk whose tensor has been used up to it.
  std::map<size_t, Fetched>::iterator next_deliverable() {
    return std::ranges::find_if(fetched_, [&](const auto& item) {
      const size_t i = item.first;
      return i == 0 || chunks_[i - 1].tensor != chunks_[i].tensor || used_[i - 1];
    });
  }

  void deliver(const std::function<void(const ChunkRef&, std::span<const std::byte>)>& use) {
    std::unique_lock lock(mutex_);
    while (true) {
      auto next = fetched_.end();
      changed_.wait(lock, [&] { return finished() || (next = next_deliverable()) != fetched_.end(); });
      if (finished()) return;
      const size_t i = next->first;
      Fetched fetched = std::move(next->second);
      fetched_.erase(next);
      lock.unlock();
      use(chunks_[i], fetched.bytes);
      lock.lock();
      used_[i] = true;
      ++n_used_;
      while (first_unused_ < chunks_.size() && used_[first_unused_]) ++first_unused_;
      --lanes_[fetched.lane].n_held;
      spare_.push_back(std::move(fetched.bytes));
      changed_.notify_all();
    }
  }

  const std::span<const ChunkRef> chunks_;
  const std::span<WeightSource* const> sources_;
  const PullPatience patience_;
  Clock::time_point began_;  // const while threads run

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Lane> lanes_;                    // under mutex_; parallel to sources_
  std::map<size_t, Fetched> fetched_;          // under mutex_
  std::map<size_t, size_t> helped_with_;       // under mutex_; chunks that were taken over, and from which lane
  std::set<size_t> given_back_;                // under mutex_; those of them that could not be had elsewhere
  std::map<size_t, std::string> reasons_;      // under mutex_; of chunks that a source did not deliver
  std::vector<std::vector<std::byte>> spare_;  // under mutex_
  std::vector<bool> used_;                     // under mutex_
  size_t n_used_ = 0, first_unused_ = 0;       // under mutex_
  std::exception_ptr failure_;                 // under mutex_
};

}  // namespace

void pull(std::span<const ChunkRef> chunks, std::span<WeightSource* const> sources,
          const std::function<void(const ChunkRef&, std::span<const std::byte>)>& use, const PullPatience& patience,
          const std::function<void()>& asking) {
  Puller(chunks, sources, patience, asking).run(use);
}

}  // namespace caravan::weights
