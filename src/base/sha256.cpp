#include "base/sha256.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <algorithm>
#include <functional>

#include "base/error.h"

namespace caravan {

std::string Digest::hex() const {
  std::string text;
  for (const uint8_t b : bytes) text += fmt::format("{:02x}", b);
  return text;
}

Digest Digest::from_bytes(std::string_view raw) {
  Digest digest;
  if (raw.size() != digest.bytes.size())
    throw FormatError(fmt::format("a SHA-256 digest has 32 bytes, found {}", raw.size()));
  std::copy(raw.begin(), raw.end(), digest.bytes.begin());
  return digest;
}

Digest sha256(std::span<const std::byte> data) {
  Digest digest;
  unsigned size = 0;
  const int ok = EVP_Digest(data.data(), data.size(), digest.bytes.data(), &size, EVP_sha256(), nullptr);
  CARAVAN_ASSERT(ok == 1 && size == digest.bytes.size(), "OpenSSL always provides SHA-256");
  return digest;
}

}  // namespace caravan
