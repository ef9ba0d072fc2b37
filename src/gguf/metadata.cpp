// GGUF key/value metadata: typed access, and the encoding shared by versions 2 and 3.
#include "gguf/metadata.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "base/error.h"

namespace caravan::gguf {
namespace {

// What each type is called and how many bytes the smallest value takes (a string or an array may be longer).
struct ValueTypeInfo {
  std::string_view name;
  uint64_t min_bytes;
};
constexpr ValueTypeInfo kValueTypes[] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},    {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 8}, {"array", 12}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};
constexpr uint32_t kValueTypeCount = std::size(kValueTypes);

// A key of at least one byte with its length, a type, a value of at least one byte.
constexpr uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;

std::string describe(const Value& value) {
  if (value.type != ValueType::array) return std::string(value_type_name(value.type));
  const auto& array = std::get<Array>(value.data);
  return fmt::format("array of {} {}", array.size(), value_type_name(array.element_type));
}

[[noreturn]] void wrong_type(const std::string& source, std::string_view key, std::string_view expected,
                             const Value& value) {
  throw FormatError(fmt::format("{}: key '{}': expected {}, found {}", source, key, expected, describe(value)));
}

[[noreturn]] void out_of_range(const std::string& source, std::string_view key, std::string_view expected,
                               const std::string& found) {
  throw FormatError(fmt::format("{}: key '{}': expected {}, found the value {}", source, key, expected, found));
}

const Value& require(const Metadata& metadata, std::string_view key) {
  const Value* value = metadata.find(key);
  if (value == nullptr) throw FormatError(fmt::format("{}: key '{}' is missing", metadata.source(), key));
  return *value;
}

// x as an unsigned 32-bit number, or nullopt where it does not fit.
template <typename T>
std::optional<uint32_t> fit_u32(T x) {
  if constexpr (std::is_same_v<T, bool>) return x ? 1 : 0;
  if constexpr (std::is_floating_point_v<T>) {
    if (x >= 0 && x <= 4294967295.0 && x == std::floor(x)) return static_cast<uint32_t>(x);
  } else {
    if (std::in_range<uint32_t>(x)) return static_cast<uint32_t>(x);
  }
  return std::nullopt;
}

uint32_t to_u32(const Metadata& metadata, std::string_view key, const Value& value) {
  return std::visit(
      [&]<typename T>(const T& x) -> uint32_t {
        if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) {
          if (const auto fitted = fit_u32(x)) return *fitted;
          out_of_range(metadata.source(), key, "a number from 0 to 4294967295", fmt::to_string(x));
        } else {
          wrong_type(metadata.source(), key, "u32", value);
        }
      },
      value.data);
}

float to_f32(const Metadata& metadata, std::string_view key, const Value& value) {
  return std::visit(
      [&]<typename T>(const T& x) -> float {
        if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>)
          return static_cast<float>(x);
        else
          wrong_type(metadata.source(), key, "f32", value);
      },
      value.data);
}

bool to_bool(const Metadata& metadata, std::string_view key, const Value& value) {
  return std::visit(
      [&]<typename T>(const T& x) -> bool {
        if constexpr (std::is_same_v<T, bool>) return x;
        if constexpr (std::is_integral_v<T>) {
          if (x == 0 || x == 1) return x == 1;
          out_of_range(metadata.source(), key, "a bool", fmt::to_string(x));
        } else {
          wrong_type(metadata.source(), key, "bool", value);
        }
      },
      value.data);
}

const std::string& to_string(const Metadata& metadata, std::string_view key, const Value& value) {
  const auto* text = std::get_if<std::string>(&value.data);
  if (text == nullptr) wrong_type(metadata.source(), key, "string", value);
  return *text;
}

// --- decoding ---

// Reads GGUF values from outside; each message says which key is being read.
class Decoder {
 public:
  Decoder(ByteReader& reader, const std::string& source) : reader_(reader), source_(source) {}

