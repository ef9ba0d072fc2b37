// Frames: a fixed header, then a small message header, then raw payload. What the bytes mean is remote/'s business.
// Layout: docs/protocol.md.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "net/connection.h"

namespace caravan::net {

// "CRVN" in the order of the bytes.
inline constexpr uint32_t kFrameMagic = 0x4e565243;
inline constexpr size_t kFrameHeaderBytes = 20;

// The first 20 bytes of every frame: magic u32, type u16, flags u16, header_bytes u32, payload_bytes u64,
// little-endian.
struct FrameHeader {
  uint16_t type = 0;
  uint16_t flags = 0;  // none are defined; must be 0
  uint32_t header_bytes = 0;
  uint64_t payload_bytes = 0;
  bool operator==(const FrameHeader&) const = default;
};

// Reads one frame header. Throws ProtocolError for another magic or flags, FormatError when bytes are missing.
FrameHeader parse_frame_header(ByteReader& reader);
std::array<std::byte, kFrameHeaderBytes> encode_frame_header(const FrameHeader& header);

// The longest header and payload of a frame that are read.
struct FrameLimits {
  uint32_t header_bytes = 0;
  uint64_t payload_bytes = 0;
};

// Throws ProtocolError naming the type, the limit and what was announced.
void check_frame_limits(const FrameHeader& header, const FrameLimits& limits);

struct Frame {
  uint16_t type = 0;
  std::vector<std::byte> header, payload;
};

// How far a reader is.
struct ReadProgress {
  uint64_t n_frames = 0;  // whole ones
  bool in_frame = false;  // bytes of the next one have come, and not all
  uint64_t n_bytes = 0;   // of all
};

// Finds frames that never end because their bytes dribble: each byte is a sign of life, but a frame that has begun must
// come at kLeastFrameBytesPerSecond. Far below any link that is of use.
inline constexpr uint64_t kLeastFrameBytesPerSecond = 16 << 10;

class FramePace {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  // patience: how far a frame may fall behind, for links that stall.
  FramePace(Duration patience, TimePoint now) : patience_(patience), left_(patience), at_(now) {}

  // Looks at a reader's progress, time and again; false: the frame under way has come too slowly for too long.
  bool keeps_up(const ReadProgress& progress, TimePoint now);

 private:
  const Duration patience_;
  Duration left_;          // of the patience with the frame under way
  TimePoint at_;           // of the look before
  ReadProgress progress_;  // then
};

// Reads frames from a connection, on its executor. Buffers, so that a small frame costs one system call.
class FrameReader {
 public:
  // limits: says for a frame type how long it may be at this moment; throws ProtocolError for types that may not come.
  using LimitFunction = std::function<FrameLimits(uint16_t type)>;
  FrameReader(Connection& connection, LimitFunction limits);

  // The next frame; nullopt when the peer has ended the stream between two frames. Memory grows with the bytes that
  // have come, not with those announced. Throws ProtocolError (bad header, over the limit), ConnectionError; among
  // these peer_needs_token where a TLS alert comes in place of the first frame.
  awaitable<std::optional<Frame>> read();

  // When bytes last came, whole frames or not.
  std::chrono::steady_clock::time_point last_received() const { return last_received_; }
  ReadProgress progress() const { return {n_frames_, in_frame_, bytes_received_.load()}; }
  // From any thread.
  uint64_t bytes_received() const { return bytes_received_.load(); }

 private:
  ConnectionError cut() const;
  awaitable<size_t> receive(std::span<std::byte> buffer);
  // False: the stream ended before the first byte.
  awaitable<bool> fill(std::span<std::byte> out);
  awaitable<std::vector<std::byte>> read_growing(uint64_t size);

  Connection& connection_;
  LimitFunction limits_;
  uint64_t n_frames_ = 0;
  bool in_frame_ = false;
  std::vector<std::byte> buffer_;
  size_t begin_ = 0, end_ = 0;  // unread part of buffer_
  std::chrono::steady_clock::time_point last_received_;
  std::atomic<uint64_t> bytes_received_{0};
};

}  // namespace caravan::net
