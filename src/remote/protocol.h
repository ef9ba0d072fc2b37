// The stage protocol's numbers: version, message types, and how long each may be. Specification: docs/protocol.md.
#pragma once

#include <cstdint>
#include <string_view>

#include "messages.pb.h"
#include "net/frame.h"

namespace caravan::remote {

// Peers with another major version are refused; a minor version only adds what the other side may ignore.
inline constexpr uint32_t kProtocolMajor = 2;
inline constexpr uint32_t kProtocolMinor = 2;
inline constexpr uint32_t kMinorWithSharedWeights = 1;  // LoadSlice names other backends; they give chunks
inline constexpr uint32_t kMinorWithSurveys = 1;        // backends know Survey and LinkTest
inline constexpr uint32_t kMinorWithLayerSurveys = 2;   // and SurveyLayer

enum class MessageType : uint16_t {
  hello = 1,
  hello_ack = 2,
  error = 3,
  heartbeat = 4,
  heartbeat_ack = 5,
  reserve = 6,
  lease = 7,
  load_slice = 8,
  load_progress = 9,
  want_chunks = 10,
  chunk = 11,
  loaded = 12,
  open_session = 13,
  close_session = 14,
  forward = 15,
  output = 16,
  unload = 17,
  unloaded = 18,
  session_opened = 19,
  hop_lost = 20,
  probe = 21,
  probe_result = 22,
  attach = 23,
  attached = 24,
  survey = 25,
  survey_result = 26,
  link_test = 27,
  link_test_result = 28,
  have_chunks = 29,
  have_chunks_result = 30,
  fetch_chunk = 31,
  fetched_chunk = 32,
  survey_layer = 33,
  survey_layer_result = 34,
};

// Who may send a message: to a backend the side that connected (a server, or another backend as a peer), or the backend
// that was connected.
enum class Sender : uint8_t { server, peer, server_or_peer, backend, both };

// One row per message type. The limits are those of a connection past its hello; forward and output have limits of
// their own that follow from what is loaded (max_payload_bytes is the bound of those).
struct MessageInfo {
  MessageType type;
  std::string_view name;
  Sender sender;
  uint32_t max_header_bytes;
  uint64_t max_payload_bytes;
};

// The row of a type number, or nullptr for one that this version does not know.
const MessageInfo* find_message(uint16_t type);
std::string_view message_name(uint16_t type);

// What an unauthenticated peer may send: one hello (or, to a client, one answer) of this size.
inline constexpr net::FrameLimits kHelloLimits{4096, 0};
inline constexpr net::FrameLimits kHelloAckLimits{64 << 10, 0};

inline constexpr uint32_t kMaxStages = 64;           // per connection
inline constexpr uint32_t kMaxTickets = 1024;        // in flight per connection
inline constexpr uint32_t kMaxChunksPerWant = 1024;  // digests in one message
inline constexpr uint32_t kMaxWeightPeers = 16;      // other backends that a load may ask
inline constexpr uint32_t kMaxChunkRequests = 32;    // of a peer that wait for their answer
inline constexpr uint64_t kMaxMetadataBytes = 1 << 20;
inline constexpr uint64_t kMaxManifestBytes = 64 << 20;
inline constexpr uint64_t kMaxForwardBytes = uint64_t{1} << 30;
inline constexpr size_t kRouteKeyBytes = 32;                        // secret of a route between two backends
inline constexpr uint32_t kMaxHops = 1024;                          // stages that a step passes
inline constexpr uint32_t kMaxProbesAtOnce = 16;                    // of a connection, that wait or are answered
inline constexpr uint32_t kMaxSurveysAtOnce = 4;                    // the same; each may hold kMaxSampleBytes
inline constexpr uint32_t kMaxSurveyTypes = 64;                     // of tensors, in one message
inline constexpr uint64_t kMaxSampleBytes = 2 * kMaxMetadataBytes;  // what describes a layer to measure
inline constexpr size_t kMaxMachineBytes = 64;                      // name of a machine
inline constexpr uint32_t kMaxLinkTestBytes = 1 << 20;

// Keeps libprotobuf from writing to stderr what peers send: a message that does not parse is reported by whoever reads
// it. Process-wide; called by both ends of the protocol before they read.
void silence_protobuf();

// Parses a message header. Throws ProtocolError naming the message.
template <typename Message>
Message parse_header(const net::Frame& frame) {
  Message message;
  if (!message.ParseFromArray(frame.header.data(), static_cast<int>(frame.header.size())))
    throw ProtocolError(std::string(message_name(frame.type)) + ": the message header does not parse");
  return message;
}

// Whether a peer of that protocol version can be talked to.
inline bool is_compatible(uint32_t major) { return major == kProtocolMajor; }
// A peer's text in a log line: at most max_bytes of it, others than printable ASCII as '?'.
std::string printable(std::string_view text, size_t max_bytes = 64);
// "protocol 2.1 (caravan 0.1.0)": for refusals and logs.
std::string describe_version(uint32_t major, uint32_t minor, std::string_view software);

}  // namespace caravan::remote