  std::string read_string(std::string_view what) {
    const auto length = reader_.read<uint64_t>(what);
    return std::string(reader_.take_string(length, what));
  }

  ValueType read_type(const std::string& where) {
    const auto number = reader_.read<uint32_t>(where);
    if (number >= kValueTypeCount)
      throw FormatError(fmt::format("{}: {}: value type {} is unknown, expected 0 to {}", source_, where, number,
                                    kValueTypeCount - 1));
    return static_cast<ValueType>(number);
  }

  Value read_value(const std::string& where) {
    const ValueType type = read_type(where);
    switch (type) {
      case ValueType::u8:
        return {type, uint64_t{reader_.read<uint8_t>(where)}};
      case ValueType::i8:
        return {type, int64_t{reader_.read<int8_t>(where)}};
      case ValueType::u16:
        return {type, uint64_t{reader_.read<uint16_t>(where)}};
      case ValueType::i16:
        return {type, int64_t{reader_.read<int16_t>(where)}};
      case ValueType::u32:
        return {type, uint64_t{reader_.read<uint32_t>(where)}};
      case ValueType::i32:
        return {type, int64_t{reader_.read<int32_t>(where)}};
      case ValueType::f32:
        return {type, double{reader_.read<float>(where)}};
      case ValueType::boolean:
        return {type, reader_.read<uint8_t>(where) != 0};
      case ValueType::string:
        return {type, read_string(where)};
      case ValueType::array:
        return {type, read_array(where)};
      case ValueType::u64:
        return {type, reader_.read<uint64_t>(where)};
      case ValueType::i64:
        return {type, reader_.read<int64_t>(where)};
      case ValueType::f64:
        return {type, reader_.read<double>(where)};
    }
    CARAVAN_ASSERT(false, "read_type admits only the types above");
  }

 private:
  Array read_array(const std::string& where) {
    Array array;
    array.element_type = read_type(where);
    if (array.element_type == ValueType::array)
      throw FormatError(fmt::format("{}: {}: arrays of arrays are not supported", source_, where));
    const auto count = reader_.read<uint64_t>(where);
    const uint64_t min_bytes = kValueTypes[static_cast<size_t>(array.element_type)].min_bytes;
    if (count > reader_.remaining() / min_bytes)
      throw FormatError(fmt::format("{}: {}: an array of {} {} does not fit the {} bytes that are left", source_, where,
                                    count, value_type_name(array.element_type), reader_.remaining()));
    const auto n = static_cast<size_t>(count);
    switch (array.element_type) {
      case ValueType::u8:
        array.values = read_numbers<uint64_t, uint8_t>(n, where);
        break;
      case ValueType::i8:
        array.values = read_numbers<int64_t, int8_t>(n, where);
        break;
      case ValueType::u16:
        array.values = read_numbers<uint64_t, uint16_t>(n, where);
        break;
      case ValueType::i16:
        array.values = read_numbers<int64_t, int16_t>(n, where);
        break;
      case ValueType::u32:
        array.values = read_numbers<uint64_t, uint32_t>(n, where);
        break;
      case ValueType::i32:
        array.values = read_numbers<int64_t, int32_t>(n, where);
        break;
      case ValueType::f32:
        array.values = read_numbers<double, float>(n, where);
        break;
      case ValueType::u64:
        array.values = read_numbers<uint64_t, uint64_t>(n, where);
        break;
      case ValueType::i64:
        array.values = read_numbers<int64_t, int64_t>(n, where);
        break;
      case ValueType::f64:
        array.values = read_numbers<double, double>(n, where);
        break;
      case ValueType::boolean: {
        auto bits = read_numbers<int64_t, uint8_t>(n, where);
        for (int64_t& bit : bits) bit = bit != 0;
        array.values = std::move(bits);
        break;
      }
      case ValueType::string: {
        std::vector<std::string> strings;
        strings.reserve(n);
        for (size_t i = 0; i < n; ++i) strings.push_back(read_string(where));
        array.values = std::move(strings);
        break;
      }
      case ValueType::array:
        break;  // refused above
    }
    return array;
  }

