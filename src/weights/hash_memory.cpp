#include "weights/hash_memory.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <random>

#include "base/bytes.h"
#include "base/error.h"
#include "base/file.h"
#include "base/log.h"

namespace caravan::weights {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t kMagic = 0x48565243;  // "CRVH"
constexpr uint32_t kVersion = 1;
constexpr uint64_t kDigestBytes = 32;
constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;

std::string_view as_text(const Digest& digest) {
  return {reinterpret_cast<const char*>(digest.bytes.data()), digest.bytes.size()};
}

Digest hash_of_text(std::string_view text) { return sha256(std::as_bytes(std::span(text.data(), text.size()))); }

}  // namespace

FileIdentity identify(const fs::path& path) {
  std::error_code ignored;
  fs::path resolved = fs::canonical(path, ignored);
  if (ignored) resolved = fs::absolute(path);
  struct stat info{};
  if (stat(path.c_str(), &info) != 0) throw SystemError("look at '" + path.string() + "'", errno);
  return {resolved.string(), static_cast<uint64_t>(info.st_size),
          int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

std::vector<std::byte> encode_hashes(const FileHashes& hashes) {
  ByteWriter writer;
  writer.write(kMagic);
  writer.write(kVersion);
  writer.write(static_cast<uint32_t>(hashes.file.path.size()));
  writer.write_string(hashes.file.path);
  writer.write(hashes.file.size_bytes);
  writer.write(hashes.file.mtime_ns);
  writer.write(static_cast<uint32_t>(hashes.tensors.size()));
  for (const auto& [name, tensor] : hashes.tensors) {
    writer.write(static_cast<uint32_t>(name.size()));
    writer.write_string(name);
    writer.write(tensor.offset);
    writer.write(tensor.size_bytes);
    for (const Digest& digest : tensor.chunks) writer.write_string(as_text(digest));
  }
  writer.write_string(as_text(sha256(writer.data())));
  return writer.release();
}

FileHashes decode_hashes(std::span<const std::byte> record, const std::string& source) {
  if (record.size() < kDigestBytes) throw FormatError(fmt::format("{}: {} bytes are no record", source, record.size()));
  const auto content = record.first(record.size() - kDigestBytes);
  const auto seal = record.last(kDigestBytes);
  if (sha256(content) != Digest::from_bytes({reinterpret_cast<const char*>(seal.data()), seal.size()}))
    throw FormatError(source + ": the record is damaged");
  ByteReader reader(content, source);
  const auto magic = reader.read<uint32_t>("magic");
  const auto version = reader.read<uint32_t>("version");
  if (magic != kMagic || version != kVersion)
    throw FormatError(fmt::format("{}: expected a record of version {}, found magic {:08x}, version {}", source,
                                  kVersion, magic, version));
  FileHashes hashes;
  hashes.file.path = std::string(reader.take_string(reader.read<uint32_t>("length of the path"), "path"));
  hashes.file.size_bytes = reader.read<uint64_t>("size");
  hashes.file.mtime_ns = reader.read<int64_t>("time of change");
  const auto n_tensors = reader.read<uint32_t>("number of tensors");
  for (uint32_t i = 0; i < n_tensors; ++i) {
    std::string name(reader.take_string(reader.read<uint32_t>("length of a name"), "name of a tensor"));
    FileHashes::Tensor tensor;
    tensor.offset = reader.read<uint64_t>("offset");
    tensor.size_bytes = reader.read<uint64_t>("size of a tensor");
    const uint64_t n = tensor.size_bytes / kChunkBytes + (tensor.size_bytes % kChunkBytes != 0 ? 1 : 0);
    if (n > reader.remaining() / kDigestBytes)
      throw FormatError(fmt::format("{}: tensor '{}': {} hashes do not fit the {} bytes that are left", source, name, n,
                                    reader.remaining()));
    for (uint64_t chunk = 0; chunk < n; ++chunk)
      tensor.chunks.push_back(Digest::from_bytes(reader.take_string(kDigestBytes, "hash")));
    if (!hashes.tensors.emplace(std::move(name), std::move(tensor)).second)
      throw FormatError(source + ": a tensor occurs twice");
  }
  if (reader.remaining() != 0) throw FormatError(fmt::format("{}: {} bytes too many", source, reader.remaining()));
  return hashes;
}

fs::path HashMemory::record_path(const std::string& path) const { return folder_ / hash_of_text(path).hex(); }

FileHashes HashMemory::recall(const fs::path& file) const {
  FileHashes nothing;
  nothing.file = identify(file);
  if (folder_.empty()) return nothing;
  const fs::path path = record_path(nothing.file.path);
  try {
    const InputFile record(path);
    if (record.size() > kMaxRecordBytes)
      throw FormatError(fmt::format("{}: {} bytes are too many for a record", path.string(), record.size()));
    std::vector<std::byte> bytes(static_cast<size_t>(record.size()));
    record.read_at(0, bytes);
    FileHashes hashes = decode_hashes(bytes, path.string());
    if (hashes.file == nothing.file) return hashes;
  } catch (const Error& error) {
    spdlog::debug("remembered hashes: {}", error.what());
  }
  return nothing;
}

void HashMemory::remember(const FileHashes& hashes) const {
  if (folder_.empty() || hashes.tensors.empty()) return;
  try {
    if (identify(hashes.file.path) != hashes.file) return;
    fs::create_directories(folder_);
    // Two processes may write the same record: each under a name of its own.
    std::random_device device;
    const fs::path temporary = folder_ / fmt::format("tmp-{:08x}{:08x}", device(), device());
    write_file_atomically(temporary, encode_hashes(hashes));
    fs::rename(temporary, record_path(hashes.file.path));
  } catch (const std::exception& error) {  // Error, or filesystem_error
    spdlog::debug("hashes of '{}' are not remembered: {}", hashes.file.path, error.what());
  }
}

void HashMemory::forget(const std::string& path) const {
  std::error_code ignored;
  if (!folder_.empty()) fs::remove(record_path(path), ignored);
}

ModelHashes::ModelHashes(const gguf::Model& model, HashMemory memory) : model_(model), memory_(std::move(memory)) {
  for (const InputFile& file : model.files()) {
    files_.push_back(memory_.recall(file.path()));
    recalled_ = recalled_ || !files_.back().tensors.empty();
  }
}

// Under mutex_.
const FileHashes::Tensor* ModelHashes::lookup(const gguf::TensorInfo& tensor) const {
  const auto& tensors = files_[static_cast<size_t>(tensor.file)].tensors;
  const auto found = tensors.find(tensor.name);
  if (found == tensors.end() || found->second.offset != tensor.offset || found->second.size_bytes != tensor.size_bytes)
    return nullptr;
  return &found->second;
}

bool ModelHashes::knows(const gguf::TensorInfo& tensor) const {
  const std::lock_guard lock(mutex_);
  return lookup(tensor) != nullptr;
}

std::optional<std::vector<Digest>> ModelHashes::find(const gguf::TensorInfo& tensor) const {
  const std::lock_guard lock(mutex_);
  const FileHashes::Tensor* found = lookup(tensor);
  if (found == nullptr) return std::nullopt;
  return found->chunks;
}

uint64_t ModelHashes::unknown_bytes(std::span<const std::string> names) const {
  uint64_t bytes = 0;
  for (const std::string& name : names) {
    const gguf::TensorInfo& tensor = model_.get(name);
    if (!knows(tensor)) bytes += tensor.size_bytes;
  }
  return bytes;
}

void ModelHashes::compute(std::span<const std::string> names, Progress* progress, int n_threads) {
  std::vector<std::string> unknown;
  for (const std::string& name : names)
    if (!knows(model_.get(name))) unknown.push_back(name);
  if (unknown.empty()) return;
  Manifest computed = make_manifest(model_, unknown, Hashing::sha256, progress, n_threads);
  for (TensorEntry& entry : computed.tensors) learn(model_.get(entry.name), std::move(entry.chunks));
  save();
}

void ModelHashes::learn(const gguf::TensorInfo& tensor, std::vector<Digest> chunks) {
  CARAVAN_ASSERT(chunks.size() == n_chunks(tensor.size_bytes), "a tensor is hashed as a whole");
  const std::lock_guard lock(mutex_);
  files_[static_cast<size_t>(tensor.file)].tensors[tensor.name] = {tensor.offset, tensor.size_bytes, std::move(chunks)};
}

void ModelHashes::save() const {
  std::vector<FileHashes> files;
  {
    const std::lock_guard lock(mutex_);
    files = files_;
  }
  for (const FileHashes& file : files) memory_.remember(file);
}

void ModelHashes::forget() {
  const std::lock_guard lock(mutex_);
  recalled_ = false;
  for (FileHashes& file : files_) {
    memory_.forget(file.file.path);
    file.tensors.clear();
  }
}

Manifest ModelHashes::manifest(std::span<const std::string> names) const {
  Manifest manifest;
  for (const std::string& name : names) {
    const gguf::TensorInfo& tensor = model_.get(name);
    auto chunks = find(tensor);
    CARAVAN_ASSERT(chunks, "callers compute() first");
    manifest.tensors.push_back({tensor.name, tensor.type, tensor.ne, tensor.size_bytes, std::move(*chunks)});
  }
  return manifest;
}

}  // namespace caravan::weights
