// What a backend finds out about its machine for servers: how fast it multiplies, how long layers take, what is wrong
// with it, its clock.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "remote/channel.h"
#include "remote/reaper.h"
#include "remote/slice_host.h"
#include "remote/slice_store.h"
#include "weights/chunk_cache.h"

namespace caravan::remote {

// What processes on one running machine have in common, in containers too, and with no others; empty where the system
// does not tell.
std::string machine_name();

// Answers Survey and SurveyLayer messages, one at a time on a thread of its own. Speeds are measured when first asked
// for and kept; those measured while stages computed are told, too, but measured again the next time.
class Surveyor {
 public:
  // host, store and cache (null: none) outlive this. n_batches: how many batches were computed since the start.
  Surveyor(SliceHost& host, SliceStore& store, const weights::ChunkCache* cache, std::function<uint64_t()> n_batches);

  // Sends a SurveyResult later. Throws ProtocolError for a device or a number of types that cannot be meant, or when
  // too many surveys wait.
  void post(const pb::Survey& message, std::shared_ptr<Channel> channel);
  // The same with a SurveyLayerResult. Throws ProtocolError or FormatError for a payload that does not parse, too.
  void post(const pb::SurveyLayer& message, std::span<const std::byte> payload, std::shared_ptr<Channel> channel);
  // Waits for the surveys posted so far.
  void finish() { thread_.wait_for_earlier({}); }

 private:
  void check(uint32_t device, std::string_view message) const;
  template <typename Answer>
  void post_answer(MessageType type, std::shared_ptr<Channel> channel, Answer answer);
  pb::SurveyResult survey(const pb::Survey& message);
  pb::SurveyLayerResult survey_layer(uint32_t device, const Digest& key, const stage::LoadRequest& sample);

  SliceHost& host_;
  SliceStore& store_;
  const weights::ChunkCache* const cache_;
  const std::function<uint64_t()> n_batches_;
  std::atomic<uint32_t> n_waiting_{0};
  std::vector<stage::DeviceProfile> profiles_;  // per device, on the thread
  std::map<Digest, stage::LayerTimes> layers_;  // by what describes device and layer, on the thread
  Reaper thread_;
};

}  // namespace caravan::remote
