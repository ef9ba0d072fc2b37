// A hash map from 64-bit keys to small values in one array (open addressing, linear probing): BPE merges and the edges
// of the special-token trie are looked up once or more per byte of text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace caravan::vocab {

// Spreads the bits of a key over the whole word (the finaliser of Steele, Lea & Flood 2014, "SplitMix").
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Insert-only. The key with all bits set is reserved for empty places.
template <typename Value>
class FlatMap {
 public:
  explicit FlatMap(size_t expected_size = 0) { rehash(capacity_for(expected_size)); }

  size_t size() const { return size_; }

  // The value of key, or null.
  const Value* find(uint64_t key) const {
    for (size_t i = mix_bits(key) & mask_;; i = (i + 1) & mask_) {
      if (entries_[i].key == key) return &entries_[i].value;
      if (entries_[i].key == kEmpty) return nullptr;
    }
  }

  // Adds the pair; an existing key keeps its value. Returns the value that is then stored.
  const Value& insert(uint64_t key, const Value& value) {
    if ((size_ + 1) * 2 > entries_.size()) rehash(entries_.size() * 2);
    size_t i = mix_bits(key) & mask_;
    while (entries_[i].key != kEmpty && entries_[i].key != key) i = (i + 1) & mask_;
    if (entries_[i].key == kEmpty) {
      entries_[i] = {key, value};
      size_++;
    }
    return entries_[i].value;
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Entry {
    uint64_t key = kEmpty;
    Value value{};
  };

  static size_t capacity_for(size_t n) {
    size_t capacity = 16;
    while (capacity < n * 2) capacity *= 2;
    return capacity;
  }

  void rehash(size_t capacity) {
    std::vector<Entry> old(capacity);
    old.swap(entries_);
    mask_ = capacity - 1;
    for (const Entry& entry : old) {
      if (entry.key == kEmpty) continue;
      size_t i = mix_bits(entry.key) & mask_;
      while (entries_[i].key != kEmpty) i = (i + 1) & mask_;
      entries_[i] = entry;
    }
  }

  std::vector<Entry> entries_;
  size_t mask_ = 0, size_ = 0;
};

}  // namespace caravan::vocab
