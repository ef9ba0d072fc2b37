#include "remote/surveyor.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <fstream>

#include "base/log.h"
#include "base/progress.h"
#include "remote/codec.h"

namespace caravan::remote {

namespace {

// Weights that are read from less memory than this are read from the processor's cache.
constexpr uint64_t kLeastProfileBytes = uint64_t{32} << 20;
// Larger layers would take too long to fill.
constexpr uint64_t kMostLayerBytes = uint64_t{1} << 30;
// Forms of layers that are remembered.
constexpr size_t kMostLayers = 64;

}  // namespace

std::string machine_name() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot_id;
  if (!std::getline(file, boot_id)) return "";
  // As a hash: the identifier itself is nobody else's business.
  const Digest digest = sha256(std::as_bytes(std::span(boot_id)));
  return digest.hex().substr(0, 32);
}

Surveyor::Surveyor(SliceHost& host, SliceStore& store, const weights::ChunkCache* cache,
                   std::function<uint64_t()> n_batches)
    : host_(host),
      store_(store),
      cache_(cache),
      n_batches_(std::move(n_batches)),
      profiles_(host.devices().size()),
      desk_(1, kMaxSurveysAtOnce) {}

void Surveyor::check(uint32_t device, std::string_view message) const {
  if (device >= profiles_.size()) throw ProtocolError(fmt::format("{}: there is no device {}", message, device));
}

// Sends, later, the Result that answer() returns.
template <typename Result, typename Answer>
void Surveyor::post_answer(MessageType type, const std::shared_ptr<Channel>& channel, uint64_t sequence,
                           Answer answer) {
  const auto send = [type, channel, sequence](Result result) {
    result.set_sequence(sequence);
    channel->send(type, result);
  };
  if (desk_.post(channel, [send, answer = std::move(answer)](const std::stop_token& stop) { send(answer(stop)); }))
    return;
  Result busy;
  busy.set_error(fmt::format("busy: {} surveys of this connection wait already", kMaxSurveysAtOnce));
  send(std::move(busy));
}

void Surveyor::post(const pb::Survey& message, const std::shared_ptr<Channel>& channel) {
  check(message.device(), "Survey");
  if (static_cast<uint32_t>(message.types_size()) > kMaxSurveyTypes)
    throw ProtocolError(
        fmt::format("Survey: {} types, at most {} are answered", message.types_size(), kMaxSurveyTypes));
  post_answer<pb::SurveyResult>(MessageType::survey_result, channel, message.sequence(),
                                [this, message](const std::stop_token& stop) { return survey(message, stop); });
}

void Surveyor::post(const pb::SurveyLayer& message, std::span<const std::byte> payload,
                    const std::shared_ptr<Channel>& channel) {
  check(message.layer().device(), "SurveyLayer");
  auto sample = std::make_shared<stage::LoadRequest>(decode_load(message.layer(), payload, channel->peer()));
  ByteWriter description;
  description.write_string(message.layer().SerializeAsString());
  description.write_bytes(payload);
  post_answer<pb::SurveyLayerResult>(
      MessageType::survey_layer_result, channel, message.sequence(),
      [this, device = message.layer().device(), key = sha256(description.data()),
       sample = std::move(sample)](const std::stop_token&) { return survey_layer(device, key, *sample); });
}

// On the thread.
pb::SurveyResult Surveyor::survey(const pb::Survey& message, const std::stop_token& stop) {
  pb::SurveyResult result;
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
      for (const tensor::DType& type : types) {
        if (stop.stop_requested()) throw Error("given up");
        if (!profile.matrices.contains(type)) host_.measure(message.device(), {&type, 1}, bytes, profile);
      }
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

// On the thread.
pb::SurveyLayerResult Surveyor::survey_layer(uint32_t device, const Digest& key, const stage::LoadRequest& sample) {
  pb::SurveyLayerResult result;
  try {
    auto known = layers_.find(key);
    if (known == layers_.end()) {
      const uint64_t need = host_.need(device, sample).total();
      if (need > kMostLayerBytes)
        throw ResourceError(fmt::format("a layer of {} takes too long to fill", format_bytes(need)));
      const uint64_t bytes = std::min(need + stage::kProfileBytes, store_.memory_unused(device));
      const uint64_t before = n_batches_();
      const SliceStore::Lease lease = store_.reserve(device, {0, 0, bytes}, Digest());
      const stage::LayerTimes times = host_.measure_layer(device, sample, bytes);
      write_times(result, times);
      spdlog::debug("a layer like {}: {:.3g} ms for a row, {:.3g} ms for {}", sample.slice.layer_begin,
                    1e3 * times.seconds.front(), 1e3 * times.seconds.back(), times.n_rows.back());
      if (n_batches_() != before) return result;
      if (layers_.size() == kMostLayers) layers_.clear();
      layers_.emplace(key, times);
    } else {
      write_times(result, known->second);
    }
  } catch (const std::exception& error) {
    result.set_error(std::string(error.what()).substr(0, 1024));
  }
  return result;
}

}  // namespace caravan::remote
