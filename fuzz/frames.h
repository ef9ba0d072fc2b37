// Frames of fuzzing inputs.
#pragma once

#include "base/bytes.h"
#include "net/frame.h"

namespace caravan::fuzz {

// The frame whose header was read. Throws FormatError where the input is shorter.
inline net::Frame take_frame(const net::FrameHeader& header, ByteReader& reader) {
  net::Frame frame;
  frame.type = header.type;
  const auto head = reader.take(header.header_bytes, "header");
  frame.header.assign(head.begin(), head.end());
  const auto payload = reader.take(header.payload_bytes, "payload");
  frame.payload.assign(payload.begin(), payload.end());
  return frame;
}

}  // namespace caravan::fuzz
