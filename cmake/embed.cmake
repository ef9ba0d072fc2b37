# Writes a C++ file that holds files as byte arrays: cmake -DOUT=... -DFILES=a;b -P embed.cmake
set(arrays "")
set(rows "")
foreach(file IN LISTS FILES)
  get_filename_component(name "${file}" NAME)
  string(MAKE_C_IDENTIFIER "${name}" id)
  file(READ "${file}" hex HEX)
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
  string(APPEND arrays "const unsigned char ${id}[] = {${bytes}};\n")
  string(APPEND rows "    {\"${name}\", {reinterpret_cast<const char*>(${id}), sizeof ${id}}},\n")
endforeach()
file(WRITE "${OUT}" "// Generated from web/.
#include \"server/web_files.h\"

namespace caravan::server {
namespace {
${arrays}
const WebFile kFiles[] = {
${rows}};
}  // namespace
std::span<const WebFile> web_files() { return kFiles; }
}  // namespace caravan::server
")
