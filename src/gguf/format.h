// Constants of the GGUF layout that reader and writer share, and the naming of split files. Layout: docs/gguf.md.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace caravan::gguf {

inline constexpr uint32_t kMagic = 0x46554747;  // the bytes "GGUF"
inline constexpr uint32_t kVersion = 3;         // what we write; 2 has the same layout and is read, too
inline constexpr uint32_t kOldestVersion = 2;
inline constexpr uint32_t kDefaultAlignment = 32;
inline constexpr int kMaxDimensions = 4;
inline constexpr size_t kMaxTensorNameBytes = 63;

inline constexpr const char* kKeyAlignment = "general.alignment";
inline constexpr const char* kKeySplitNo = "split.no";
inline constexpr const char* kKeySplitCount = "split.count";
inline constexpr const char* kKeySplitTensorsCount = "split.tensors.count";

// The file of part number (from 0) of count: "<prefix>-00001-of-00003.gguf" is part 0 of 3.
std::string split_path(std::string_view prefix, uint32_t number, uint32_t count);

// The prefix of path when it is named as part number (from 0) of count, else an empty string.
std::string split_prefix(std::string_view path, uint32_t number, uint32_t count);

}  // namespace caravan::gguf
