// Records of remembered hashes, which lie in a folder that others may write to.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "weights/hash_memory.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  // The seal is put right, so that what lies behind it is reached.
  std::vector<std::byte> record(size + 32);
  if (size > 0) std::memcpy(record.data(), data, size);
  const Digest seal = sha256(std::span(record).first(size));
  std::memcpy(record.data() + size, seal.bytes.data(), seal.bytes.size());
  try {
    const weights::FileHashes hashes = weights::decode_hashes(record, "input");
    CARAVAN_ASSERT(weights::decode_hashes(weights::encode_hashes(hashes), "again") == hashes, "it reads its own");
  } catch (const FormatError&) {
    // refused, as it should be
  }
  return 0;
}
