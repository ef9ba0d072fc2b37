// GGUF reader: every number from the file is checked before it is used. Layout: docs/gguf.md.
#include "gguf/reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "base/bytes.h"
#include "base/error.h"
#include "gguf/format.h"

namespace caravan::gguf {
namespace {

// A name of at least one byte with its length, the number of dimensions, the type and the offset.
constexpr uint64_t kMinTensorInfoBytes = 8 + 1 + 4 + 4 + 8;

// Headers beyond this are not mapped where addresses are scarce; real ones take some megabytes (the vocabulary).
constexpr uint64_t kMaxMappedBytes = sizeof(void*) >= 8 ? ~uint64_t{0} : uint64_t{512} << 20;

void check_magic_and_version(uint32_t magic, uint32_t version, const std::string& source) {
  if (magic != kMagic)
    throw FormatError(
        fmt::format("{}: not a GGUF file: expected magic 0x{:08x} ('GGUF'), found 0x{:08x}", source, kMagic, magic));
  if (version >= kOldestVersion && version <= kVersion) return;
  if (version == 1)
    throw FormatError(fmt::format(
        "{}: GGUF version 1 is not supported (expected 2 or 3): convert the file again with a current tool", source));
  const uint32_t swapped = __builtin_bswap32(version);
  if (swapped >= 1 && swapped <= kVersion)
    throw FormatError(fmt::format("{}: a big-endian GGUF file (version {}); expected little-endian", source, swapped));
  throw FormatError(fmt::format("{}: GGUF version {} is unknown, expected 2 or 3", source, version));
}

uint64_t read_alignment(const Metadata& metadata) {
  const uint32_t alignment = metadata.get_u32(kKeyAlignment, kDefaultAlignment);
  if (!std::has_single_bit(alignment))
    throw FormatError(
        fmt::format("{}: key '{}': expected a power of two, found {}", metadata.source(), kKeyAlignment, alignment));
  return alignment;
}

// Names that older programs gave to type numbers which GGUF has dropped since.
std::string_view dropped_type(uint32_t number) {
  switch (number) {
    case 4:
      return " (Q4_2, dropped from GGUF)";
    case 5:
      return " (Q4_3, dropped from GGUF)";
    case 9:
      return " (Q8_1, for activations only)";
    case 15:
      return " (Q8_K, for activations only)";
    case 31:
      return " (Q4_0_4_4, dropped from GGUF: convert the file to Q4_0)";
    case 32:
      return " (Q4_0_4_8, dropped from GGUF: convert the file to Q4_0)";
    case 33:
      return " (Q4_0_8_8, dropped from GGUF: convert the file to Q4_0)";
    case 36:
    case 37:
    case 38:
      return " (an interleaved IQ4_NL, dropped from GGUF)";
    default:
      return "";
  }
}

// Reads one tensor info; its offset is still relative to the data section.
TensorInfo read_tensor_info(ByteReader& reader, uint64_t number, const std::string& source) {
  TensorInfo tensor;
  const std::string what = fmt::format("name of tensor {}", number);
  const auto name_bytes = reader.read<uint64_t>(what);
  tensor.name = std::string(reader.take_string(name_bytes, what));
  if (tensor.name.empty() || tensor.name.size() > kMaxTensorNameBytes)
    throw FormatError(
        fmt::format("{}: {}: expected 1 to {} bytes, found {}", source, what, kMaxTensorNameBytes, tensor.name.size()));

  const std::string subject = fmt::format("tensor '{}'", tensor.name);
  const std::string where = source + ": " + subject;
  const auto n_dims = reader.read<uint32_t>(subject);
  if (n_dims > static_cast<uint32_t>(kMaxDimensions))
    throw FormatError(fmt::format("{}: {} dimensions, expected at most {}", where, n_dims, kMaxDimensions));
  tensor.n_dims = static_cast<int>(n_dims);
  for (uint32_t i = 0; i < n_dims; ++i) tensor.ne[i] = reader.read<int64_t>(subject);
  const auto type_number = reader.read<uint32_t>(subject);
  const tensor::DTypeInfo* type = tensor::find_dtype(type_number);
  if (type == nullptr)
    throw FormatError(fmt::format("{}: type {}{} is not known", where, type_number, dropped_type(type_number)));
  tensor.type = type->type;
  tensor.size_bytes = tensor::checked_size_bytes(*type, tensor.ne, where);
  tensor.offset = reader.read<uint64_t>(subject);
  return tensor;
}

void check_no_overlap(const std::vector<TensorInfo>& tensors, const std::string& source) {
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tensors[a].offset < tensors[b].offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo &before = tensors[order[i - 1]], &tensor = tensors[order[i]];
    if (tensor.offset < before.offset + before.size_bytes)
      throw FormatError(fmt::format("{}: tensor '{}': offset {} lies inside tensor '{}' ({} + {} bytes)", source,
                                    tensor.name, tensor.offset, before.name, before.offset, before.size_bytes));
  }
}

// Makes offsets absolute and checks that the data lies inside the file.
void place_tensors(std::vector<TensorInfo>& tensors, uint64_t data_start, uint64_t alignment, uint64_t file_size,
                   const std::string& source) {
  for (TensorInfo& tensor : tensors) {
    const std::string where = fmt::format("{}: tensor '{}'", source, tensor.name);
    if (tensor.offset % alignment != 0)
      throw FormatError(
          fmt::format("{}: offset {}, expected a multiple of the alignment {}", where, tensor.offset, alignment));
    tensor.offset = checked_add(data_start, tensor.offset, where + ": offset");
    const uint64_t end = checked_add(tensor.offset, tensor.size_bytes, where + ": end");
    if (end > file_size)
      throw FormatError(
          fmt::format("{}: offset {} + {} bytes > file size {}", where, tensor.offset, tensor.size_bytes, file_size));
  }
  check_no_overlap(tensors, source);
}

// Maps only as much as holds the header and parses it.
Directory parse_file(const InputFile& file) {
  const MappedFile mapped(file.path(), kMaxMappedBytes);
  return parse_directory(mapped.bytes(), file.size(), file.path());
}

// Checks the split.* keys of part number of count.
void check_part(const Directory& part, uint32_t number, uint32_t count) {
  const std::string& source = part.metadata.source();
  const uint32_t found_number = part.metadata.get_u32(kKeySplitNo);
  const uint32_t found_count = part.metadata.get_u32(kKeySplitCount);
  if (found_number != number)
    throw FormatError(fmt::format("{}: key '{}': expected {}, found {}", source, kKeySplitNo, number, found_number));
  if (found_count != count)
    throw FormatError(fmt::format("{}: key '{}': expected {}, found {}", source, kKeySplitCount, count, found_count));
}

// The common prefix of a split model's files; first is the directory of the file at path.
std::string require_split_prefix(const Directory& first, const std::string& path, uint32_t count) {
  const uint32_t number = first.metadata.get_u32(kKeySplitNo);
  if (number != 0)
    throw FormatError(fmt::format("{}: part {} of a model split into {}; give the first part, '...{}'", path,
                                  uint64_t{number} + 1, count, split_path("", 0, count)));
  std::string prefix = split_prefix(path, 0, count);
  if (prefix.empty())
    throw FormatError(fmt::format("{}: the first of {} parts must be named '...{}' so that the others can be found",
                                  path, count, split_path("", 0, count)));
  return prefix;
}

}  // namespace

