// What POST /slots/{id}?action=save writes: the tokens of a slot. Not their keys and values: those lie on the machines
// of the plan, depend on the model's every bit, and are computed again when the slot is restored, exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace caravan::server {

// Of which model the tokens are.
struct SlotFileModel {
  uint32_t n_vocab = 0;
  uint64_t n_params = 0, size_bytes = 0;
  bool operator==(const SlotFileModel&) const = default;
};

// "caravan-slot-v1\n", then little-endian: u32 n_vocab, u64 n_params, u64 size_bytes, u32 number of tokens, i32 each.
std::vector<std::byte> encode_slot_file(const SlotFileModel& model, std::span<const int32_t> tokens);

// The tokens of a file. Throws FormatError, naming context, for anything but a whole file of this model.
std::vector<int32_t> decode_slot_file(std::span<const std::byte> bytes, const SlotFileModel& model,
                                      const std::string& context);

}  // namespace caravan::server
