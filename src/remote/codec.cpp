#include "remote/codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace caravan::remote {

namespace {

// Bits of a batch's flags byte.
constexpr uint8_t kMultiAxisPositions = 1, kHasAncestors = 2, kHasAdapters = 4;
constexpr uint32_t kMaxTensors = 1 << 17;
constexpr uint32_t kMaxCacheGroups = 16;
// Rows, and outputs, of a batch: what a cache configuration may ask for at most.
constexpr uint32_t kMaxRows = 1 << 16;

template <typename T>
void write_array(ByteWriter& writer, std::span<const T> values) {
  writer.write_bytes(std::as_bytes(values));
}

// n values of T. The bytes are taken first, so that a count that lies cannot make us allocate.
template <typename T>
std::vector<T> read_array(ByteReader& reader, uint64_t n, std::string_view what) {
  const auto bytes = reader.take(checked_multiply(n, sizeof(T), what), what);
  std::vector<T> values(n);
  if (n > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

bool is_multi_axis(const std::array<int32_t, 4>& p) { return p[1] != p[0] || p[2] != p[0] || p[3] != p[0]; }

// Seven bits a byte, the lowest first; the highest bit says that more follow.
void write_varint(ByteWriter& writer, uint32_t value) {
  while (value >= 0x80) {
    writer.write(static_cast<uint8_t>(value | 0x80));
    value >>= 7;
  }
  writer.write(static_cast<uint8_t>(value));
}

uint32_t read_varint(ByteReader& reader, std::string_view what) {
  uint32_t value = 0;
  for (uint32_t shift = 0;; shift += 7) {
    const auto byte = reader.read<uint8_t>(what);
    if (shift == 28 && byte > 0x0f) throw FormatError(fmt::format("batch: {}: a number of more than 32 bits", what));
    value |= uint32_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return value;
  }
}

// The number of things that follow, each of at least least_bytes.
uint32_t read_count(ByteReader& reader, uint64_t least_bytes, std::string_view what) {
  const uint32_t n = read_varint(reader, what);
  if (n * least_bytes > reader.remaining())
    throw FormatError(fmt::format("batch: {} {} do not fit in the {} bytes left", n, what, reader.remaining()));
  return n;
}

template <typename T>
void write_varints(ByteWriter& writer, std::span<const T> values) {
  for (const T value : values) write_varint(writer, static_cast<uint32_t>(value));
}

template <typename T>
std::vector<T> read_varints(ByteReader& reader, uint64_t n, std::string_view what) {
  if (n > reader.remaining())
    throw FormatError(fmt::format("batch: {} {} do not fit in the {} bytes left", n, what, reader.remaining()));
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(read_varint(reader, what));
  return values;
}

void write_kv_op(ByteWriter& writer, const stage::KvOp& op) {
  writer.write(static_cast<uint8_t>(op.kind));
  for (const uint32_t value : {op.group, op.slot, op.block, op.source, op.n_tokens}) write_varint(writer, value);
}

stage::KvOp read_kv_op(ByteReader& reader) {
  stage::KvOp op;
  const auto kind = reader.read<uint8_t>("KV operation kind");
  if (kind > static_cast<uint8_t>(stage::KvOp::Kind::copy_block))
    throw FormatError(fmt::format("batch: KV operation kind {}, expected at most {}", kind,
                                  static_cast<int>(stage::KvOp::Kind::copy_block)));
  op.kind = static_cast<stage::KvOp::Kind>(kind);
  for (uint32_t* value : {&op.group, &op.slot, &op.block, &op.source, &op.n_tokens})
    *value = read_varint(reader, "KV operation");
  return op;
}

void write_request(ByteWriter& writer, const stage::OutputRequest& request) {
  write_varint(writer, request.row);
  writer.write(static_cast<uint8_t>(request.kind));
  if (request.kind != stage::OutputKind::candidates) return;
  write_varint(writer, request.top_k);
  write_varint(writer, static_cast<uint32_t>(request.named_ids.size()));
  write_varints<int32_t>(writer, request.named_ids);
}

stage::OutputRequest read_request(ByteReader& reader) {
  stage::OutputRequest request;
  request.row = read_varint(reader, "output row");
  const auto kind = reader.read<uint8_t>("output kind");
  if (kind > static_cast<uint8_t>(stage::OutputKind::candidates))
    throw FormatError(fmt::format("batch: output kind {}, expected at most {}", kind,
                                  static_cast<int>(stage::OutputKind::candidates)));
  request.kind = static_cast<stage::OutputKind>(kind);
  if (request.kind != stage::OutputKind::candidates) return request;
  request.top_k = read_varint(reader, "top_k");
  const uint32_t n_named = read_count(reader, 1, "named ids");
  request.named_ids = read_varints<int32_t>(reader, n_named, "named ids");
  return request;
}

uint32_t n_candidates(const stage::OutputRequest& request, const OutputShape& shape) {
  return std::min(request.top_k, shape.n_vocab);
}

tensor::DType read_cache_type(uint32_t number, std::string_view what) {
  if (tensor::find_dtype(number) == nullptr)
    throw ProtocolError(fmt::format("LoadSlice: {} {} is no GGUF type", what, number));
  return static_cast<tensor::DType>(number);
}

stage::CacheConfig read_cache(const pb::CacheConfig& cache) {
  stage::CacheConfig config;
  config.k_type = read_cache_type(cache.k_type(), "k_type");
  config.v_type = read_cache_type(cache.v_type(), "v_type");
  config.block_tokens = cache.block_tokens();
  config.n_blocks.assign(cache.n_blocks().begin(), cache.n_blocks().end());
  config.max_slots = cache.max_slots();
  config.max_rows = cache.max_rows();
  config.max_outputs = cache.max_outputs();
  const auto check = [](std::string_view name, uint64_t value, uint64_t min, uint64_t max) {
    if (value < min || value > max)
      throw ProtocolError(fmt::format("LoadSlice: {} is {}, expected {} to {}", name, value, min, max));
  };
  check("block_tokens", config.block_tokens, 1, 1 << 16);
  check("number of cache groups", config.n_blocks.size(), 0, kMaxCacheGroups);
  for (const uint32_t n : config.n_blocks) check("n_blocks", n, 0, 1 << 30);
  check("max_slots", config.max_slots, 1, 1 << 16);
  check("max_rows", config.max_rows, 1, kMaxRows);
  check("max_outputs", config.max_outputs, 1, kMaxRows);
  return config;
}

}  // namespace

void encode_batch(ByteWriter& writer, const stage::Batch& batch) {
  const uint32_t n_rows = batch.n_rows();
  const bool multi_axis = std::ranges::any_of(batch.positions, is_multi_axis);
  writer.write(static_cast<uint8_t>((multi_axis ? kMultiAxisPositions : 0) |
                                    (batch.ancestors.empty() ? 0 : kHasAncestors) |
                                    (batch.adapters.empty() ? 0 : kHasAdapters)));
  writer.write(static_cast<uint8_t>(n_rows == 0 ? 0 : batch.visible.size() / n_rows));
  write_varint(writer, n_rows);
  write_varints<int32_t>(writer, batch.tokens);
  for (const auto& position : batch.positions)
    write_varints<int32_t>(writer, std::span(position).first(multi_axis ? 4 : 1));
  write_varints<stage::Slot>(writer, batch.slots);
  for (const stage::VisibleRange& range : batch.visible) {
    write_varint(writer, static_cast<uint32_t>(range.from));
    write_varint(writer, static_cast<uint32_t>(range.to));
  }
  if (!batch.ancestors.empty()) write_array<uint64_t>(writer, batch.ancestors);
  if (!batch.adapters.empty()) write_varints<uint32_t>(writer, batch.adapters);
  write_varint(writer, static_cast<uint32_t>(batch.kv_ops.size()));
  for (const stage::KvOp& op : batch.kv_ops) write_kv_op(writer, op);
  write_varint(writer, static_cast<uint32_t>(batch.outputs.size()));
  for (const stage::OutputRequest& request : batch.outputs) write_request(writer, request);
}

stage::Batch decode_batch(std::span<const std::byte> bytes) {
  ByteReader reader(bytes, "batch");
  const auto flags = reader.read<uint8_t>("flags");
  if (flags > (kMultiAxisPositions | kHasAncestors | kHasAdapters))
    throw FormatError(fmt::format("batch: flags {:#x} are not known", flags));
  const auto n_groups = reader.read<uint8_t>("number of cache groups");
  const uint32_t n_rows = read_count(reader, 1, "rows");
  if (n_rows > kMaxRows) throw FormatError(fmt::format("batch: {} rows, at most {} are accepted", n_rows, kMaxRows));

  stage::Batch batch;
  batch.tokens = read_varints<int32_t>(reader, n_rows, "tokens");
  if ((flags & kMultiAxisPositions) != 0) {
    const auto values = read_varints<int32_t>(reader, uint64_t{n_rows} * 4, "positions");
    for (size_t i = 0; i < values.size(); i += 4)
      batch.positions.push_back({values[i], values[i + 1], values[i + 2], values[i + 3]});
  } else {
    for (const int32_t p : read_varints<int32_t>(reader, n_rows, "positions")) batch.positions.push_back({p, p, p, p});
  }
  batch.slots = read_varints<stage::Slot>(reader, n_rows, "slots");
  const auto ranges = read_varints<int32_t>(reader, uint64_t{n_rows} * n_groups * 2, "visible ranges");
  for (size_t i = 0; i < ranges.size(); i += 2) batch.visible.push_back({ranges[i], ranges[i + 1]});
  // As in Batch: n_rows x n_rows bits, row by row, padded to 64 at the end.
  if ((flags & kHasAncestors) != 0)
    batch.ancestors = read_array<uint64_t>(reader, (uint64_t{n_rows} * n_rows + 63) / 64, "ancestor bits");
  if ((flags & kHasAdapters) != 0) batch.adapters = read_varints<uint32_t>(reader, n_rows, "adapters");
  constexpr uint64_t kMinKvOpBytes = 6, kMinRequestBytes = 2;
  const uint32_t n_kv_ops = read_count(reader, kMinKvOpBytes, "KV operations");
  for (uint32_t i = 0; i < n_kv_ops; ++i) batch.kv_ops.push_back(read_kv_op(reader));
  const uint32_t n_outputs = read_count(reader, kMinRequestBytes, "outputs");
  if (n_outputs > kMaxRows)
    throw FormatError(fmt::format("batch: {} outputs, at most {} are accepted", n_outputs, kMaxRows));
  for (uint32_t i = 0; i < n_outputs; ++i) batch.outputs.push_back(read_request(reader));
  if (reader.remaining() != 0) throw FormatError(fmt::format("batch: {} bytes after its end", reader.remaining()));
  return batch;
}

void encode_manifest(ByteWriter& writer, const weights::Manifest& manifest) {
  writer.write(static_cast<uint32_t>(manifest.tensors.size()));
  for (const weights::TensorEntry& tensor : manifest.tensors) {
    CARAVAN_ASSERT(tensor.chunks.size() == weights::n_chunks(tensor.size_bytes),
                   "manifests that travel are made with hashes");
    writer.write(static_cast<uint32_t>(tensor.name.size()));
    writer.write_string(tensor.name);
    writer.write(static_cast<uint32_t>(tensor.type));
    for (const int64_t n : tensor.ne) writer.write(n);
    writer.write(tensor.size_bytes);
    for (const Digest& digest : tensor.chunks) writer.write_bytes(std::as_bytes(std::span(digest.bytes)));
  }
}

weights::Manifest decode_manifest(std::span<const std::byte> bytes) {
  ByteReader reader(bytes, "manifest");
  const auto n_tensors = reader.read<uint32_t>("number of tensors");
  if (n_tensors > kMaxTensors)
    throw FormatError(fmt::format("manifest: {} tensors, at most {} are accepted", n_tensors, kMaxTensors));
  weights::Manifest manifest;
  for (uint32_t i = 0; i < n_tensors; ++i) {
    weights::TensorEntry tensor;
    tensor.name = reader.take_string(reader.read<uint32_t>("length of a tensor's name"), "tensor name");
    const auto type = reader.read<uint32_t>("tensor type");
    if (tensor::find_dtype(type) == nullptr)
      throw FormatError(fmt::format("manifest: tensor '{}': type {} is not known", tensor.name, type));
    tensor.type = static_cast<tensor::DType>(type);
    for (int64_t& n : tensor.ne) n = reader.read<int64_t>("tensor shape");
    tensor.size_bytes = reader.read<uint64_t>("tensor size");
    const uint64_t n_chunks =
        tensor.size_bytes / weights::kChunkBytes + (tensor.size_bytes % weights::kChunkBytes != 0);
    const auto digests = reader.take(checked_multiply(n_chunks, sizeof(Digest::bytes), "chunk hashes"), "chunk hashes");
    tensor.chunks.resize(n_chunks);
    for (uint64_t c = 0; c < n_chunks; ++c)
      std::memcpy(tensor.chunks[c].bytes.data(), digests.data() + c * sizeof(Digest::bytes), sizeof(Digest::bytes));
    manifest.tensors.push_back(std::move(tensor));
  }
  if (reader.remaining() != 0) throw FormatError(fmt::format("manifest: {} bytes after its end", reader.remaining()));
  weights::validate(manifest);
  return manifest;
}

EncodedLoad encode_load(const stage::LoadRequest& request, uint32_t stage, uint32_t device) {
  EncodedLoad encoded;
  pb::LoadSlice& header = encoded.header;
  header.set_stage(stage);
  header.set_device(device);
  header.mutable_slice()->set_layer_begin(request.slice.layer_begin);
  header.mutable_slice()->set_layer_end(request.slice.layer_end);
  header.mutable_slice()->set_embeds(request.slice.embeds);
  header.mutable_slice()->set_outputs(request.slice.outputs);
  pb::CacheConfig& cache = *header.mutable_cache();
  cache.set_k_type(static_cast<uint32_t>(request.cache.k_type));
  cache.set_v_type(static_cast<uint32_t>(request.cache.v_type));
  cache.set_block_tokens(request.cache.block_tokens);
  cache.mutable_n_blocks()->Add(request.cache.n_blocks.begin(), request.cache.n_blocks.end());
  cache.set_max_slots(request.cache.max_slots);
  cache.set_max_rows(request.cache.max_rows);
  cache.set_max_outputs(request.cache.max_outputs);

  ByteWriter writer;
  gguf::write_metadata(writer, request.hyperparameters);
  if (writer.data().size() > kMaxMetadataBytes)
    throw NotSupportedError(fmt::format("hyperparameters of {} bytes, a backend takes at most {}", writer.data().size(),
                                        kMaxMetadataBytes));
  header.set_n_metadata(static_cast<uint32_t>(request.hyperparameters.entries().size()));
  header.set_metadata_bytes(writer.data().size());
  encode_manifest(writer, request.manifest);
  encoded.payload = writer.release();
  return encoded;
}

stage::LoadRequest decode_load(const pb::LoadSlice& header, std::span<const std::byte> payload,
                               const std::string& source) {
  if (header.metadata_bytes() > payload.size() || header.metadata_bytes() > kMaxMetadataBytes)
    throw ProtocolError(fmt::format("LoadSlice: {} bytes of metadata in a payload of {}, at most {} are accepted",
                                    header.metadata_bytes(), payload.size(), kMaxMetadataBytes));
  ByteReader reader(payload.first(header.metadata_bytes()), "hyperparameters from " + source);
  stage::LoadRequest request{
      .hyperparameters = gguf::read_metadata(reader, header.n_metadata(), "hyperparameters from " + source),
      .manifest = {},
      .slice = {},
      .cache = {}};
  if (reader.remaining() != 0)
    throw ProtocolError(fmt::format("LoadSlice: {} bytes after the metadata's end", reader.remaining()));
  request.manifest = decode_manifest(payload.subspan(header.metadata_bytes()));
  request.slice = {header.slice().layer_begin(), header.slice().layer_end(), header.slice().embeds(),
                   header.slice().outputs()};
  if (request.slice.layer_begin > request.slice.layer_end || request.slice.layer_end > (1u << 16))
    throw ProtocolError(
        fmt::format("LoadSlice: layers [{}, {}) are no range", request.slice.layer_begin, request.slice.layer_end));
  request.cache = read_cache(header.cache());
  return request;
}

namespace {

// Names are shorter; 16 of these fit a header.
constexpr size_t kMaxEndpointBytes = 300, kMaxBackendIdBytes = 64;

bool is_usable(std::string_view endpoint, std::string_view backend_id) {
  return endpoint.size() <= kMaxEndpointBytes && !backend_id.empty() && backend_id.size() <= kMaxBackendIdBytes;
}

}  // namespace

void encode_peers(pb::LoadSlice& header, std::span<const PeerAddress> peers) {
  for (const PeerAddress& peer : peers) {
    if (header.peers_size() == static_cast<int>(kMaxWeightPeers)) return;
    if (!is_usable(peer.endpoint, peer.backend_id)) continue;
    pb::PeerAddress& added = *header.add_peers();
    added.set_endpoint(peer.endpoint);
    added.set_backend_id(peer.backend_id);
  }
}

std::vector<PeerAddress> decode_peers(const pb::LoadSlice& header) {
  if (header.peers_size() > static_cast<int>(kMaxWeightPeers))
    throw ProtocolError(
        fmt::format("LoadSlice: {} other backends, at most {} are accepted", header.peers_size(), kMaxWeightPeers));
  std::vector<PeerAddress> peers;
  for (const pb::PeerAddress& peer : header.peers()) {
    if (!is_usable(peer.endpoint(), peer.backend_id()))
      throw ProtocolError(fmt::format(
          "LoadSlice: another backend with an endpoint of {} bytes and an id of {}, expected at most {}, and 1 to {}",
          peer.endpoint().size(), peer.backend_id().size(), kMaxEndpointBytes, kMaxBackendIdBytes));
    peers.push_back({peer.endpoint(), peer.backend_id()});
  }
  return peers;
}

std::string encode_bits(const std::vector<bool>& bits) {
  std::string bytes((bits.size() + 7) / 8, '\0');
  for (size_t i = 0; i < bits.size(); ++i)
    if (bits[i]) bytes[i / 8] = static_cast<char>(bytes[i / 8] | (1 << (i % 8)));
  return bytes;
}

std::vector<bool> decode_bits(std::string_view bytes, size_t n) {
  if (bytes.size() != (n + 7) / 8)
    throw ProtocolError(fmt::format("{} bytes for {} bits, expected {}", bytes.size(), n, (n + 7) / 8));
  std::vector<bool> bits(n);
  for (size_t i = 0; i < n; ++i) bits[i] = (static_cast<unsigned char>(bytes[i / 8]) >> (i % 8) & 1) != 0;
  return bits;
}

uint64_t output_bytes(const stage::Batch& batch, const OutputShape& shape) {
  if (!shape.outputs) return uint64_t{batch.n_rows()} * shape.n_embd * sizeof(float);
  uint64_t bytes = 0;
  for (const stage::OutputRequest& request : batch.outputs) {
    switch (request.kind) {
      case stage::OutputKind::none:
        break;
      case stage::OutputKind::hidden:
        bytes += uint64_t{shape.n_embd} * sizeof(float);
        break;
      case stage::OutputKind::logits:
        bytes += uint64_t{shape.n_vocab} * sizeof(float);
        break;
      case stage::OutputKind::candidates:
        bytes += sizeof(float) + uint64_t{n_candidates(request, shape)} * (sizeof(int32_t) + sizeof(float)) +
                 request.named_ids.size() * sizeof(float);
        break;
    }
  }
  return bytes;
}

std::vector<std::byte> encode_output(const stage::StageOutput& output) {
  ByteWriter writer;
  write_array<float>(writer, output.hidden);
  for (const stage::RowOutput& row : output.outputs) {
    if (row.kind == stage::OutputKind::candidates) {
      writer.write(row.log_sum_exp);
      write_array<int32_t>(writer, row.ids);
    }
    write_array<float>(writer, row.values);
  }
  return writer.release();
}

void decode_output(std::span<const std::byte> payload, const stage::Batch& batch, const OutputShape& shape,
                   stage::StageOutput& output) {
  const uint64_t expected = output_bytes(batch, shape);
  if (payload.size() != expected)
    throw ProtocolError(
        fmt::format("Output: a payload of {} bytes, the batch asks for {} bytes", payload.size(), expected));
  ByteReader reader(payload, "output");
  if (!shape.outputs) {
    output.hidden = read_array<float>(reader, uint64_t{batch.n_rows()} * shape.n_embd, "hidden rows");
    return;
  }
  for (const stage::OutputRequest& request : batch.outputs) {
    stage::RowOutput row{request.row, request.kind, {}, {}, 0};
    uint64_t n_values = 0;
    switch (request.kind) {
      case stage::OutputKind::none:
        break;
      case stage::OutputKind::hidden:
        n_values = shape.n_embd;
        break;
      case stage::OutputKind::logits:
        n_values = shape.n_vocab;
        break;
      case stage::OutputKind::candidates:
        row.log_sum_exp = reader.read<float>("log-sum-exp");
        row.ids = read_array<int32_t>(reader, n_candidates(request, shape), "candidate ids");
        for (const int32_t id : row.ids)
          if (id < 0 || static_cast<uint32_t>(id) >= shape.n_vocab)
            throw ProtocolError(
                fmt::format("Output: candidate {} is not below the vocabulary's size {}", id, shape.n_vocab));
        n_values = row.ids.size() + request.named_ids.size();
        break;
    }
    row.values = read_array<float>(reader, n_values, "output values");
    output.outputs.push_back(std::move(row));
  }
}

void write_fence(pb::Fence& out, const stage::Fence& fence) {
  out.set_session(fence.session);
  out.set_epoch(fence.epoch);
  out.set_ticket(fence.ticket);
}

stage::Fence read_fence(const pb::Fence& fence) { return {fence.session(), fence.epoch(), fence.ticket()}; }

std::vector<float> decode_floats(std::span<const std::byte> bytes) {
  if (bytes.size() % sizeof(float) != 0)
    throw FormatError(fmt::format("{} bytes are no whole number of f32 values", bytes.size()));
  ByteReader reader(bytes, "f32 values");
  return read_array<float>(reader, bytes.size() / sizeof(float), "f32 values");
}

void write_profile(pb::SurveyResult& out, const stage::DeviceProfile& profile) {
  for (const auto& [type, rate] : profile.matrices) {
    pb::MatrixRate& row = *out.add_matrices();
    row.set_type(static_cast<uint32_t>(type));
    row.set_bytes_per_s(rate.bytes_per_s);
    row.set_ops_per_s(rate.ops_per_s);
  }
  out.set_cache_bytes_per_s(profile.cache_bytes_per_s);
  out.set_step_seconds(profile.step_seconds);
}

stage::DeviceProfile read_profile(const pb::SurveyResult& result) {
  const auto rate = [](double value) {
    if (!(value > 0 && std::isfinite(value))) throw ProtocolError(fmt::format("SurveyResult: {} is no speed", value));
    return value;
  };
  stage::DeviceProfile profile;
  for (const pb::MatrixRate& row : result.matrices()) {
    const stage::MatrixRate speeds{rate(row.bytes_per_s()), rate(row.ops_per_s())};
    if (const tensor::DTypeInfo* info = tensor::find_dtype(row.type()); info != nullptr)
      profile.matrices[info->type] = speeds;
  }
  if (profile.matrices.empty()) throw ProtocolError("SurveyResult: no speeds");
  profile.cache_bytes_per_s = rate(result.cache_bytes_per_s());
  if (!(result.step_seconds() >= 0 && std::isfinite(result.step_seconds())))
    throw ProtocolError(fmt::format("SurveyResult: {} is no time", result.step_seconds()));
  profile.step_seconds = result.step_seconds();
  return profile;
}

void write_times(pb::SurveyLayerResult& out, const stage::LayerTimes& times) {
  out.mutable_n_rows()->Assign(times.n_rows.begin(), times.n_rows.end());
  out.mutable_seconds()->Assign(times.seconds.begin(), times.seconds.end());
}

stage::LayerTimes read_times(const pb::SurveyLayerResult& result) {
  stage::LayerTimes times;
  times.n_rows.assign(result.n_rows().begin(), result.n_rows().end());
  times.seconds.assign(result.seconds().begin(), result.seconds().end());
  if (times.n_rows.empty() || times.n_rows.size() != times.seconds.size() || times.n_rows.front() != 1 ||
      times.n_rows.back() > kMaxRows || !std::ranges::is_sorted(times.n_rows, std::ranges::less_equal()))
    throw ProtocolError(
        fmt::format("SurveyLayerResult: {} numbers of rows and {} times, expected as many, for rows "
                    "that ascend from 1 to {} at most",
                    times.n_rows.size(), times.seconds.size(), kMaxRows));
  for (const double seconds : times.seconds)
    if (!(seconds > 0 && std::isfinite(seconds)))
      throw ProtocolError(fmt::format("SurveyLayerResult: {} is no time", seconds));
  return times;
}

}  // namespace caravan::remote