  template <typename Wide, typename Stored>
  std::vector<Wide> read_numbers(size_t n, const std::string& where) {
    const auto bytes = reader_.take(uint64_t{n} * sizeof(Stored), where);
    std::vector<Wide> numbers(n);
    for (size_t i = 0; i < n; ++i) {
      Stored stored;
      std::memcpy(&stored, bytes.data() + i * sizeof(Stored), sizeof(Stored));
      numbers[i] = static_cast<Wide>(stored);
    }
    return numbers;
  }

  ByteReader& reader_;
  const std::string& source_;
};

// --- encoding ---

void write_string(ByteWriter& writer, std::string_view text) {
  writer.write(uint64_t{text.size()});
  writer.write_string(text);
}

// Writes x, a widened number, in the width that type has in the file.
template <typename T>
void write_number(ByteWriter& writer, ValueType type, T x) {
  switch (type) {
    case ValueType::u8:
      return writer.write(static_cast<uint8_t>(x));
    case ValueType::i8:
      return writer.write(static_cast<int8_t>(x));
    case ValueType::u16:
      return writer.write(static_cast<uint16_t>(x));
    case ValueType::i16:
      return writer.write(static_cast<int16_t>(x));
    case ValueType::u32:
      return writer.write(static_cast<uint32_t>(x));
    case ValueType::i32:
      return writer.write(static_cast<int32_t>(x));
    case ValueType::f32:
      return writer.write(static_cast<float>(x));
    case ValueType::boolean:
      return writer.write(static_cast<uint8_t>(x != T{}));
    case ValueType::u64:
      return writer.write(static_cast<uint64_t>(x));
    case ValueType::i64:
      return writer.write(static_cast<int64_t>(x));
    case ValueType::f64:
      return writer.write(static_cast<double>(x));
    case ValueType::string:
    case ValueType::array:
      break;
  }
  CARAVAN_ASSERT(false, "a value's type and its data agree");
}

void write_array(ByteWriter& writer, const Array& array) {
  writer.write(static_cast<uint32_t>(array.element_type));
  writer.write(uint64_t{array.size()});
  std::visit(
      [&](const auto& elements) {
        for (const auto& element : elements)
          if constexpr (std::is_same_v<std::decay_t<decltype(element)>, std::string>)
            write_string(writer, element);
          else
            write_number(writer, array.element_type, element);
      },
      array.values);
}

}  // namespace

std::string_view value_type_name(ValueType type) { return kValueTypes[static_cast<size_t>(type)].name; }

size_t Array::size() const {
  return std::visit([](const auto& elements) { return elements.size(); }, values);
}

const Value* Metadata::find(std::string_view key) const {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &entries_[it->second].second;
}

void Metadata::set(std::string key, Value value) {
  const auto [it, is_new] = index_.try_emplace(key, entries_.size());
  if (is_new)
    entries_.emplace_back(std::move(key), std::move(value));
  else
    entries_[it->second].second = std::move(value);
}

uint32_t Metadata::get_u32(std::string_view key) const { return to_u32(*this, key, require(*this, key)); }
float Metadata::get_f32(std::string_view key) const { return to_f32(*this, key, require(*this, key)); }
const std::string& Metadata::get_string(std::string_view key) const {
  return to_string(*this, key, require(*this, key));
}

const std::vector<std::string>& Metadata::get_strings(std::string_view key) const {
  const Value& value = require(*this, key);
  if (const auto* array = std::get_if<Array>(&value.data))
    if (const auto* strings = std::get_if<std::vector<std::string>>(&array->values)) return *strings;
  wrong_type(source_, key, "an array of string", value);
}

