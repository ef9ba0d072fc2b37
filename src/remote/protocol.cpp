#include "remote/protocol.h"

#include <fmt/format.h>
#include <google/protobuf/stubs/logging.h>

#include <array>

#include "weights/manifest.h"

namespace caravan::remote {

namespace {

constexpr uint32_t kSmall = 4096;

constexpr std::array kMessages{
    MessageInfo{MessageType::hello, "Hello", Sender::server, kHelloLimits.header_bytes, 0},
    MessageInfo{MessageType::hello_ack, "HelloAck", Sender::backend, kHelloAckLimits.header_bytes, 0},
    MessageInfo{MessageType::error, "Error", Sender::both, 64 << 10, 0},
    MessageInfo{MessageType::heartbeat, "Heartbeat", Sender::both, 64, 0},
    MessageInfo{MessageType::heartbeat_ack, "HeartbeatAck", Sender::both, kSmall, 0},
    MessageInfo{MessageType::reserve, "Reserve", Sender::server, kSmall, 0},
    MessageInfo{MessageType::lease, "Lease", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::load_slice, "LoadSlice", Sender::server, kSmall, kMaxMetadataBytes + kMaxManifestBytes},
    MessageInfo{MessageType::load_progress, "LoadProgress", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::want_chunks, "WantChunks", Sender::backend, 64 << 10, 0},
    MessageInfo{MessageType::chunk, "Chunk", Sender::server, kSmall, weights::kChunkBytes},
    MessageInfo{MessageType::loaded, "Loaded", Sender::backend, kSmall, 0},
    MessageInfo{MessageType::open_session, "OpenSession", Sender::server, kSmall, 0},
    MessageInfo{MessageType::close_session, "CloseSession", Sender::server, kSmall, 0},
    MessageInfo{MessageType::forward, "Forward", Sender::server, kSmall, kMaxForwardBytes},
    MessageInfo{MessageType::output, "Output", Sender::backend, 64 << 10, kMaxForwardBytes},
    MessageInfo{MessageType::unload, "Unload", Sender::server, kSmall, 0},
    MessageInfo{MessageType::unloaded, "Unloaded", Sender::backend, kSmall, 0},
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

std::string describe_version(uint32_t major, uint32_t minor, std::string_view software) {
  return fmt::format("protocol {}.{} (caravan {})", major, minor, software);
}

}  // namespace caravan::remote
