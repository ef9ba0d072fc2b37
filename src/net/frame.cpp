#include "net/frame.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "net/tls.h"

namespace caravan::net {

namespace {

constexpr size_t kReadBufferBytes = 64 << 10;
// A payload's buffer starts with at most this and doubles as bytes come.
constexpr uint64_t kFirstPayloadBytes = 1 << 20;

}  // namespace

FrameHeader parse_frame_header(ByteReader& reader) {
  const auto magic = reader.read<uint32_t>("frame magic");
  if (magic != kFrameMagic)
    throw ProtocolError(fmt::format("frame magic: expected {:08x}, found {:08x}; the peer does not speak this protocol",
                                    kFrameMagic, magic));
  FrameHeader header;
  header.type = reader.read<uint16_t>("frame type");
  header.flags = reader.read<uint16_t>("frame flags");
  header.header_bytes = reader.read<uint32_t>("frame header length");
  header.payload_bytes = reader.read<uint64_t>("frame payload length");
  if (header.flags != 0) throw ProtocolError(fmt::format("frame flags: expected 0, found {:#x}", header.flags));
  return header;
}

std::array<std::byte, kFrameHeaderBytes> encode_frame_header(const FrameHeader& header) {
  ByteWriter writer;
  writer.write(kFrameMagic);
  writer.write(header.type);
  writer.write(header.flags);
  writer.write(header.header_bytes);
  writer.write(header.payload_bytes);
  std::array<std::byte, kFrameHeaderBytes> bytes;
  CARAVAN_ASSERT(writer.data().size() == bytes.size(), "the fields add up to kFrameHeaderBytes");
  std::ranges::copy(writer.data(), bytes.begin());
  return bytes;
}

void check_frame_limits(const FrameHeader& header, const FrameLimits& limits) {
  if (header.header_bytes > limits.header_bytes)
    throw ProtocolError(fmt::format("frame of type {}: message header of {} bytes, at most {} are accepted",
                                    header.type, header.header_bytes, limits.header_bytes));
  if (header.payload_bytes > limits.payload_bytes)
    throw ProtocolError(fmt::format("frame of type {}: payload of {} bytes, at most {} are accepted", header.type,
                                    header.payload_bytes, limits.payload_bytes));
}

bool FramePace::keeps_up(const ReadProgress& progress, TimePoint now) {
  const Duration elapsed = now - at_;
  const uint64_t n_bytes = progress.n_bytes - progress_.n_bytes;
  const bool same_frame = progress.in_frame && progress_.in_frame && progress.n_frames == progress_.n_frames;
  at_ = now;
  progress_ = progress;
  if (!same_frame) {
    left_ = patience_;
    return true;
  }
  const std::chrono::duration<double> worth(static_cast<double>(n_bytes) / kLeastFrameBytesPerSecond);
  left_ = std::min(patience_, left_ - elapsed + std::chrono::duration_cast<Duration>(worth));
  return left_ >= Duration::zero();
}

FrameReader::FrameReader(Connection& connection, LimitFunction limits)
    : connection_(connection),
      limits_(std::move(limits)),
      buffer_(kReadBufferBytes),
      last_received_(std::chrono::steady_clock::now()) {}

ConnectionError FrameReader::cut() const {
  return {ConnectionError::Kind::lost,
          fmt::format("{} closed the connection in the middle of a frame", connection_.peer())};
}

awaitable<size_t> FrameReader::receive(std::span<std::byte> buffer) {
  const size_t n = co_await connection_.read_some(buffer);
  last_received_ = std::chrono::steady_clock::now();
  bytes_received_ += n;
  co_return n;
}

awaitable<bool> FrameReader::fill(std::span<std::byte> out) {
  size_t done = 0;
  while (done < out.size()) {
    if (begin_ < end_) {
      const size_t n = std::min(out.size() - done, end_ - begin_);
      std::copy_n(buffer_.begin() + static_cast<ptrdiff_t>(begin_), n, out.begin() + static_cast<ptrdiff_t>(done));
      begin_ += n;
      done += n;
      in_frame_ = true;
      continue;
    }
    // What is larger than the buffer goes straight to its place.
    const bool direct = out.size() - done >= buffer_.size();
    const std::span<std::byte> target = direct ? out.subspan(done) : std::span(buffer_);
    const size_t n = co_await receive(target);
    if (n == 0) {
      if (done == 0) co_return false;
      throw cut();
    }
    if (direct) {
      done += n;
      in_frame_ = true;
    } else {
      begin_ = 0;
      end_ = n;
    }
  }
  co_return true;
}

awaitable<std::vector<std::byte>> FrameReader::read_growing(uint64_t size) {
  std::vector<std::byte> data;
  while (data.size() < size) {
    const size_t done = data.size();
    const uint64_t next = std::min<uint64_t>(size, done == 0 ? kFirstPayloadBytes : uint64_t{done} * 2);
    data.resize(next);
    const bool filled = co_await fill(std::span(data).subspan(done));
    if (!filled) throw cut();
  }
  co_return data;
}

awaitable<std::optional<Frame>> FrameReader::read() {
  std::array<std::byte, kFrameHeaderBytes> raw;
  const auto begin = std::span(raw).first<kTlsAlertPrefixBytes>();
  const bool any = co_await fill(begin);
  if (!any) co_return std::nullopt;
  // The record is shorter than a header, so it is recognised before the rest is waited for.
  if (n_frames_ == 0 && is_tls_alert(begin))
    throw ConnectionError(ConnectionError::Kind::peer_needs_token,
                          fmt::format("{} speaks TLS: it uses a token, this side has none", connection_.peer()));
  const bool whole = co_await fill(std::span(raw).subspan<kTlsAlertPrefixBytes>());
  if (!whole) throw cut();
  ByteReader reader(raw, "frame");
  const FrameHeader header = parse_frame_header(reader);
  check_frame_limits(header, limits_(header.type));
  Frame frame;
  frame.type = header.type;
  frame.header = co_await read_growing(header.header_bytes);
  frame.payload = co_await read_growing(header.payload_bytes);
  in_frame_ = false;
  ++n_frames_;
  co_return frame;
}

}  // namespace caravan::net
