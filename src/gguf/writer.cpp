// GGUF writer. Layout: docs/gguf.md.
#include "gguf/writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/bytes.h"
#include "base/error.h"
#include "gguf/format.h"

namespace caravan::gguf {
namespace {

uint64_t round_up(uint64_t n, uint64_t alignment) { return (n + alignment - 1) / alignment * alignment; }

uint64_t checked_alignment(const Metadata& metadata) {
  const uint32_t alignment = metadata.get_u32(kKeyAlignment, kDefaultAlignment);
  if (!std::has_single_bit(alignment))
    throw FormatError(
        fmt::format("{}: key '{}': expected a power of two, found {}", metadata.source(), kKeyAlignment, alignment));
  return alignment;
}

}  // namespace

std::vector<std::byte> encode_header(const Metadata& metadata, std::span<const TensorInfo> tensors,
                                     uint64_t alignment) {
  ByteWriter writer;
  writer.write(kMagic);
  writer.write(kVersion);
  writer.write(uint64_t{tensors.size()});
  writer.write(uint64_t{metadata.entries().size()});
  write_metadata(writer, metadata);
  for (const TensorInfo& tensor : tensors) {
    writer.write(uint64_t{tensor.name.size()});
    writer.write_string(tensor.name);
    writer.write(static_cast<uint32_t>(tensor.n_dims));
    for (int i = 0; i < tensor.n_dims; ++i) writer.write(tensor.ne[static_cast<size_t>(i)]);
    writer.write(static_cast<uint32_t>(tensor.type));
    writer.write(tensor.offset);
  }
  writer.pad_to(static_cast<size_t>(alignment));
  return writer.release();
}

Writer::Writer(const std::filesystem::path& path, Metadata metadata)
    : file_(path), metadata_(std::move(metadata)), alignment_(checked_alignment(metadata_)) {}

size_t Writer::declare(const std::string& name, tensor::DType type, std::span<const int64_t> ne) {
  CARAVAN_ASSERT(!data_begun_, "tensors are declared before the data begins");
  const std::string where = fmt::format("{}: tensor '{}'", file_.path(), name);
  if (name.empty() || name.size() > kMaxTensorNameBytes)
    throw FormatError(
        fmt::format("{}: expected a name of 1 to {} bytes, found {}", where, kMaxTensorNameBytes, name.size()));
  if (ne.empty() || ne.size() > static_cast<size_t>(kMaxDimensions))
    throw FormatError(fmt::format("{}: {} dimensions, expected 1 to {}", where, ne.size(), kMaxDimensions));
  TensorInfo tensor;
  tensor.name = name;
  tensor.type = type;
  tensor.n_dims = static_cast<int>(ne.size());
  std::copy(ne.begin(), ne.end(), tensor.ne.begin());
  tensor.size_bytes = tensor::checked_size_bytes(tensor::dtype_info(type), tensor.ne, where);
  if (!index_.emplace(name, tensors_.size()).second) throw FormatError(where + " occurs twice");
  // Relative to the data until begin_data() knows where that is.
  if (!tensors_.empty()) {
    const uint64_t end = checked_add(tensors_.back().offset, tensors_.back().size_bytes, where + ": offset");
    tensor.offset = round_up(end, alignment_);
  }
  tensors_.push_back(std::move(tensor));
  return tensors_.size() - 1;
}

void Writer::begin_data() {
  CARAVAN_ASSERT(!data_begun_, "the data begins once");
  data_begun_ = true;
  written_bytes_.assign(tensors_.size(), 0);
  const auto header = encode_header(metadata_, tensors_, alignment_);
  file_.write_at(0, header);
  for (TensorInfo& tensor : tensors_) tensor.offset += header.size();
}

void Writer::write(size_t number, uint64_t offset, std::span<const std::byte> bytes) {
  CARAVAN_ASSERT(data_begun_ && number < tensors_.size(), "data is written to declared tensors after begin_data()");
  const TensorInfo& tensor = tensors_[number];
  CARAVAN_ASSERT(offset <= tensor.size_bytes && bytes.size() <= tensor.size_bytes - offset,
                 "callers write inside the tensor");
  file_.write_at(tensor.offset + offset, bytes);
  const std::lock_guard lock(mutex_);
  written_bytes_[number] += bytes.size();
}

void Writer::finish() {
  CARAVAN_ASSERT(data_begun_, "finish() follows begin_data()");
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (written_bytes_[i] != tensors_[i].size_bytes)
      throw FormatError(fmt::format("{}: tensor '{}': expected {} bytes to be written, found {}", file_.path(),
                                    tensors_[i].name, tensors_[i].size_bytes, written_bytes_[i]));
  // Padding after the last tensor, which every reader accepts and some expect.
  if (!tensors_.empty()) {
    const uint64_t end = tensors_.back().offset + tensors_.back().size_bytes;
    const std::vector<std::byte> padding(static_cast<size_t>(round_up(end, alignment_) - end));
    file_.write_at(end, padding);
  }
  file_.commit();
}

uint64_t Writer::weight_bytes() const {
  uint64_t total = 0;
  for (const TensorInfo& tensor : tensors_) total += tensor.size_bytes;
  return total;
}

}  // namespace caravan::gguf
