#include "server/slot_file.h"

#include <fmt/format.h>

#include "base/bytes.h"
#include "base/error.h"

namespace caravan::server {
namespace {

constexpr std::string_view kMagic = "caravan-slot-v1\n";

}  // namespace

std::vector<std::byte> encode_slot_file(const SlotFileModel& model, std::span<const int32_t> tokens) {
  ByteWriter writer;
  writer.write_string(kMagic);
  writer.write(model.n_vocab);
  writer.write(model.n_params);
  writer.write(model.size_bytes);
  writer.write(static_cast<uint32_t>(tokens.size()));
  writer.write_bytes(std::as_bytes(tokens));
  return writer.release();
}

std::vector<int32_t> decode_slot_file(std::span<const std::byte> bytes, const SlotFileModel& model,
                                      const std::string& context) {
  ByteReader reader(bytes, context);
  if (reader.take_string(kMagic.size(), "magic") != kMagic)
    throw FormatError(fmt::format("{}: not a slot file of this program", context));
  SlotFileModel found;
  found.n_vocab = reader.read<uint32_t>("vocabulary size");
  found.n_params = reader.read<uint64_t>("number of parameters");
  found.size_bytes = reader.read<uint64_t>("size of the weights");
  if (found != model) throw FormatError(fmt::format("{}: saved with another model", context));
  const auto n_tokens = reader.read<uint32_t>("number of tokens");
  if (reader.remaining() != uint64_t{n_tokens} * sizeof(int32_t))
    throw FormatError(fmt::format("{}: expected {} tokens, found {} bytes", context, n_tokens, reader.remaining()));
  std::vector<int32_t> tokens;
  tokens.reserve(n_tokens);
  for (uint32_t i = 0; i < n_tokens; ++i) {
    const auto token = reader.read<int32_t>("token");
    if (token < 0 || static_cast<uint32_t>(token) >= model.n_vocab)
      throw FormatError(fmt::format("{}: token {} is {}, expected one below {}", context, i, token, model.n_vocab));
    tokens.push_back(token);
  }
  return tokens;
}

}  // namespace caravan::server
