// What a backend finds out about its machine for servers: how fast it multiplies, what is wrong with it, its clock.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "remote/channel.h"
#include "remote/reaper.h"
#include "remote/slice_host.h"
#include "remote/slice_store.h"
#include "weights/chunk_cache.h"

namespace caravan::remote {

// Answers Survey messages, one at a time on a thread of its own. Speeds are measured when first asked for and kept;
// those measured while stages computed are told, too, but measured again the next time.
class Surveyor {
 public:
  // host, store and cache (null: none) outlive this. n_batches: how many batches were computed since the start.
  Surveyor(SliceHost& host, SliceStore& store, const weights::ChunkCache* cache, std::function<uint64_t()> n_batches);

  // Sends a SurveyResult later. Throws ProtocolError for a device or a number of types that cannot be meant, or when
  // too many surveys wait.
  void post(const pb::Survey& message, std::shared_ptr<Channel> channel);
  // Waits for the surveys posted so far.
  void finish() { thread_.wait_for_earlier({}); }

 private:
  pb::SurveyResult survey(const pb::Survey& message);

  SliceHost& host_;
  SliceStore& store_;
  const weights::ChunkCache* const cache_;
  const std::function<uint64_t()> n_batches_;
  std::atomic<uint32_t> n_waiting_{0};
  std::vector<stage::DeviceProfile> profiles_;  // per device, on the thread
  Reaper thread_;
};

}  // namespace caravan::remote
