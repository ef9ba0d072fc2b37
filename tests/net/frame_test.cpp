// Frames over faulty connections: round trip, truncation at every byte, flipped bits, announced lengths that lie.
#include "net/frame.h"

#include <gtest/gtest.h>

#include <string>

#include "base/memory.h"
#include "net/memory_connection.h"

namespace caravan::net {
namespace {

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto span = std::as_bytes(std::span(text.data(), text.size()));
  return {span.begin(), span.end()};
}

std::vector<std::byte> encode(uint16_t type, std::string_view header, std::string_view payload) {
  const auto head = encode_frame_header({type, 0, static_cast<uint32_t>(header.size()), payload.size()});
  std::vector<std::byte> bytes(head.begin(), head.end());
  for (const std::string_view part : {header, payload})
    for (const std::byte b : bytes_of(part)) bytes.push_back(b);
  return bytes;
}

FrameLimits generous(uint16_t) { return {1 << 16, uint64_t{1} << 20}; }

// Writes bytes into one end of a faulty pair and reads frames from the other until the stream ends or fails.
std::vector<Frame> transmit(const std::vector<std::byte>& bytes, const Faults& faults,
                            const FrameReader::LimitFunction& limits = generous) {
  IoThreads io(1);
  const Executor executor = io.next_executor();
  auto [writer, reader] = make_memory_pair(executor, faults);
  std::vector<Frame> frames;
  const auto write = [](Connection& connection, const std::vector<std::byte>& data) -> awaitable<void> {
    const std::array<ConstBuffer, 1> buffers{asio::buffer(data)};
    co_await connection.write(buffers);
    co_await connection.shutdown();
  };
  const auto read = [](Connection& connection, FrameReader::LimitFunction limit,
                       std::vector<Frame>& out) -> awaitable<void> {
    FrameReader frame_reader(connection, limit);
    while (true) {
      std::optional<Frame> frame = co_await frame_reader.read();
      if (!frame) break;
      out.push_back(std::move(*frame));
    }
  };
  auto written = asio::co_spawn(executor, write(*writer, bytes), asio::use_future);
  std::exception_ptr failure;
  try {
    run_blocking(executor, read(*reader, limits, frames));
  } catch (...) {
    failure = std::current_exception();
  }
  // Waited for: the connection must not go before it is closed.
  const auto close = [](Connection& connection) -> awaitable<void> {
    connection.close();
    co_return;
  };
  run_blocking(executor, close(*reader));
  try {
    written.get();
  } catch (const ConnectionError&) {
    // the reader left first
  }
  if (failure) std::rethrow_exception(failure);
  return frames;
}

TEST(FrameHeader, SurvivesARoundTrip) {
  const FrameHeader header{7, 0, 123, uint64_t{1} << 40};
  const auto bytes = encode_frame_header(header);
  ByteReader reader(bytes);
  EXPECT_EQ(parse_frame_header(reader), header);
  EXPECT_EQ(reader.remaining(), 0u);
}

TEST(FrameHeader, HasTheBytesOfTheSpecification) {
  const auto bytes = encode_frame_header({0x0102, 0, 3, 4});
  const std::array<unsigned char, kFrameHeaderBytes> expected{'C', 'R', 'V', 'N', 2, 1, 0, 0, 3, 0,
                                                              0,   0,   4,   0,   0, 0, 0, 0, 0, 0};
  for (size_t i = 0; i < bytes.size(); ++i) EXPECT_EQ(static_cast<unsigned char>(bytes[i]), expected[i]) << i;
}

TEST(FrameHeader, RefusesAnotherMagicFlagsAndTruncation) {
  auto bytes = encode_frame_header({1, 0, 0, 0});
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::span<const std::byte> whole(bytes);
    ByteReader reader(whole.first(size));
    EXPECT_THROW(parse_frame_header(reader), FormatError) << size;
  }
  bytes[6] = std::byte{1};
  ByteReader flags(bytes);
  EXPECT_THROW(parse_frame_header(flags), ProtocolError);
  bytes[0] = std::byte{'G'};
  ByteReader magic(bytes);
  EXPECT_THROW(parse_frame_header(magic), ProtocolError);
}

TEST(FrameReader, TakesATlsAlertInPlaceOfTheFirstFrameForASideWithAToken) {
  const std::vector<std::byte> alert = bytes_of(std::string_view("\x15\x03\x03\x00\x02\x02\x74", 7));
  for (const size_t max_read : {size_t{1}, size_t{2}, size_t{7}}) {
    Faults faults;
    faults.max_read = max_read;
    try {
      transmit(alert, faults);
      FAIL() << "read";
    } catch (const ConnectionError& error) {
      EXPECT_EQ(error.kind(), ConnectionError::Kind::peer_needs_token) << error.what();
    }
  }
  // Later it is a frame with another magic.
  std::vector<std::byte> later = encode(1, "", "");
  later.insert(later.end(), alert.begin(), alert.end());
  later.resize(later.size() + kFrameHeaderBytes);
  EXPECT_THROW(transmit(later, {}), ProtocolError);
}

