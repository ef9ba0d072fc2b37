// Frames and every message of the stage protocol, as a backend and as a server would decode them.
// The input is a stream of frames; payloads go through the same decoders, limits and checks as on a connection.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "frames.h"
#include "net/endpoint.h"
#include "net/frame.h"
#include "remote/codec.h"
#include "remote/inlet.h"
#include "remote/protocol.h"

namespace {

using namespace caravan;
using namespace caravan::remote;

// A batch decides what an output must look like; this one asks for every kind.
const stage::Batch& output_batch() {
  static const stage::Batch batch = [] {
    stage::Batch b;
    b.tokens = {1, 2, 3};
    b.outputs = {{0, stage::OutputKind::hidden, 0, {}},
                 {1, stage::OutputKind::logits, 0, {}},
                 {2, stage::OutputKind::candidates, 3, {1}}};
    return b;
  }();
  return batch;
}

void decode_forward(const net::Frame& frame) {
  const auto header = parse_header<pb::Forward>(frame);
  read_fence(header.fence());
  if (header.batch_bytes() > frame.payload.size()) return;
  const std::span<const std::byte> payload(frame.payload);
  const stage::Batch batch = decode_batch(payload.first(header.batch_bytes()));
  // What decodes encodes to something that decodes to the same.
  ByteWriter writer;
  encode_batch(writer, batch);
  if (batch.n_rows() > 0) CARAVAN_ASSERT(decode_batch(writer.data()) == batch, "encoding and decoding are inverse");
  stage::validate(
      batch,
      {.max_rows = 64, .max_outputs = 64, .max_slots = 4, .n_vocab = 100, .block_tokens = 16, .n_blocks = {8, 0}});
  decode_floats(payload.subspan(header.batch_bytes()));
}

void decode(const net::Frame& frame) {
  switch (static_cast<MessageType>(frame.type)) {
    case MessageType::hello:
      parse_header<pb::Hello>(frame);
      break;
    case MessageType::hello_ack:
      parse_header<pb::HelloAck>(frame);
      break;
    case MessageType::error:
      parse_header<pb::Error>(frame);
      break;
    case MessageType::heartbeat:
      parse_header<pb::Heartbeat>(frame);
      break;
    case MessageType::heartbeat_ack:
      parse_header<pb::HeartbeatAck>(frame);
      break;
    case MessageType::reserve:
      Digest::from_bytes(parse_header<pb::Reserve>(frame).content_key());
      break;
    case MessageType::lease:
      parse_header<pb::Lease>(frame);
      break;
    case MessageType::load_slice:
      decode_peers(parse_header<pb::LoadSlice>(frame));
      decode_load(parse_header<pb::LoadSlice>(frame), frame.payload, "fuzz");
      break;
    case MessageType::load_progress:
      parse_header<pb::LoadProgress>(frame);
      break;
    case MessageType::want_chunks: {
      const auto want = parse_header<pb::WantChunks>(frame);
      for (const std::string& digest : want.digests()) Digest::from_bytes(digest);
      break;
    }
    case MessageType::chunk:
      Digest::from_bytes(parse_header<pb::Chunk>(frame).digest());
      break;
    case MessageType::loaded:
      parse_header<pb::Loaded>(frame);
      break;
    case MessageType::open_session:
      parse_header<pb::OpenSession>(frame);
      break;
    case MessageType::close_session:
      parse_header<pb::CloseSession>(frame);
      break;
    case MessageType::forward:
      decode_forward(frame);
      break;
    case MessageType::output: {
      parse_header<pb::Output>(frame);
      stage::StageOutput output;
      decode_output(frame.payload, output_batch(), {4, 8, true}, output);
      break;
    }
    case MessageType::unload:
      parse_header<pb::Unload>(frame);
      break;
    case MessageType::unloaded:
      parse_header<pb::Unloaded>(frame);
      break;
    case MessageType::session_opened:
      parse_header<pb::SessionOpened>(frame);
      break;
    case MessageType::hop_lost:
      printable(parse_header<pb::HopLost>(frame).text(), 1024);
      break;
    case MessageType::probe: {
      const auto probe = parse_header<pb::Probe>(frame);
      net::parse_endpoint(probe.endpoint());
      break;
    }
    case MessageType::probe_result:
      printable(parse_header<pb::ProbeResult>(frame).error(), 1024);
      break;
    case MessageType::survey:
      parse_header<pb::Survey>(frame);
      break;
    case MessageType::survey_result:
      read_profile(parse_header<pb::SurveyResult>(frame));
      break;
    case MessageType::survey_layer:
      decode_load(parse_header<pb::SurveyLayer>(frame).layer(), frame.payload, "fuzz");
      break;
    case MessageType::survey_layer_result:
      read_times(parse_header<pb::SurveyLayerResult>(frame))(512);
      break;
    case MessageType::link_test:
      parse_header<pb::LinkTest>(frame);
      break;
    case MessageType::link_test_result:
      parse_header<pb::LinkTestResult>(frame);
      break;
    case MessageType::attach: {
      const auto attach = parse_header<pb::Attach>(frame);
      InletTable().find(attach.key());
      break;
    }
    case MessageType::attached:
      parse_header<pb::Attached>(frame);
      break;
    case MessageType::have_chunks: {
      const auto question = parse_header<pb::HaveChunks>(frame);
      for (const std::string& digest : question.digests()) Digest::from_bytes(digest);
      break;
    }
    case MessageType::have_chunks_result: {
      const std::string have = parse_header<pb::HaveChunksResult>(frame).have();
      CARAVAN_ASSERT(encode_bits(decode_bits(have, have.size() * 8)) == have, "encoding and decoding are inverse");
      break;
    }
    case MessageType::fetch_chunk:
      Digest::from_bytes(parse_header<pb::FetchChunk>(frame).digest());
      break;
    case MessageType::fetched_chunk:
      parse_header<pb::FetchedChunk>(frame);
      break;
  }
}

void read_stream(ByteReader& reader) {
  while (reader.remaining() > 0) {
    const net::FrameHeader header = net::parse_frame_header(reader);
    const MessageInfo* info = find_message(header.type);
    if (info == nullptr) throw ProtocolError("unknown message");
    net::check_frame_limits(header, {info->max_header_bytes, info->max_payload_bytes});
    const net::Frame frame = fuzz::take_frame(header, reader);
    try {
      decode(frame);
    } catch (const Error&) {
      // refused; the next frame of the stream is looked at all the same, to reach more code per input
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  silence_protobuf();
  ByteReader reader(std::as_bytes(std::span(data, size)), "fuzz");
  try {
    read_stream(reader);
  } catch (const Error&) {
    // refused, as it should be
  }
  return 0;
}
