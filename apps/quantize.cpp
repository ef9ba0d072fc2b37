#include "quantize.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <regex>

#include "base/error.h"
#include "base/progress.h"
#include "gguf/format.h"
#include "gguf/writer.h"
#include "parallel.h"

namespace caravan::app {
namespace {

using gguf::TensorInfo;
using gguf::Value;
using tensor::DType;

constexpr uint32_t kQuantizationVersion = 2;
constexpr int64_t kPieceValues = int64_t{1} << 18;  // converted at a time: 1 MiB of floats
constexpr float kLargestHalf = 65504.0f;

bool is_float(DType type) { return type == DType::f32 || type == DType::f16 || type == DType::bf16; }

std::span<const int64_t> dimensions(const TensorInfo& tensor) {
  return std::span(tensor.ne).first(static_cast<size_t>(std::max(tensor.n_dims, 1)));  // a number is a vector of one
}

// Decides about one tensor after the other.
class Chooser {
 public:
  Chooser(const gguf::Model& model, const QuantizeOptions& options) : options_(options) {
    if (options.file_type == nullptr) return;
    context_ = gguf::mixture_context(model.metadata(), model.find("output.weight") != nullptr);
    for (const auto& [pattern, type] : options.tensor_types) patterns_.emplace_back(compile(pattern), type);
  }

  PlannedTensor choose(const TensorInfo& tensor) const {
    PlannedTensor planned{&tensor, tensor.type, false, tensor.size_bytes};
    const auto ne = dimensions(tensor);
    if (options_.file_type == nullptr || !gguf::takes_file_type(tensor.name, ne)) return planned;
    if (options_.leave_output && tensor.name == "output.weight") return planned;
    const DType wanted = wanted_type(tensor);
    planned.type = is_float(wanted) ? wanted : gguf::fitting_type(wanted, tensor.ne[0]);
    planned.is_fallback = planned.type != wanted;
    planned.size_bytes = tensor::checked_size_bytes(tensor::dtype_info(planned.type), tensor.ne, tensor.name);
    check(planned);
    return planned;
  }

 private:
  static std::regex compile(const std::string& pattern) {
    try {
      return std::regex(pattern);
    } catch (const std::regex_error& error) {
      throw RequestError(fmt::format("--tensor-type '{}' is no regular expression: {}", pattern, error.what()));
    }
  }

  // What is asked for, whatever the length of the rows.
  DType wanted_type(const TensorInfo& tensor) const {
    const bool is_embedding = tensor.name == "token_embd.weight" || tensor.name == "per_layer_token_embd.weight";
    const bool is_output = tensor.name == "output.weight" || (is_embedding && !context_.has_output);
    if (is_embedding && options_.token_embedding_type) return *options_.token_embedding_type;
    if (is_output && options_.output_type) return *options_.output_type;
    for (const auto& [pattern, type] : patterns_)
      if (std::regex_search(tensor.name, pattern)) return type;
    if (options_.pure) return options_.file_type->base_type;
    return gguf::mixture_type(*options_.file_type, context_, tensor.name, dimensions(tensor));
  }

  void check(const PlannedTensor& planned) const {
    const auto& from = tensor::dtype_info(planned.source->type);
    const auto& to = tensor::dtype_info(planned.type);
    if (from.type == to.type) return;
    if (to.quantize == nullptr)
      throw RequestError(fmt::format("tensor '{}': type {} cannot be written", planned.source->name, to.name));
    if (from.dequantize == nullptr)
      throw RequestError(fmt::format("tensor '{}': type {} cannot be converted", planned.source->name, from.name));
    if (!is_float(from.type) && !options_.allow_requantize)
      throw RequestError(
          fmt::format("tensor '{}' is {} already; converting it to {} loses quality. Start from an F16, BF16 or F32 "
                      "model, or add --allow-requantize",
                      planned.source->name, from.name, to.name));
  }