TEST(FramePace, FindsFramesThatDribble) {
  using std::chrono::seconds;
  const FramePace::TimePoint start{};
  constexpr uint64_t kRate = kLeastFrameBytesPerSecond;
  // The second of the first look that finds the frame too slow; 1000: none does. bytes(second): that have come.
  const auto slow_at = [&](const std::function<ReadProgress(uint64_t second)>& progress) {
    FramePace pace(seconds(10), start);
    for (uint64_t s = 1; s < 1000; ++s)
      if (!pace.keeps_up(progress(s), start + seconds(s))) return s;
    return uint64_t{1000};
  };
  EXPECT_EQ(slow_at([](uint64_t s) { return ReadProgress{3, true, s}; }), 12u) << "a byte a second";
  EXPECT_EQ(slow_at([](uint64_t s) { return ReadProgress{3, true, s * kRate}; }), 1000u) << "as slow as may be";
  EXPECT_NE(slow_at([](uint64_t s) { return ReadProgress{3, true, s * kRate / 2}; }), 1000u) << "half of that";
  EXPECT_EQ(slow_at([](uint64_t s) { return ReadProgress{3, true, s / 10 * 10 * kRate}; }), 1000u)
      << "a link that stalls for nine seconds, time and again";
  EXPECT_EQ(slow_at([](uint64_t s) { return ReadProgress{s / 10, true, s * 24}; }), 1000u) << "small frames";
  EXPECT_EQ(slow_at([](uint64_t) { return ReadProgress{3, false, 1}; }), 1000u) << "between two frames";
  EXPECT_LE(slow_at([](uint64_t s) { return ReadProgress{3, true, (uint64_t{1} << 30) + s}; }), 13u)
      << "what came fast is no credit for later";
}

TEST(FrameReader, ReadsFramesHoweverTheBytesAreCut) {
  std::vector<std::byte> stream;
  for (const auto& frame : {encode(1, "head", "payload"), encode(2, "", ""), encode(3, "x", std::string(200000, 'p'))})
    stream.insert(stream.end(), frame.begin(), frame.end());
  for (const size_t max_read : {size_t{1}, size_t{2}, size_t{7}, size_t{19}, size_t{20}, size_t{21}, size_t{65536}}) {
    Faults faults;
    faults.max_read = max_read;
    const auto frames = transmit(stream, faults);
    ASSERT_EQ(frames.size(), 3u) << max_read;
    EXPECT_EQ(frames[0].type, 1);
    EXPECT_EQ(frames[0].header, bytes_of("head"));
    EXPECT_EQ(frames[0].payload, bytes_of("payload"));
    EXPECT_TRUE(frames[1].header.empty() && frames[1].payload.empty());
    EXPECT_EQ(frames[2].payload, bytes_of(std::string(200000, 'p')));
  }
}

TEST(FrameReader, SaysWhenTheStreamEndsInsideAFrame) {
  const auto bytes = encode(1, "head", "payload");
  for (uint64_t cut = 0; cut < bytes.size(); ++cut) {
    for (const bool reset : {false, true}) {
      Faults faults;
      faults.cut_after_bytes = cut;
      faults.cut_is_reset = reset;
      if (cut == 0 && !reset)
        EXPECT_TRUE(transmit(bytes, faults).empty());
      else
        EXPECT_THROW(transmit(bytes, faults), ConnectionError) << cut;
    }
  }
}

TEST(FrameReader, NeverCrashesOnAFlippedBit) {
  const auto bytes = encode(5, "head", "payload");
  size_t refused = 0;
  for (uint64_t bit = 0; bit < bytes.size() * 8; ++bit) {
    Faults faults;
    faults.flip_bit = bit;
    try {
      transmit(bytes, faults);
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GE(refused, 8u * 4u + 16u);  // at least every bit of the magic and the flags
}

TEST(FrameReader, RefusesAFrameOverItsLimitBeforeReadingIt) {
  const auto limits = [](uint16_t) { return FrameLimits{4, 10}; };
  EXPECT_EQ(transmit(encode(1, "1234", "0123456789"), {}, limits).size(), 1u);
  EXPECT_THROW(transmit(encode(1, "12345", ""), {}, limits), ProtocolError);
  EXPECT_THROW(transmit(encode(1, "", "0123456789a"), {}, limits), ProtocolError);
}

TEST(FrameReader, UsesMemoryForBytesThatCameNotForThoseAnnounced) {
  const auto limits = [](uint16_t) { return FrameLimits{1 << 10, uint64_t{1} << 40}; };
  const auto head = encode_frame_header({1, 0, 0, uint64_t{64} << 30});
  std::vector<std::byte> bytes(head.begin(), head.end());
  bytes.resize(bytes.size() + 100);
  const size_t before = peak_resident_memory_bytes();
  EXPECT_THROW(transmit(bytes, {}, limits), ConnectionError);
  EXPECT_LT(peak_resident_memory_bytes() - before, size_t{64} << 20);
}

}  // namespace
}  // namespace caravan::net
