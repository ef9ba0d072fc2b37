// caravan token: prints a secret for --rpc-token.
#include <fmt/format.h>
#include <openssl/rand.h>

#include <array>

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

}  // namespace

int run_token(int argc, char** argv) {
  OptionParser parser("caravan token",
                      "Prints a random token for --rpc-token or APP_RPC_TOKEN: the same one for a server and its "
                      "backends, kept secret.");
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  std::array<unsigned char, kBytes> bytes{};
  std::string token;
  do {  // one that begins with a dash would be taken for an option
    CARAVAN_ASSERT(RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1, "OpenSSL's generator is seeded");
    token = encode(bytes);
  } while (token.front() == '-');
  fmt::print("{}\n", token);
  return 0;
}

}  // namespace caravan::app
