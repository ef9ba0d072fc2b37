// caravan token: makes a secret for --rpc-token.
#include <fcntl.h>
#include <fmt/format.h>
#include <openssl/rand.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "base/error.h"
#include "commands.h"
#include "options.h"

namespace caravan::app {
namespace {

// 256 random bits, as many as the key that is derived from them.
constexpr size_t kBytes = 32;

// Base64 for URLs and file names (RFC 4648, section 5), without padding: nothing that a shell or YAML would take amiss.
std::string encode(const std::array<unsigned char, kBytes>& bytes) {
  constexpr char kAlphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  std::string text;
  for (size_t bit = 0; bit < kBytes * 8; bit += 6) {
    const size_t i = bit / 8;
    const unsigned pair = static_cast<unsigned>(bytes[i]) << 8 | (i + 1 < kBytes ? bytes[i + 1] : 0u);
    text += kAlphabet[pair >> (10 - bit % 8) & 63];
  }
  return text;
}

std::string new_token() {
  std::array<unsigned char, kBytes> bytes{};
  std::string token;
  do {  // one that begins with a dash would be taken for an option
    CARAVAN_ASSERT(RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1, "OpenSSL's generator is seeded");
    token = encode(bytes);
  } while (token.front() == '-');
  return token;
}

// Creates the file for its owner alone. Returns false when there is one that may stay.
bool write_token(const std::string& path, const std::string& token, bool replaces) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (replaces ? O_TRUNC : O_EXCL), 0600);
  if (fd < 0 && errno == EEXIST) return false;
  if (fd < 0) throw SystemError("cannot write '" + path + "'", errno);
  const std::string line = token + "\n";
  const ssize_t n = write(fd, line.data(), line.size());
  const int error = errno;
  close(fd);
  if (n != static_cast<ssize_t>(line.size())) throw SystemError("cannot write '" + path + "'", error);
  return true;
}

}  // namespace

int run_token(int argc, char** argv) {
  std::string path, given;
  OptionParser parser("caravan token [--file FILE]",
                      "Prints a random token for --rpc-token or APP_RPC_TOKEN: the same one for a server and its "
                      "backends, kept secret.");
  parser.add({{"--file"}, "FILE", "write it there instead, unless the file exists", {}, into(path)});
  Option token{
      {"--rpc-token"}, "TOKEN", "write this to FILE instead, also over an older one", {"APP_RPC_TOKEN"}, into(given)};
  token.is_secret = true;
  parser.add(std::move(token));
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  if (path.empty()) {
    fmt::print("{}\n", new_token());
    return 0;
  }
  const bool is_given = !given.empty();
  const bool wrote = write_token(path, is_given ? given : new_token(), is_given);
  fmt::print("{} {}\n", path,
             !wrote     ? "exists: left as it is"
             : is_given ? "holds the token given"
                        : "holds a new token");
  return 0;
}

}  // namespace caravan::app