  const QuantizeOptions& options_;
  gguf::MixtureContext context_;
  std::vector<std::pair<std::regex, DType>> patterns_;
};

// The metadata of part number (from 0) of n_parts.
gguf::Metadata part_metadata(const gguf::Model& model, const QuantizeOptions& options, int number, int n_parts) {
  gguf::Metadata metadata(model.path());
  if (number == 0) {
    for (const auto& [key, value] : model.metadata().entries())
      if (!key.starts_with("split.")) metadata.set(key, value);
    if (options.file_type != nullptr) {
      metadata.set("general.quantization_version", Value::of(kQuantizationVersion));
      metadata.set("general.file_type", Value::of(options.file_type->number));
    }
  }
  if (n_parts > 1) {
    const auto u16 = [](int n) { return Value{gguf::ValueType::u16, static_cast<uint64_t>(n)}; };
    metadata.set(gguf::kKeySplitNo, u16(number));
    metadata.set(gguf::kKeySplitCount, u16(n_parts));
    metadata.set(gguf::kKeySplitTensorsCount, Value::of(static_cast<int32_t>(model.tensors().size())));
  }
  return metadata;
}

// Throws FormatError for the first value that type cannot hold; first is the number of values before these.
void check_values(const PlannedTensor& planned, std::span<const float> values, int64_t first) {
  const float limit =
      planned.type == DType::f32 || planned.type == DType::bf16 ? std::numeric_limits<float>::max() : kLargestHalf;
  const auto bad = std::find_if(values.begin(), values.end(), [limit](float x) { return !(std::fabs(x) <= limit); });
  if (bad == values.end()) return;
  throw FormatError(fmt::format("tensor '{}': value {} of number {} cannot be written as {}", planned.source->name,
                                *bad, first + (bad - values.begin()), tensor::dtype_name(planned.type)));
}

// One planned tensor on its way to a file.
struct Target {
  gguf::Writer* writer;
  size_t number;
};

// Converts and writes rows [begin, end) of a tensor; returns the bytes read.
uint64_t convert_rows(const gguf::Model& model, const PlannedTensor& planned, Target target, int64_t begin,
                      int64_t end) {
  const TensorInfo& source = *planned.source;
  const auto row_length = static_cast<uint64_t>(source.ne[0]);
  const uint64_t in_row = tensor::row_bytes(source.type, row_length);
  const uint64_t out_row = tensor::row_bytes(planned.type, row_length);
  const auto n_rows = static_cast<uint64_t>(end - begin);
  std::vector<std::byte> bytes(in_row * n_rows);
  model.read(source, in_row * static_cast<uint64_t>(begin), bytes);
  if (planned.type != source.type) {
    std::vector<float> values(row_length * n_rows);
    const auto n = static_cast<int64_t>(values.size());
    tensor::dtype_info(source.type).dequantize(bytes.data(), values.data(), n);
    check_values(planned, values, begin * source.ne[0]);
    bytes.resize(out_row * n_rows);
    tensor::dtype_info(planned.type).quantize(values.data(), bytes.data(), n);
  }
  target.writer->write(target.number, out_row * static_cast<uint64_t>(begin), bytes);
  return in_row * n_rows;
}

}  // namespace

std::vector<PlannedTensor> plan_quantization(const gguf::Model& model, const QuantizeOptions& options) {
  const Chooser chooser(model, options);
  std::vector<PlannedTensor> plan;
  for (const TensorInfo& tensor : model.tensors()) plan.push_back(chooser.choose(tensor));
  return plan;
}

void write_quantized(const gguf::Model& model, const std::vector<PlannedTensor>& plan, const QuantizeOptions& options,
                     const std::filesystem::path& path) {
  const int n_parts = options.keep_split ? model.n_files() : 1;
  std::vector<std::unique_ptr<gguf::Writer>> writers;
  for (int part = 0; part < n_parts; ++part) {
    const auto name = n_parts == 1 ? path
                                   : std::filesystem::path(gguf::split_path(path.string(), static_cast<uint32_t>(part),
                                                                            static_cast<uint32_t>(n_parts)));
    writers.push_back(std::make_unique<gguf::Writer>(name, part_metadata(model, options, part, n_parts)));
  }
  std::vector<Target> targets;
  for (const PlannedTensor& planned : plan) {
    gguf::Writer* writer = writers[static_cast<size_t>(n_parts == 1 ? 0 : planned.source->file)].get();
    targets.push_back({writer, writer->declare(planned.source->name, planned.type, dimensions(*planned.source))});
  }
  for (const auto& writer : writers) writer->begin_data();

  struct Piece {
    size_t tensor;
    int64_t begin, end;  // rows
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < plan.size(); ++i) {
    const auto& ne = plan[i].source->ne;
    const int64_t n_rows = ne[1] * ne[2] * ne[3], step = std::max<int64_t>(1, kPieceValues / ne[0]);
    for (int64_t begin = 0; begin < n_rows; begin += step) pieces.push_back({i, begin, std::min(begin + step, n_rows)});
  }
  Progress progress("quantising", model.weight_bytes());
  run_jobs(pieces.size(), options.n_threads, [&](size_t i) {
    const Piece& piece = pieces[i];
    progress.add(convert_rows(model, plan[piece.tensor], targets[piece.tensor], piece.begin, piece.end));
  });
  progress.finish();
  for (const auto& writer : writers) writer->finish();
}

}  // namespace caravan::app
