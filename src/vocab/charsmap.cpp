#include "vocab/charsmap.h"

#include <fmt/format.h>

#include "base/bytes.h"
#include "base/error.h"

namespace caravan::vocab {

namespace {

// A unit of the double array: bits 0-7 the byte that leads here, bit 8 whether a value hangs below, bits 9-30 the
// offset to the children (bit 9: times 256). With bit 31 it is a value instead, bits 0-30.
uint32_t label(uint32_t unit) { return unit & ((1u << 31) | 0xFF); }
bool has_value(uint32_t unit) { return (unit >> 8) & 1; }
uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & (1u << 9)) >> 6); }
uint32_t value(uint32_t unit) { return unit & ~(1u << 31); }

}  // namespace

Charsmap::Charsmap(std::span<const uint8_t> bytes, const std::string& source) {
  ByteReader reader(std::as_bytes(bytes), source);
  const auto n_bytes = reader.read<uint32_t>("size of the double array");
  if (n_bytes == 0 || n_bytes % sizeof(uint32_t) != 0 || n_bytes > reader.remaining()) {
    throw FormatError(fmt::format("{}: expected a double array of whole 4-byte units within {} bytes, found {} bytes",
                                  source, reader.remaining(), n_bytes));
  }
  for (size_t i = 0; i < n_bytes / sizeof(uint32_t); i++)
    units_.push_back(reader.read<uint32_t>("a unit of the double array"));
  const auto rest = bytes.subspan(sizeof(uint32_t) + n_bytes);
  replacements_.assign(rest.begin(), rest.end());
  check(source);
}

bool Charsmap::is_child(uint32_t place, uint32_t byte) const {
  return place < units_.size() && label(units_[place]) == byte;
}

// Walks every path from the root. A damaged array may hold cycles, so each place is entered once.
void Charsmap::check(const std::string& source) const {
  std::vector<bool> seen(units_.size());
  std::vector<uint32_t> bases{offset(units_[0])};
  while (!bases.empty()) {
    const uint32_t base = bases.back();
    bases.pop_back();
    for (uint32_t byte = 1; byte < 256; byte++) {
      const uint32_t place = base ^ byte;
      if (!is_child(place, byte) || seen[place]) continue;
      seen[place] = true;
      const uint32_t children = place ^ offset(units_[place]);
      bases.push_back(children);
      if (!has_value(units_[place])) continue;
      if (children >= units_.size()) {
        throw FormatError(fmt::format("{}: a value is at unit {} of {}", source, children, units_.size()));
      }
      const size_t begin = value(units_[children]);
      if (replacements_.find('\0', begin) == std::string::npos) {
        throw FormatError(
            fmt::format("{}: the replacement at {} does not end within {} bytes", source, begin, replacements_.size()));
      }
    }
  }
}

Charsmap::Match Charsmap::longest_prefix(std::string_view text) const {
  Match found;
  if (units_.empty()) return found;
  uint32_t place = offset(units_[0]);
  for (size_t i = 0; i < text.size(); i++) {
    const uint32_t byte = static_cast<uint8_t>(text[i]);
    place ^= byte;
    if (byte == 0 || !is_child(place, byte)) break;
    const uint32_t unit = units_[place];
    place ^= offset(unit);
    if (has_value(unit)) found = {i + 1, replacements_.data() + value(units_[place])};
  }
  return found;
}

}  // namespace caravan::vocab