std::optional<uint32_t> Metadata::find_u32(std::string_view key) const {
  const Value* value = find(key);
  return value ? std::optional(to_u32(*this, key, *value)) : std::nullopt;
}
std::optional<float> Metadata::find_f32(std::string_view key) const {
  const Value* value = find(key);
  return value ? std::optional(to_f32(*this, key, *value)) : std::nullopt;
}
std::optional<bool> Metadata::find_bool(std::string_view key) const {
  const Value* value = find(key);
  return value ? std::optional(to_bool(*this, key, *value)) : std::nullopt;
}
std::optional<std::string> Metadata::find_string(std::string_view key) const {
  const Value* value = find(key);
  return value ? std::optional(to_string(*this, key, *value)) : std::nullopt;
}

std::vector<float> Metadata::get_floats(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return {};
  if (const auto* array = std::get_if<Array>(&value->data))
    if (const auto* numbers = std::get_if<std::vector<double>>(&array->values))
      return {numbers->begin(), numbers->end()};
  wrong_type(source_, key, "an array of f32", *value);
}

std::vector<int64_t> Metadata::get_integers(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return {};
  if (const auto* array = std::get_if<Array>(&value->data)) {
    if (const auto* numbers = std::get_if<std::vector<int64_t>>(&array->values)) return *numbers;
    if (const auto* numbers = std::get_if<std::vector<uint64_t>>(&array->values)) {
      for (const uint64_t x : *numbers)
        if (!std::in_range<int64_t>(x)) out_of_range(source_, key, "integers below 2^63", fmt::to_string(x));
      return {numbers->begin(), numbers->end()};
    }
  }
  wrong_type(source_, key, "an array of integers", *value);
}

std::vector<uint32_t> Metadata::get_u32_per_layer(std::string_view key, size_t n,
                                                  std::optional<uint32_t> default_value) const {
  const Value* value = find(key);
  if (value == nullptr) {
    if (!default_value) throw FormatError(fmt::format("{}: key '{}' is missing", source_, key));
    return std::vector<uint32_t>(n, *default_value);
  }
  if (value->type != ValueType::array) return std::vector<uint32_t>(n, to_u32(*this, key, *value));
  const auto numbers = get_integers(key);
  if (numbers.size() != n)
    throw FormatError(
        fmt::format("{}: key '{}': expected {} numbers (one per layer), found {}", source_, key, n, numbers.size()));
  std::vector<uint32_t> result;
  for (const int64_t x : numbers) {
    const auto fitted = fit_u32(x);
    if (!fitted) out_of_range(source_, key, "numbers from 0 to 4294967295", fmt::to_string(x));
    result.push_back(*fitted);
  }
  return result;
}

Metadata read_metadata(ByteReader& reader, uint64_t n_entries, const std::string& source) {
  if (n_entries > reader.remaining() / kMinEntryBytes)
    throw FormatError(fmt::format("{}: {} metadata entries do not fit the {} bytes that are left", source, n_entries,
                                  reader.remaining()));
  Metadata metadata(source);
  Decoder decoder(reader, source);
  for (uint64_t i = 0; i < n_entries; ++i) {
    std::string key = decoder.read_string(fmt::format("key of metadata entry {}", i));
    if (key.empty()) throw FormatError(fmt::format("{}: key of metadata entry {} is empty", source, i));
    if (metadata.contains(key)) throw FormatError(fmt::format("{}: key '{}' occurs twice", source, key));
    Value value = decoder.read_value(fmt::format("key '{}'", key));
    metadata.set(std::move(key), std::move(value));
  }
  return metadata;
}

void write_metadata(ByteWriter& writer, const Metadata& metadata) {
  for (const auto& [key, value] : metadata.entries()) {
    write_string(writer, key);
    writer.write(static_cast<uint32_t>(value.type));
    std::visit(
        [&]<typename T>(const T& x) {
          if constexpr (std::is_same_v<T, std::string>)
            write_string(writer, x);
          else if constexpr (std::is_same_v<T, Array>)
            write_array(writer, x);
          else
            write_number(writer, value.type, x);
        },
        value.data);
  }
}

}  // namespace caravan::gguf
