#include "remote/surveyor.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "base/log.h"
#include "remote/codec.h"

namespace caravan::remote {

namespace {

constexpr uint32_t kMaxWaiting = 16;
// Weights that are read from less memory than this are read from the processor's cache.
constexpr uint64_t kLeastProfileBytes = uint64_t{32} << 20;

}  // namespace

Surveyor::Surveyor(SliceHost& host, SliceStore& store, const weights::ChunkCache* cache,
                   std::function<uint64_t()> n_batches)
    : host_(host), store_(store), cache_(cache), n_batches_(std::move(n_batches)), profiles_(host.devices().size()) {}

void Surveyor::post(const pb::Survey& message, std::shared_ptr<Channel> channel) {
  if (message.device() >= profiles_.size())
    throw ProtocolError(fmt::format("Survey: there is no device {}", message.device()));
  if (static_cast<uint32_t>(message.types_size()) > kMaxSurveyTypes)
    throw ProtocolError(
        fmt::format("Survey: {} types, at most {} are answered", message.types_size(), kMaxSurveyTypes));
  if (++n_waiting_ > kMaxWaiting) {
    --n_waiting_;
    throw ProtocolError(fmt::format("Survey: {} wait already", kMaxWaiting));
  }
  thread_.post([this, message, channel = std::move(channel)] {
    if (!channel->closed()) channel->send(MessageType::survey_result, survey(message));
    --n_waiting_;
  });
}

// On the thread.
pb::SurveyResult Surveyor::survey(const pb::Survey& message) {
  pb::SurveyResult result;
  result.set_sequence(message.sequence());
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  result.set_clock_ms(static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count()));
  if (cache_ != nullptr)
    if (const std::string problem = cache_->problem(); !problem.empty()) *result.add_problems() = problem;
  if (message.types_size() == 0) return result;

  std::vector<tensor::DType> types;
  stage::DeviceProfile profile = profiles_[message.device()];
  bool all_known = true;
  for (const uint32_t number : message.types()) {
    const tensor::DTypeInfo* info = tensor::find_dtype(number);
    if (info == nullptr || info->dequantize == nullptr) continue;  // of a later version
    types.push_back(info->type);
    all_known = all_known && profile.matrices.contains(info->type);
  }
  try {
    if (!all_known) {
      const uint64_t bytes = std::min(stage::kProfileBytes, store_.memory_unused(message.device()));
      if (bytes < kLeastProfileBytes)
        throw ResourceError("too little memory is free to measure how fast this machine computes");
      const uint64_t before = n_batches_();
      const SliceStore::Lease lease = store_.reserve(message.device(), {0, 0, bytes}, Digest());
      host_.measure(message.device(), types, bytes, profile);
      if (n_batches_() == before) profiles_[message.device()] = profile;
      for (const tensor::DType type : types)
        spdlog::debug("{}: reads {:.1f} GB/s, multiplies {:.0f} Gop/s", tensor::dtype_name(type),
                      profile.matrices.at(type).bytes_per_s / 1e9, profile.matrices.at(type).ops_per_s / 1e9);
    }
    write_profile(result, profile);
  } catch (const std::exception& error) {
    result.set_error(std::string(error.what()).substr(0, 1024));
  }
  return result;
}

}  // namespace caravan::remote
