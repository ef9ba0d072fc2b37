// caravan quantize: llama-quantize's command line.
#include <fmt/format.h>

#include <charconv>
#include <filesystem>
#include <map>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "commands.h"
#include "options.h"
#include "quantize.h"

namespace caravan::app {
namespace {

using tensor::DType;

// A file type's name or number; nullptr for anything else. COPY stands for no type.
struct TypeArgument {
  const gguf::FileType* type = nullptr;
  bool is_copy = false;
  explicit operator bool() const { return type != nullptr || is_copy; }
};

TypeArgument read_type(const std::string& text) {
  if (text == "COPY" || text == "copy") return {nullptr, true};
  if (const gguf::FileType* type = gguf::find_file_type(text)) return {type};
  uint32_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  return {gguf::find_file_type(number)};
}

// A tensor type that can be written.
DType read_tensor_type(const std::string& text) {
  const auto type = tensor::dtype_from_name(text);
  if (type && tensor::dtype_info(*type).quantize != nullptr) return *type;
  std::string names;
  for (const auto& info : tensor::all_dtypes())
    if (info.quantize != nullptr) names += fmt::format("{}{}", names.empty() ? "" : ", ", info.name);
  throw RequestError(fmt::format("tensor type '{}' cannot be written; accepted: {}", text, names));
}

// "attn_q=q8_0"
std::pair<std::string, DType> read_tensor_rule(const std::string& text) {
  const size_t equals = text.rfind('=');
  if (equals == 0 || equals == std::string::npos)
    throw RequestError(fmt::format("expected NAME=TYPE, found '{}'", text));
  return {text.substr(0, equals), read_tensor_type(text.substr(equals + 1))};
}

std::string format_shape(const gguf::TensorInfo& tensor) {
  std::string text;
  for (size_t i = 0; i < static_cast<size_t>(tensor.n_dims); ++i)
    text += fmt::format("{}{}", i > 0 ? " x " : "", tensor.ne[i]);
  return text;
}

struct Sizes {
  uint64_t n_values = 0, before = 0, after = 0;
  double bits(uint64_t bytes) const {
    return n_values > 0 ? 8.0 * static_cast<double>(bytes) / static_cast<double>(n_values) : 0.0;
  }
};

// Prints a line per tensor (when listed), and what fell back; returns the totals.
Sizes report(const std::vector<PlannedTensor>& plan, bool listed) {
  Sizes sizes;
  size_t n_fallback = 0;
  for (const PlannedTensor& planned : plan) {
    const gguf::TensorInfo& tensor = *planned.source;
    sizes.n_values += static_cast<uint64_t>(tensor::n_elements(tensor.ne));
    sizes.before += tensor.size_bytes;
    sizes.after += planned.size_bytes;
    n_fallback += planned.is_fallback ? 1 : 0;
    if (listed)
      fmt::print("{:<36} [{}]  {} -> {}  {} -> {}{}\n", tensor.name, format_shape(tensor),
                 tensor::dtype_name(tensor.type), tensor::dtype_name(planned.type), format_bytes(tensor.size_bytes),
                 format_bytes(planned.size_bytes), planned.is_fallback ? "  (fallback: row length)" : "");
  }
  if (n_fallback > 0)
    fmt::print(stderr, "{} of {} tensors have rows that do not fit the blocks of their type and get another one\n",
               n_fallback, plan.size());
  return sizes;
}

// IN [OUT] TYPE [THREADS]
struct Arguments {
  std::vector<std::string> plain;
  QuantizeOptions options;
  bool dry_run = false, verbose = false;
};

OptionParser make_parser(Arguments& a) {
  OptionParser parser(
      "caravan quantize [options] IN [OUT] TYPE [THREADS]",
      "Writes the GGUF model IN with the tensor types of the file type TYPE. Without OUT the result is "
      "ggml-model-TYPE.gguf\nin the folder of IN. IN may be split (give the first part). Types, by name "
      "or number:\n  " +
          gguf::file_type_names() + ",\n  COPY (keeps every type; joins a split model)");
  const auto plain = [&a](const std::string& value) { a.plain.push_back(value); };
  parser.positional("IN", "the model", plain);
  parser.positional("[OUT] TYPE", "the file to write, and its type", plain);
  parser.optional_positional("THREADS", "threads (default: all processors)", plain);
  parser.optional_positional("", "", plain);
  parser.add({{"--allow-requantize"},
              "",
              "convert tensors that are quantised already, too (loses quality)",
              {},
              into(a.options.allow_requantize)});
  parser.add({{"--leave-output-tensor"}, "", "keep the type of output.weight", {}, into(a.options.leave_output)});
  parser.add({{"--pure"}, "", "give every matrix the same type", {}, into(a.options.pure)});
  parser.add({{"--output-tensor-type"}, "TYPE", "tensor type of output.weight", {}, [&a](const std::string& v) {
                a.options.output_type = read_tensor_type(v);
              }});
  parser.add(
      {{"--token-embedding-type"}, "TYPE", "tensor type of the token embeddings", {}, [&a](const std::string& v) {
         a.options.token_embedding_type = read_tensor_type(v);
       }});
  parser.add({{"--tensor-type"},
              "NAME=TYPE",
              "tensor type of tensors whose name contains NAME (a regular expression); may be given several times",
              {},
              [&a](const std::string& v) { a.options.tensor_types.push_back(read_tensor_rule(v)); }});
  parser.add({{"--keep-split"}, "", "write as many files as IN has", {}, into(a.options.keep_split)});
  parser.add({{"--dry-run"}, "", "only list the tensors and their sizes", {}, into(a.dry_run)});
  parser.add({{"-v", "--verbose"}, "", "list the tensors", {}, into(a.verbose)});
  parser.unsupported(
      {"--imatrix", "--include-weights", "--exclude-weights", "--tensor-type-file", "--prune-layers", "--override-kv"});
  return parser;
}

}  // namespace

int run_quantize(int argc, char** argv) {
  Arguments a;
  OptionParser parser = make_parser(a);
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(spdlog::level::info);
  // The second argument is the type, or else the output.
  size_t at = 1;
  std::filesystem::path out;
  if (!read_type(a.plain[at])) out = a.plain[at++];
  if (at >= a.plain.size())
    throw RequestError(
        fmt::format("file type '{}' is not known; accepted: {}, COPY", a.plain[1], gguf::file_type_names()));
  const TypeArgument type = read_type(a.plain[at]);
  if (!type || (type.type != nullptr && !type.type->can_write))
    throw RequestError(
        fmt::format("file type '{}' cannot be written; accepted: {}, COPY", a.plain[at], gguf::file_type_names()));
  a.options.file_type = type.type;
  const bool has_threads = ++at < a.plain.size();
  a.options.n_threads = has_threads ? static_cast<int>(parse_integer(a.plain[at], 1, 1024)) : usable_cpu_count();
  if (at + 1 < a.plain.size()) throw RequestError(fmt::format("unexpected argument '{}'", a.plain[at + 1]));

  const std::filesystem::path in = a.plain[0];
  const gguf::Model model = gguf::Model::open(in);
  const std::string_view type_name = type.is_copy ? "COPY" : type.type->name;
  const bool is_split = a.options.keep_split && model.n_files() > 1;
  if (out.empty()) out = in.parent_path() / fmt::format("ggml-model-{}.gguf", type_name);
  if (is_split && out.extension() == ".gguf") out.replace_extension();
  std::error_code ignored;
  if (std::filesystem::equivalent(in, out, ignored)) throw RequestError("IN and OUT are the same file");

  const auto plan = plan_quantization(model, a.options);
  const Sizes sizes = report(plan, a.dry_run || a.verbose);
  if (!a.dry_run) write_quantized(model, plan, a.options, out);
  fmt::print("{}: {}, {} ({:.2f} bits per weight) -> {} ({:.2f})\n", a.dry_run ? in.string() : out.string(), type_name,
             format_bytes(sizes.before), sizes.bits(sizes.before), format_bytes(sizes.after), sizes.bits(sizes.after));
  return 0;
}

}  // namespace caravan::app
