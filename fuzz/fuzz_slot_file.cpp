// Saved slots, which a server reads back from a folder that others may write to.
#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "server/slot_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  const server::SlotFileModel model{263, 1000, 4000};
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  try {
    const std::vector<int32_t> tokens = server::decode_slot_file(bytes, model, "input");
    const std::vector<std::byte> again = server::encode_slot_file(model, tokens);
    CARAVAN_ASSERT(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()), "a file has one form");
  } catch (const FormatError&) {
    // refused, as it should be
  }
  return 0;
}
