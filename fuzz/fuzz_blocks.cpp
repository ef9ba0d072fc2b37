// Any bytes as blocks of every type that can be dequantised, and any finite floats through every quantiser. The first
// byte chooses the type.
#include <cmath>
#include <cstring>
#include <vector>

#include "tensor/dtype.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan::tensor;
  if (size == 0) return 0;
  const auto types = all_dtypes();
  const DTypeInfo& info = types[data[0] % types.size()];
  if (info.dequantize == nullptr) return 0;
  const size_t n_blocks = (size - 1) / info.block_bytes;
  if (n_blocks == 0) return 0;
  std::vector<std::byte> blocks(n_blocks * info.block_bytes);
  std::memcpy(blocks.data(), data + 1, blocks.size());
  std::vector<float> values(n_blocks * info.block_length);
  const auto n = static_cast<int64_t>(values.size());
  info.dequantize(blocks.data(), values.data(), n);
  if (info.quantize == nullptr) return 0;
  for (float& x : values)
    if (!std::isfinite(x)) x = 0;
  info.quantize(values.data(), blocks.data(), n);
  info.dequantize(blocks.data(), values.data(), n);
  return 0;
}
