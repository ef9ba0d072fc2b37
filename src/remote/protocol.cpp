#include "remote/protocol.h"

#include <fmt/format.h>
#include <google/protobuf/stubs/logging.h>

#include <array>

#include "weights/manifest.h"

namespace caravan::remote {

namespace {

constexpr uint32_t kSmall = 4096;

constexpr std::array kMessages{
    MessageInfo{MessageType::hello, "Hello", Sender::server_or_peer, kHelloLimits.header_bytes, 0},
    MessageInfo{MessageType::hello_ack, "HelloAck", Sender::backend, kHelloAckLimits.header_bytes, 0},
    MessageInfo{MessageType::error, "Error", Sender::both, 64 << 10, 0},
    MessageInfo{MessageType::heartbeat, "Heartbeat", Sender::both, 64, 0},
    MessageInfo{MessageType::heartbeat_ack, "HeartbeatAck", Sender::both, kSmall, 0},
    MessageInfo{MessageType::reserve, "Reserve", Sender::server, kSmall, 0},
    MessageInfo{MessageType::lease, "Lease", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::load_slice, "LoadSlice", Sender::server, 16 << 10, kMaxMetadataBytes + kMaxManifestBytes},
    MessageInfo{MessageType::load_progress, "LoadProgress", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::want_chunks, "WantChunks", Sender::backend, 64 << 10, 0},
    MessageInfo{MessageType::chunk, "Chunk", Sender::server, kSmall, weights::kChunkBytes},
    MessageInfo{MessageType::loaded, "Loaded", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::open_session, "OpenSession", Sender::server, kSmall, 0},
    MessageInfo{MessageType::close_session, "CloseSession", Sender::server, kSmall, 0},
    MessageInfo{MessageType::forward, "Forward", Sender::server_or_peer, kSmall, kMaxForwardBytes},
    MessageInfo{MessageType::output, "Output", Sender::backend, 64 << 10, kMaxForwardBytes},
    MessageInfo{MessageType::unload, "Unload", Sender::server, kSmall, 0},
    MessageInfo{MessageType::unloaded, "Unloaded", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::session_opened, "SessionOpened", Sender::backend, 64 << 10, 0},
    MessageInfo{MessageType::hop_lost, "HopLost", Sender::backend, 64 << 10, 0},
    MessageInfo{MessageType::probe, "Probe", Sender::server, kSmall, 0},
    MessageInfo{MessageType::probe_result, "ProbeResult", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::attach, "Attach", Sender::peer, kSmall, 0},
    MessageInfo{MessageType::attached, "Attached", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::survey, "Survey", Sender::server, kSmall, 0},
    MessageInfo{MessageType::survey_result, "SurveyResult", Sender::backend, 64 << 10, 0},
    MessageInfo{MessageType::link_test, "LinkTest", Sender::server, kSmall, kMaxLinkTestBytes},
    MessageInfo{MessageType::link_test_result, "LinkTestResult", Sender::backend, kSmall, kMaxLinkTestBytes},
    MessageInfo{MessageType::have_chunks, "HaveChunks", Sender::peer, 64 << 10, 0},
    MessageInfo{MessageType::have_chunks_result, "HaveChunksResult", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::fetch_chunk, "FetchChunk", Sender::peer, kSmall, 0},
    MessageInfo{MessageType::fetched_chunk, "FetchedChunk", Sender::backend, kSmall, weights::kChunkBytes},
    MessageInfo{MessageType::survey_layer, "SurveyLayer", Sender::server, kSmall, kMaxSampleBytes},
    MessageInfo{MessageType::survey_layer_result, "SurveyLayerResult", Sender::backend, kSmall, 0},
};

}  // namespace

const MessageInfo* find_message(uint16_t type) {
  for (const MessageInfo& info : kMessages)
    if (static_cast<uint16_t>(info.type) == type) return &info;
  return nullptr;
}

std::string_view message_name(uint16_t type) {
  const MessageInfo* info = find_message(type);
  return info != nullptr ? info->name : "unknown message";
}

void silence_protobuf() { google::protobuf::SetLogHandler(nullptr); }

std::string printable(std::string_view text, size_t max_bytes) {
  std::string out;
  for (const char c : text.substr(0, max_bytes)) out += c >= 0x20 && c < 0x7f ? c : '?';
  return out;
}

std::string describe_version(uint32_t major, uint32_t minor, std::string_view software) {
  return fmt::format("protocol {}.{} (caravan {})", major, minor, software);
}

}  // namespace caravan::remote
