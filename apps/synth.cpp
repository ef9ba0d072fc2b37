// caravan synth: random-weight models of known shapes.
#include "synth.h"

#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numbers>
#include <vector>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/progress.h"
#include "gguf/writer.h"
#include "options.h"
#include "parallel.h"

namespace caravan::app {
namespace {

using gguf::Value;
using tensor::DType;

// Dimensions as published with the models.
constexpr ModelShape kShapes[] = {
    // name, architecture, layers, embd, ff, heads, kv, head, vocab, ctx, rope base, eps, output, rope factor, experts
    {"tinyllama-1.1b", "llama", 22, 2048, 5632, 32, 4, 64, 32000, 2048, 1e4f, 1e-5f, true, 0},
    {"llama-3.2-1b", "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5f, 1e-5f, false, 32},
    {"llama-3.2-3b", "llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072, 5e5f, 1e-5f, false, 32},
    {"llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5f, 1e-5f, true, 8},
    {"mistral-7b", "llama", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 1e6f, 1e-5f, true, 0},
    {"mixtral-8x7b", "llama", 32, 4096, 14336, 32, 8, 128, 32000, 32768, 1e6f, 1e-5f, true, 0, 8, 2},
    // Mixtral's layout at a size for small machines: 8 experts of 76 M parameters, 0.7 G in all.
    {"moe-8x76m", "llama", 12, 1024, 2048, 16, 4, 64, 32000, 4096, 1e4f, 1e-5f, true, 0, 8, 2},
    // The same with many small experts: 64 of 19 M parameters, 8 of them used.
    {"moe-64x19m", "llama", 12, 1024, 512, 16, 4, 64, 32000, 4096, 1e4f, 1e-5f, true, 0, 64, 8},
    {"gemma-3-1b", "gemma3", 26, 1152, 6912, 4, 1, 256, 262144, 32768, 1e6f, 1e-6f, false, 0},
};

// --- random numbers ---

// SplitMix64 (Steele, Lea and Flood 2014): a stream per seed, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  // Close to normal, mean 0, deviation 1: the sum of eight uniform 16-bit numbers. No libm, hence no differences.
  float normal() {
    int sum = 0;
    for (uint64_t bits : {next(), next()})
      for (int i = 0; i < 4; ++i, bits >>= 16) sum += static_cast<int>(bits & 0xffff);
    constexpr float kMean = 8 * 32767.5f, kInverseDeviation = 1.0f / 53509.2f;  // sqrt(8 (2^32 - 1) / 12)
    return (static_cast<float>(sum) - kMean) * kInverseDeviation;
  }

 private:
  uint64_t state_;
};

uint64_t mix(uint64_t a, uint64_t b) { return Random(a ^ Random(b).next()).next(); }

// --- tensors ---

enum class Content { random, norm, rope_factors };

struct PlannedTensor {
  std::string name;
  std::vector<int64_t> ne;
  Content content = Content::random;
};

// The feed-forward part of layer i, dense or with experts.
void plan_feed_forward(std::vector<PlannedTensor>& tensors, const ModelShape& shape, const std::string& prefix) {
  const int64_t n_embd = shape.n_embd, n_ff = shape.n_ff, n_expert = shape.n_expert;
  if (n_expert == 0) {
    tensors.push_back({prefix + "ffn_gate.weight", {n_embd, n_ff}});
    tensors.push_back({prefix + "ffn_up.weight", {n_embd, n_ff}});
    tensors.push_back({prefix + "ffn_down.weight", {n_ff, n_embd}});
    return;
  }
  tensors.push_back({prefix + "ffn_gate_inp.weight", {n_embd, n_expert}});
  tensors.push_back({prefix + "ffn_gate_exps.weight", {n_embd, n_ff, n_expert}});
  tensors.push_back({prefix + "ffn_up_exps.weight", {n_embd, n_ff, n_expert}});
  tensors.push_back({prefix + "ffn_down_exps.weight", {n_ff, n_embd, n_expert}});
}

std::vector<PlannedTensor> plan_tensors(const ModelShape& shape) {
  const int64_t n_embd = shape.n_embd, n_vocab = shape.n_vocab, head = shape.head_size;
  const int64_t n_q = head * shape.n_head, n_kv = head * shape.n_head_kv;
  const bool is_gemma = shape.architecture == "gemma3";
  std::vector<PlannedTensor> tensors{{"token_embd.weight", {n_embd, n_vocab}}};
  if (shape.rope_factor > 0) tensors.push_back({"rope_freqs.weight", {head / 2}, Content::rope_factors});
  for (uint32_t i = 0; i < shape.n_layer; ++i) {
    const std::string prefix = fmt::format("blk.{}.", i);
    tensors.push_back({prefix + "attn_norm.weight", {n_embd}, Content::norm});
    tensors.push_back({prefix + "attn_q.weight", {n_embd, n_q}});
    tensors.push_back({prefix + "attn_k.weight", {n_embd, n_kv}});
    tensors.push_back({prefix + "attn_v.weight", {n_embd, n_kv}});
    tensors.push_back({prefix + "attn_output.weight", {n_q, n_embd}});
    if (is_gemma) {
      tensors.push_back({prefix + "attn_q_norm.weight", {head}, Content::norm});
      tensors.push_back({prefix + "attn_k_norm.weight", {head}, Content::norm});
      tensors.push_back({prefix + "post_attention_norm.weight", {n_embd}, Content::norm});
      tensors.push_back({prefix + "post_ffw_norm.weight", {n_embd}, Content::norm});
    }
    tensors.push_back({prefix + "ffn_norm.weight", {n_embd}, Content::norm});
    plan_feed_forward(tensors, shape, prefix);
  }
  tensors.push_back({"output_norm.weight", {n_embd}, Content::norm});
  if (shape.has_output) tensors.push_back({"output.weight", {n_embd, n_vocab}});
  return tensors;
}

// Llama 3's divisors of the rotary frequencies: 1 for wavelengths below 2048 positions, rope_factor beyond 8192, and a
// smooth change between (as in the models' published configuration: low 1, high 4, original context 8192).
std::vector<float> rope_factors(const ModelShape& shape) {
  constexpr double kLow = 1, kHigh = 4, kContext = 8192;
  std::vector<float> factors;
  for (uint32_t i = 0; i < shape.head_size / 2; ++i) {
    const double exponent = 2.0 * i / shape.head_size;
    const double wavelength = 2 * std::numbers::pi * std::pow(double{shape.rope_freq_base}, exponent);
    const double smooth = (kContext / wavelength - kLow) / (kHigh - kLow);
    const double scale = smooth >= 1   ? 1
                         : smooth <= 0 ? 1 / shape.rope_factor
                                       : (1 - smooth) / shape.rope_factor + smooth;
    factors.push_back(static_cast<float>(1 / scale));
  }
  return factors;
}

// --- metadata ---

// The text that GPT-2's byte-level vocabularies use for each byte: itself where it is visible in Latin-1, else the code
// points from 256 on, in order.
std::string byte_token(int byte, int& n_hidden) {
  const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  const int code = visible ? byte : 256 + n_hidden++;
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

// 256 byte tokens, filler words, and one control token that ends a text.
void add_vocabulary(gguf::Metadata& metadata, uint32_t n_vocab) {
  constexpr int32_t kNormal = 1, kControl = 3;
  std::vector<std::string> tokens;
  int n_hidden = 0;
  for (int byte = 0; byte < 256; ++byte) tokens.push_back(byte_token(byte, n_hidden));
  while (tokens.size() + 1 < n_vocab) tokens.push_back(fmt::format("\u0120w{}", tokens.size()));  // U+0120: a space
  tokens.push_back("<|endoftext|>");
  std::vector<int32_t> types(n_vocab, kNormal);
  types.back() = kControl;
  metadata.set("tokenizer.ggml.model", Value::of("gpt2"));
  metadata.set("tokenizer.ggml.pre", Value::of("gpt-2"));
  metadata.set("tokenizer.ggml.tokens", Value::of(std::move(tokens)));
  metadata.set("tokenizer.ggml.token_type", Value::of(types));
  metadata.set("tokenizer.ggml.merges", Value::of(std::vector<std::string>()));
  metadata.set("tokenizer.ggml.bos_token_id", Value::of(n_vocab - 1));
  metadata.set("tokenizer.ggml.eos_token_id", Value::of(n_vocab - 1));
  metadata.set("tokenizer.ggml.add_bos_token", Value::of(false));
}

gguf::Metadata make_metadata(const ModelShape& shape, const gguf::FileType& type) {
  gguf::Metadata metadata;
  const std::string prefix = std::string(shape.architecture) + ".";
  metadata.set("general.architecture", Value::of(std::string(shape.architecture)));
  metadata.set("general.type", Value::of("model"));
  metadata.set("general.name", Value::of(fmt::format("random weights in the shape of {}", shape.name)));
  metadata.set("general.file_type", Value::of(type.number));
  if (tensor::dtype_info(type.base_type).block_length > 1)
    metadata.set("general.quantization_version", Value::of(uint32_t{2}));
  metadata.set(prefix + "context_length", Value::of(shape.n_ctx));
  metadata.set(prefix + "embedding_length", Value::of(shape.n_embd));
  metadata.set(prefix + "block_count", Value::of(shape.n_layer));
  metadata.set(prefix + "feed_forward_length", Value::of(shape.n_ff));
  metadata.set(prefix + "attention.head_count", Value::of(shape.n_head));
  metadata.set(prefix + "attention.head_count_kv", Value::of(shape.n_head_kv));
  metadata.set(prefix + "attention.key_length", Value::of(shape.head_size));
  metadata.set(prefix + "attention.value_length", Value::of(shape.head_size));
  metadata.set(prefix + "attention.layer_norm_rms_epsilon", Value::of(shape.norm_epsilon));
  metadata.set(prefix + "rope.freq_base", Value::of(shape.rope_freq_base));
  metadata.set(prefix + "rope.dimension_count", Value::of(shape.head_size));
  metadata.set(prefix + "vocab_size", Value::of(shape.n_vocab));
  if (shape.architecture == "gemma3") {
    metadata.set(prefix + "attention.sliding_window", Value::of(uint32_t{512}));
    metadata.set(prefix + "rope.freq_base_swa", Value::of(10000.0f));
  }
  if (shape.n_expert > 0) {
    metadata.set(prefix + "expert_count", Value::of(shape.n_expert));
    metadata.set(prefix + "expert_used_count", Value::of(shape.n_expert_used));
  }
  add_vocabulary(metadata, shape.n_vocab);
  return metadata;
}

// --- data ---

constexpr int64_t kGroupValues = 256;  // a multiple of every block length that we write
constexpr int64_t kPoolGroups = 4096;

// Random weights of one type and row length, in groups that tensors are tiled from.
class Pool {
 public:
  Pool(DType type, int64_t row_length, uint64_t seed)
      : group_bytes_(tensor::row_bytes(type, kGroupValues)), bytes_(kPoolGroups * group_bytes_) {
    Random random(mix(mix(seed, static_cast<uint64_t>(type)), static_cast<uint64_t>(row_length)));
    const float deviation = 1.0f / std::sqrt(static_cast<float>(row_length));
    std::vector<float> values(kGroupValues);
    for (int64_t group = 0; group < kPoolGroups; ++group) {
      for (float& x : values) x = random.normal() * deviation;
      tensor::dtype_info(type).quantize(values.data(), bytes_.data() + static_cast<uint64_t>(group) * group_bytes_,
                                        kGroupValues);
    }
  }
  uint64_t group_bytes() const { return group_bytes_; }
  // Fills out (the last group may be cut) with groups chosen by random.
  void tile(Random& random, std::span<std::byte> out) const {
    while (!out.empty()) {
      const uint64_t n = std::min<uint64_t>(group_bytes_, out.size());
      std::memcpy(out.data(), bytes_.data() + random.next() % kPoolGroups * group_bytes_, n);
      out = out.subspan(n);
    }
  }

 private:
  uint64_t group_bytes_;
  std::vector<std::byte> bytes_;
};

// Fills the declared tensors of writer.
class Filler {
 public:
  Filler(gguf::Writer& writer, const ModelShape& shape, const std::vector<PlannedTensor>& planned, uint64_t seed)
      : writer_(writer), shape_(shape), planned_(planned), seed_(seed) {}

  void run(int n_threads, Progress& progress) {
    build_pools(n_threads);
    struct Piece {
      size_t tensor;
      uint64_t offset;
    };
    std::vector<Piece> pieces;
    for (size_t i = 0; i < planned_.size(); ++i)
      for (uint64_t offset = 0; offset < writer_.tensors()[i].size_bytes; offset += piece_bytes(i))
        pieces.push_back({i, offset});
    run_jobs(pieces.size(), n_threads, [&](size_t i) { progress.add(fill(pieces[i].tensor, pieces[i].offset)); });
  }

 private:
  using PoolKey = std::pair<DType, int64_t>;
  PoolKey key_of(size_t i) const { return {writer_.tensors()[i].type, planned_[i].ne[0]}; }

  void build_pools(int n_threads) {
    for (size_t i = 0; i < planned_.size(); ++i)
      if (planned_[i].content == Content::random) pools_[key_of(i)] = nullptr;
    std::vector<std::pair<const PoolKey, std::unique_ptr<Pool>>*> entries;
    for (auto& entry : pools_) entries.push_back(&entry);
    run_jobs(entries.size(), n_threads, [&](size_t i) {
      entries[i]->second = std::make_unique<Pool>(entries[i]->first.first, entries[i]->first.second, seed_);
    });
  }

  // Random tensors are written in pieces of about 4 MiB, the small others whole.
  uint64_t piece_bytes(size_t i) const {
    if (planned_[i].content != Content::random) return writer_.tensors()[i].size_bytes;
    const uint64_t group_bytes = pools_.at(key_of(i))->group_bytes();
    return (uint64_t{4} << 20) / group_bytes * group_bytes;
  }

  // Writes one piece and returns its size.
  uint64_t fill(size_t i, uint64_t offset) {
    const gguf::TensorInfo& tensor = writer_.tensors()[i];
    Random random(mix(mix(seed_, i), offset));
    std::vector<std::byte> bytes(std::min(piece_bytes(i), tensor.size_bytes - offset));
    if (planned_[i].content == Content::random) {
      pools_.at(key_of(i))->tile(random, bytes);
    } else {
      std::vector<float> values(bytes.size() / sizeof(float));
      for (float& x : values) x = 1.0f + 0.1f * random.normal();  // norms: around one
      if (planned_[i].content == Content::rope_factors) values = rope_factors(shape_);
      std::memcpy(bytes.data(), values.data(), bytes.size());
    }
    writer_.write(i, offset, bytes);
    return bytes.size();
  }

  gguf::Writer& writer_;
  const ModelShape& shape_;
  const std::vector<PlannedTensor>& planned_;
  uint64_t seed_;
  std::map<PoolKey, std::unique_ptr<Pool>> pools_;
};

std::string shape_names() {
  std::string names;
  for (const ModelShape& shape : kShapes) names += fmt::format("{}{}", names.empty() ? "" : ", ", shape.name);
  return names;
}

}  // namespace

std::span<const ModelShape> model_shapes() { return kShapes; }

const ModelShape* find_model_shape(std::string_view name) {
  for (const ModelShape& shape : kShapes)
    if (shape.name == name) return &shape;
  return nullptr;
}

uint64_t count_parameters(const ModelShape& shape) {
  uint64_t total = 0;
  for (const PlannedTensor& tensor : plan_tensors(shape)) {
    uint64_t n = 1;
    for (const int64_t ne : tensor.ne) n *= static_cast<uint64_t>(ne);
    total += n;
  }
  return total;
}

void write_synthetic_model(const std::filesystem::path& path, const ModelShape& base, const gguf::FileType& type,
                           const SynthOptions& options) {
  ModelShape shape = base;
  shape.n_layer = options.n_layer.value_or(shape.n_layer);
  shape.n_vocab = options.n_vocab.value_or(shape.n_vocab);
  if (shape.n_layer == 0) throw RequestError("a model needs at least 1 layer, 0 were asked for");
  if (shape.n_vocab < 257)
    throw RequestError(fmt::format("a vocabulary needs at least 257 tokens, {} were asked for", shape.n_vocab));
  const std::vector<PlannedTensor> planned = plan_tensors(shape);
  const gguf::MixtureContext context{shape.n_layer, shape.n_expert, shape.has_output, shape.n_head / shape.n_head_kv,
                                     std::string(shape.architecture)};
  gguf::Writer writer(path, make_metadata(shape, type));
  for (const PlannedTensor& tensor : planned)
    writer.declare(tensor.name, gguf::choose_tensor_type(type, context, tensor.name, tensor.ne), tensor.ne);
  writer.begin_data();
  Progress progress(fmt::format("writing {}", path.string()), writer.weight_bytes());
  Filler(writer, shape, planned, options.seed).run(options.n_threads, progress);
  writer.finish();
}

int run_synth(int argc, char** argv) {
  std::string shape_name, type_name, output;
  uint32_t n_layer = 0, n_vocab = 0;
  SynthOptions options;
  options.n_threads = usable_cpu_count();
  OptionParser parser(
      "caravan synth --shape NAME --type TYPE -o FILE [options]",
      "Writes a model of a known shape with random weights, for measuring. Its answers are noise. To be quick, "
      "tensors\n"
      "are tiled from a pool of random blocks, so that files compress and deduplicate better than real ones.");
  parser.add({{"--shape"}, "NAME", "one of: " + shape_names(), {}, into(shape_name)});
  parser.add({{"--type"}, "TYPE", "one of: " + gguf::file_type_names(), {}, into(type_name)});
  parser.add({{"-o", "--output"}, "FILE", "the file to write", {}, into(output)});
  parser.add({{"--layers"}, "N", "number of layers instead of the shape's", {}, into(n_layer, 1, 10000)});
  parser.add({{"--vocab"}, "N", "tokens of the vocabulary instead of the shape's", {}, into(n_vocab, 257, 10000000)});
  parser.add({{"--seed"},
              "N",
              "the same seed gives the same file (default: 1)",
              {},
              into(options.seed, 0, std::numeric_limits<int64_t>::max())});
  parser.add({{"-t", "--threads"}, "N", "threads (default: all)", {}, into(options.n_threads, 1, 1024)});
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  if (shape_name.empty() || type_name.empty() || output.empty())
    throw RequestError("--shape, --type and -o are all needed; `caravan synth --help` lists what they accept");
  if (n_layer > 0) options.n_layer = n_layer;
  if (n_vocab > 0) options.n_vocab = n_vocab;
  const ModelShape* shape = find_model_shape(shape_name);
  if (shape == nullptr)
    throw RequestError(fmt::format("shape '{}' is not known; accepted: {}", shape_name, shape_names()));
  const gguf::FileType* type = gguf::find_file_type(type_name);
  if (type == nullptr || !type->can_write)
    throw RequestError(
        fmt::format("file type '{}' cannot be written; accepted: {}", type_name, gguf::file_type_names()));
  write_synthetic_model(output, *shape, *type, options);
  fmt::print("{}: random weights in the shape of {}, {}, {}\n", output, shape->name, type->name,
             format_bytes(std::filesystem::file_size(output)));
  return 0;
}

}  // namespace caravan::app
