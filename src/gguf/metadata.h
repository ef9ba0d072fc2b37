// GGUF key/value metadata as typed values, and their encoding (also used to carry hyperparameters over the wire).
// Layout: docs/gguf.md.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/bytes.h"

namespace caravan::gguf {

// Numbers are GGUF's.
enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

std::string_view value_type_name(ValueType type);

// An array keeps its element type; integers of every width are widened, so that a reader needs not care.
struct Array {
  ValueType element_type = ValueType::u32;
  std::variant<std::vector<int64_t>, std::vector<uint64_t>, std::vector<double>, std::vector<std::string>> values;
  size_t size() const;
};

// A scalar keeps its type for writing; it is read through the conversions of Metadata.
struct Value {
  ValueType type = ValueType::u32;
  std::variant<int64_t, uint64_t, double, bool, std::string, Array> data;

  static Value of(uint32_t v) { return {ValueType::u32, uint64_t{v}}; }
  static Value of(uint64_t v) { return {ValueType::u64, v}; }
  static Value of(int32_t v) { return {ValueType::i32, int64_t{v}}; }
  static Value of(float v) { return {ValueType::f32, double{v}}; }
  static Value of(bool v) { return {ValueType::boolean, v}; }
  static Value of(std::string v) { return {ValueType::string, std::move(v)}; }
  static Value of(const char* v) { return {ValueType::string, std::string(v)}; }
  static Value of(std::vector<std::string> v) { return {ValueType::array, Array{ValueType::string, std::move(v)}}; }
  static Value of(const std::vector<int32_t>& v) {
    return {ValueType::array, Array{ValueType::i32, std::vector<int64_t>(v.begin(), v.end())}};
  }
  static Value of(const std::vector<float>& v) {
    return {ValueType::array, Array{ValueType::f32, std::vector<double>(v.begin(), v.end())}};
  }
};

// Ordered key/value pairs with unique keys. Typed getters convert between numeric types where the value fits and throw
// FormatError naming the source, the key, the expected and the found type otherwise.
class Metadata {
 public:
  // source: the file (or peer) named in errors.
  explicit Metadata(std::string source = "metadata") : source_(std::move(source)) {}

  const std::string& source() const { return source_; }
  const std::vector<std::pair<std::string, Value>>& entries() const { return entries_; }
  const Value* find(std::string_view key) const;
  bool contains(std::string_view key) const { return find(key) != nullptr; }
  // Adds or replaces.
  void set(std::string key, Value value);

  // Required: throw FormatError when the key is missing.
  uint32_t get_u32(std::string_view key) const;
  float get_f32(std::string_view key) const;
  const std::string& get_string(std::string_view key) const;
  const std::vector<std::string>& get_strings(std::string_view key) const;

  // Optional: nullopt (or the default) when the key is missing; still throw for a wrong type.
  std::optional<uint32_t> find_u32(std::string_view key) const;
  std::optional<float> find_f32(std::string_view key) const;
  std::optional<bool> find_bool(std::string_view key) const;
  std::optional<std::string> find_string(std::string_view key) const;
  uint32_t get_u32(std::string_view key, uint32_t default_value) const { return find_u32(key).value_or(default_value); }
  float get_f32(std::string_view key, float default_value) const { return find_f32(key).value_or(default_value); }
  bool get_bool(std::string_view key, bool default_value) const { return find_bool(key).value_or(default_value); }

  // Arrays, empty when missing. Floats from f32/f64 arrays, i64 from any integer or bool array.
  std::vector<float> get_floats(std::string_view key) const;
  std::vector<int64_t> get_integers(std::string_view key) const;
  // A key that is one number or an array of n numbers: n values either way; default_value when missing.
  std::vector<uint32_t> get_u32_per_layer(std::string_view key, size_t n, std::optional<uint32_t> default_value) const;

 private:
  std::string source_;
  std::vector<std::pair<std::string, Value>> entries_;
  std::map<std::string, size_t, std::less<>> index_;
};

// Reads n_entries key/value pairs in GGUF v2/v3 encoding; checks key uniqueness, lengths, counts and types.
Metadata read_metadata(ByteReader& reader, uint64_t n_entries, const std::string& source);
// Appends all entries in the same encoding.
void write_metadata(ByteWriter& writer, const Metadata& metadata);

}  // namespace caravan::gguf