std::string split_path(std::string_view prefix, uint32_t number, uint32_t count) {
  return fmt::format("{}-{:05}-of-{:05}.gguf", prefix, uint64_t{number} + 1, count);
}

std::string split_prefix(std::string_view path, uint32_t number, uint32_t count) {
  const std::string postfix = split_path("", number, count);
  return path.ends_with(postfix) ? std::string(path.substr(0, path.size() - postfix.size())) : std::string();
}

Directory parse_directory(std::span<const std::byte> header, uint64_t file_size, const std::string& source) {
  ByteReader reader(header, source);
  Directory directory;
  const auto magic = reader.read<uint32_t>("magic");
  directory.version = reader.read<uint32_t>("version");
  check_magic_and_version(magic, directory.version, source);
  const auto n_tensors = reader.read<uint64_t>("tensor count");
  const auto n_entries = reader.read<uint64_t>("metadata count");
  directory.metadata = read_metadata(reader, n_entries, source);
  const uint64_t alignment = read_alignment(directory.metadata);

  if (n_tensors > reader.remaining() / kMinTensorInfoBytes)
    throw FormatError(
        fmt::format("{}: {} tensors do not fit the {} bytes that are left", source, n_tensors, reader.remaining()));
  std::map<std::string, uint64_t, std::less<>> numbers;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    TensorInfo tensor = read_tensor_info(reader, i, source);
    if (!numbers.emplace(tensor.name, i).second)
      throw FormatError(fmt::format("{}: tensor '{}' occurs twice", source, tensor.name));
    directory.tensors.push_back(std::move(tensor));
  }
  const uint64_t data_start = (uint64_t{reader.offset()} + alignment - 1) / alignment * alignment;
  place_tensors(directory.tensors, data_start, alignment, file_size, source);
  return directory;
}

