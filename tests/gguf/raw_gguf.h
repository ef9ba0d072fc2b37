// Builds the bytes of GGUF headers field by field, also wrong ones, for the reader's tests.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "gguf/metadata.h"

namespace caravan::gguf::testing {

class RawGguf {
 public:
  RawGguf& number(auto value) {
    writer_.write(value);
    return *this;
  }
  RawGguf& string(std::string_view text) {
    writer_.write(uint64_t{text.size()});
    writer_.write_string(text);
    return *this;
  }
  RawGguf& header(uint64_t n_tensors, uint64_t n_entries, uint32_t version = 3) {
    return number(uint32_t{0x46554747}).number(version).number(n_tensors).number(n_entries);
  }
  RawGguf& key(std::string_view name, ValueType type) { return string(name).number(static_cast<uint32_t>(type)); }
  RawGguf& u32_entry(std::string_view name, uint32_t value) { return key(name, ValueType::u32).number(value); }
  RawGguf& tensor(std::string_view name, const std::vector<int64_t>& ne, uint32_t type, uint64_t offset) {
    string(name).number(static_cast<uint32_t>(ne.size()));
    for (const int64_t n : ne) number(n);
    return number(type).number(offset);
  }
  RawGguf& pad(size_t alignment = 32) {
    writer_.pad_to(alignment);
    return *this;
  }
  RawGguf& zeros(size_t n) {
    for (size_t i = 0; i < n; ++i) writer_.write(uint8_t{0});
    return *this;
  }
  const std::vector<std::byte>& bytes() const { return writer_.data(); }

 private:
  ByteWriter writer_;
};

}  // namespace caravan::gguf::testing
