// The files of web/, which the build puts into the program.
#pragma once

#include <span>
#include <string_view>

namespace caravan::server {

struct WebFile {
  std::string_view name;  // "index.html"
  std::string_view bytes;
};

std::span<const WebFile> web_files();

}  // namespace caravan::server