Model Model::open(const std::filesystem::path& path) {
  Model model;
  model.path_ = path.string();
  uint32_t n_parts = 1;
  std::string prefix;
  for (uint32_t part = 0; part < n_parts; ++part) {
    model.files_.emplace_back(part == 0 ? model.path_ : split_path(prefix, part, n_parts));
    Directory directory = parse_file(model.files_.back());
    if (part == 0) {
      n_parts = std::max(directory.metadata.get_u32(kKeySplitCount, 1), uint32_t{1});
      if (n_parts > 1) prefix = require_split_prefix(directory, model.path_, n_parts);
      model.metadata_ = std::move(directory.metadata);
    } else {
      check_part(directory, part, n_parts);
    }
    for (TensorInfo& tensor : directory.tensors) {
      tensor.file = static_cast<int>(part);
      if (!model.index_.emplace(tensor.name, model.tensors_.size()).second)
        throw FormatError(fmt::format("{}: tensor '{}' is in an earlier part of the model, too",
                                      model.files_.back().path(), tensor.name));
      model.tensors_.push_back(std::move(tensor));
    }
  }
  if (const auto total = model.metadata_.find_u32(kKeySplitTensorsCount); total && n_parts > 1)
    if (*total != model.tensors_.size())
      throw FormatError(fmt::format("{}: key '{}': expected {} tensors, found {} in {} files", model.path_,
                                    kKeySplitTensorsCount, *total, model.tensors_.size(), n_parts));
  return model;
}

const TensorInfo* Model::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

const TensorInfo& Model::get(std::string_view name) const {
  const TensorInfo* tensor = find(name);
  if (tensor == nullptr) throw FormatError(fmt::format("{}: tensor '{}' is missing", path_, name));
  return *tensor;
}

uint64_t Model::weight_bytes() const {
  uint64_t total = 0;
  for (const TensorInfo& tensor : tensors_) total += tensor.size_bytes;
  return total;
}

void Model::read(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const {
  CARAVAN_ASSERT(offset <= tensor.size_bytes && out.size() <= tensor.size_bytes - offset,
                 "callers ask for a range inside the tensor");
  files_[static_cast<size_t>(tensor.file)].read_at(tensor.offset + offset, out);
}

std::vector<std::byte> Model::read(const TensorInfo& tensor) const {
  std::vector<std::byte> bytes(static_cast<size_t>(tensor.size_bytes));
  read(tensor, 0, bytes);
  return bytes;
}

std::vector<float> Model::read_f32(const TensorInfo& tensor) const {
  const tensor::DTypeInfo& type = tensor::dtype_info(tensor.type);
  if (type.dequantize == nullptr)
    throw NotSupportedError(
        fmt::format("{}: tensor '{}': values of type {} cannot be read", path_, tensor.name, type.name));
  const int64_t n = tensor::n_elements(tensor.ne);
  std::vector<float> values(static_cast<size_t>(n));
  type.dequantize(read(tensor).data(), values.data(), n);
  return values;
}

}  // namespace caravan::gguf
