// Payloads of the stage protocol: batches, manifests, load requests and outputs as bytes. Every decoder checks counts
// against the bytes that are there before it allocates. Layout: docs/protocol.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "remote/protocol.h"
#include "stage/batch.h"
#include "stage/profile.h"
#include "stage/stage.h"

namespace caravan::remote {

// A batch. decode throws FormatError for bytes that are no batch; what the batch asks for is checked by
// stage::validate(), not here. n_groups: cache groups of the model (visible ranges per row).
void encode_batch(ByteWriter& writer, const stage::Batch& batch);
stage::Batch decode_batch(std::span<const std::byte> bytes);

// A manifest with the hash of every chunk. encode: every entry has hashes. decode validates (weights::validate) and
// throws FormatError.
void encode_manifest(ByteWriter& writer, const weights::Manifest& manifest);
weights::Manifest decode_manifest(std::span<const std::byte> bytes);

// A load request as header and payload. Throws NotSupportedError for hyperparameters over kMaxMetadataBytes (a token
// list has no place there).
struct EncodedLoad {
  pb::LoadSlice header;
  std::vector<std::byte> payload;
};
EncodedLoad encode_load(const stage::LoadRequest& request, uint32_t stage, uint32_t device);
// Throws ProtocolError or FormatError naming the field. source names the peer in errors about its metadata.
stage::LoadRequest decode_load(const pb::LoadSlice& header, std::span<const std::byte> payload,
                               const std::string& source);

// Another backend, as a backend finds it.
struct PeerAddress {
  std::string endpoint;    // host:port
  std::string backend_id;  // who must be found there
  auto operator<=>(const PeerAddress&) const = default;
};
// Those that a load may ask for chunks. encode leaves out what decode would refuse. decode throws ProtocolError for
// more than kMaxWeightPeers, and for one without an id or with an endpoint that is too long.
void encode_peers(pb::LoadSlice& header, std::span<const PeerAddress> peers);
std::vector<PeerAddress> decode_peers(const pb::LoadSlice& header);

// Bits, eight a byte, the lowest first. decode throws ProtocolError when there are not as many bytes as n bits take.
std::string encode_bits(const std::vector<bool>& bits);
std::vector<bool> decode_bits(std::string_view bytes, size_t n);

// The numbers that size the payload of an output.
struct OutputShape {
  uint32_t n_embd = 0, n_vocab = 0;
  bool outputs = false;  // the stage gives RowOutputs instead of hidden rows
};
// Bytes of the payload of a batch's output.
uint64_t output_bytes(const stage::Batch& batch, const OutputShape& shape);
// Values follow the order of Batch::outputs; what a peer sends must have exactly the size that the batch asks for.
std::vector<std::byte> encode_output(const stage::StageOutput& output);
// Fills hidden or outputs. Throws ProtocolError (size) naming both sizes.
void decode_output(std::span<const std::byte> payload, const stage::Batch& batch, const OutputShape& shape,
                   stage::StageOutput& output);

void write_fence(pb::Fence& out, const stage::Fence& fence);
stage::Fence read_fence(const pb::Fence& fence);

// The speeds in a survey's answer. read throws ProtocolError for numbers that are no speeds; types of a later version
// are left out.
void write_profile(pb::SurveyResult& out, const stage::DeviceProfile& profile);
stage::DeviceProfile read_profile(const pb::SurveyResult& result);

// The times in the answer about a layer. read throws ProtocolError for numbers that are no times.
void write_times(pb::SurveyLayerResult& out, const stage::LayerTimes& times);
stage::LayerTimes read_times(const pb::SurveyLayerResult& result);

// f32 values as raw bytes and back; throws FormatError when the size is no multiple of 4.
std::vector<float> decode_floats(std::span<const std::byte> bytes);

}  // namespace caravan::remote
