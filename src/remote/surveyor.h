// What a backend finds out about its machine for servers: how fast it multiplies, how long layers take, what is wrong
// with it, its clock.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "remote/channel.h"
#include "remote/question_desk.h"
#include "remote/slice_host.h"
#include "remote/slice_store.h"
#include "weights/chunk_cache.h"

namespace caravan::remote {

// What processes on one running machine have in common, in containers too, and with no others; empty where the system
// does not tell.
std::string machine_name();

// Answers Survey and SurveyLayer messages, one at a time on a thread of its own, those of each connection in turn.
// Speeds are measured when first asked for and kept; those measured while stages computed are told, too, but measured
// again the next time.
class Surveyor {
 public:
  // host, store and cache (null: none) outlive this. n_batches: how many batches were computed since the start.
  Surveyor(SliceHost& host, SliceStore& store, const weights::ChunkCache* cache, std::function<uint64_t()> n_batches);

  // Sends a SurveyResult later, or at once one that says that too many of this connection wait. Throws ProtocolError
  // for a device or a number of types that cannot be meant.
  void post(const pb::Survey& message, const std::shared_ptr<Channel>& channel);
  // The same with a SurveyLayerResult. Throws ProtocolError or FormatError for a payload that does not parse, too.
  void post(const pb::SurveyLayer& message, std::span<const std::byte> payload,
            const std::shared_ptr<Channel>& channel);
  // The connection has ended: nobody waits for its surveys.
  void leave(const std::shared_ptr<Channel>& channel) { desk_.leave(channel); }
  // Answers no more; waits for what is being measured. Idempotent.
  void stop() { desk_.stop(); }

 private:
  void check(uint32_t device, std::string_view message) const;
  template <typename Result, typename Answer>
  void post_answer(MessageType type, const std::shared_ptr<Channel>& channel, uint64_t sequence, Answer answer);
  pb::SurveyResult survey(const pb::Survey& message, const std::stop_token& stop);
  pb::SurveyLayerResult survey_layer(uint32_t device, const Digest& key, const stage::LoadRequest& sample);

  SliceHost& host_;
  SliceStore& store_;
  const weights::ChunkCache* const cache_;
  const std::function<uint64_t()> n_batches_;
  std::vector<stage::DeviceProfile> profiles_;  // per device, on the thread
  std::map<Digest, stage::LayerTimes> layers_;  // by what describes device and layer, on the thread
  QuestionDesk desk_;                           // last: what it runs uses the rest
};

}  // namespace caravan::remote
