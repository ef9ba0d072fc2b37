// Fuzz target: bytes as a GGUF file. Whatever they are, parsing throws FormatError or gives a directory whose tensors
// lie inside the file; their values are then dequantised, and the metadata is written and read again.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "gguf/reader.h"
#include "tensor/dtype.h"

namespace {

using namespace caravan;

// Dequantises the first values of a tensor, where its type can be.
void touch(const gguf::TensorInfo& tensor, std::span<const std::byte> file) {
  CARAVAN_ASSERT(tensor.offset <= file.size() && tensor.size_bytes <= file.size() - tensor.offset,
                 "the parser admits only tensors inside the file");
  const tensor::DTypeInfo& type = tensor::dtype_info(tensor.type);
  if (type.dequantize == nullptr) return;
  std::vector<float> values(static_cast<size_t>(tensor::n_elements(tensor.ne)));
  type.dequantize(file.data() + tensor.offset, values.data(), static_cast<int64_t>(values.size()));
}

// What was read is written and read again: the second bytes must be the same.
void round_trip(const gguf::Metadata& metadata) {
  ByteWriter first, second;
  gguf::write_metadata(first, metadata);
  ByteReader reader(first.data(), "copy");
  gguf::write_metadata(second, gguf::read_metadata(reader, metadata.entries().size(), "copy"));
  CARAVAN_ASSERT(first.data() == second.data(), "the encoding of metadata is unique");
}

// Every getter on every key: a wrong type must be a FormatError.
void read_every_way(const gguf::Metadata& metadata) {
  for (const auto& entry : metadata.entries()) {
    const std::string& key = entry.first;
    const auto attempt = [](auto get) {
      try {
        get();
      } catch (const FormatError&) {
      }
    };
    attempt([&] { (void)metadata.get_u32(key); });
    attempt([&] { (void)metadata.get_f32(key); });
    attempt([&] { (void)metadata.find_bool(key); });
    attempt([&] { (void)metadata.get_string(key); });
    attempt([&] { (void)metadata.get_strings(key); });
    attempt([&] { (void)metadata.get_floats(key); });
    attempt([&] { (void)metadata.get_integers(key); });
    attempt([&] { (void)metadata.get_u32_per_layer(key, 4, 0); });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  try {
    const gguf::Directory directory = gguf::parse_directory(file, file.size(), "fuzz");
    for (const gguf::TensorInfo& tensor : directory.tensors) touch(tensor, file);
    round_trip(directory.metadata);
    read_every_way(directory.metadata);
  } catch (const FormatError&) {
  }
  return 0;
}
