// Where caches lie, and the sizes that users give them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace caravan::app {

// $XDG_CACHE_HOME/caravan, else ~/.cache/caravan; empty when neither variable is set.
std::filesystem::path default_cache_folder();

// Bytes from "20000" (MiB), "500M", "64G", "64GiB", "1.5T"; throws RequestError saying what is accepted.
uint64_t parse_size(const std::string& text);

}  // namespace caravan::app
