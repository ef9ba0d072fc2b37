// caravan inspect: metadata, tensors and totals of a GGUF model.
#include "inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/progress.h"
#include "gguf/file_type.h"
#include "options.h"

namespace caravan::app {
namespace {

using nlohmann::json;

constexpr size_t kShownElements = 4, kShownCharacters = 72;

// Text in quotes on one line: control characters and bytes that are no valid UTF-8 as escapes, long text cut.
std::string quote(const std::string& text) {
  // dump() escapes control characters; replace makes bytes that are no UTF-8 visible without failing.
  std::string quoted = json(text).dump(-1, ' ', false, json::error_handler_t::replace);
  if (quoted.size() <= kShownCharacters) return quoted;
  size_t end = kShownCharacters;
  while (end > 1 && (static_cast<unsigned char>(quoted[end]) & 0xc0) == 0x80) --end;  // not inside a character
  while (end > 1 && quoted[end - 1] == '\\') --end;                                   // nor inside an escape
  return fmt::format("{}...\" ({} bytes)", quoted.substr(0, end), text.size());
}

std::string show(bool value) { return value ? "true" : "false"; }
std::string show(const std::string& value) { return quote(value); }
std::string show(double value) { return fmt::format("{:.7g}", value); }
std::string show(std::integral auto value) { return fmt::to_string(value); }

std::string show(const gguf::Array& array) {
  return std::visit(
      [](const auto& elements) {
        std::string text = "[";
        for (size_t i = 0; i < std::min(elements.size(), kShownElements); ++i)
          text += (i > 0 ? ", " : "") + show(elements[i]);
        return text + (elements.size() > kShownElements ? ", ...]" : "]");
      },
      array.values);
}

std::string type_of(const gguf::Value& value) {
  if (value.type != gguf::ValueType::array) return std::string(gguf::value_type_name(value.type));
  const auto& array = std::get<gguf::Array>(value.data);
  return fmt::format("{}[{}]", gguf::value_type_name(array.element_type), array.size());
}

std::string shape_of(const gguf::TensorInfo& tensor) {
  std::string text;
  for (int i = 0; i < std::max(tensor.n_dims, 1); ++i)
    text += fmt::format("{}{}", i > 0 ? " x " : "", tensor.ne[static_cast<size_t>(i)]);
  return text;
}

// Lines of equally wide columns, two spaces apart; the columns of right_aligned hold numbers.
std::string format_columns(const std::vector<std::vector<std::string>>& rows, const std::vector<bool>& right_aligned) {
  std::vector<size_t> widths(right_aligned.size(), 0);
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c)
      line += right_aligned[c] ? fmt::format("  {:>{}}", row[c], widths[c])
                               : (c + 1 == row.size() ? "  " + row[c] : fmt::format("  {:<{}}", row[c], widths[c]));
    text += line + "\n";
  }
  return text;
}

struct Totals {
  uint64_t n_tensors = 0, n_parameters = 0, size_bytes = 0;
  double bits_per_weight() const {
    return n_parameters > 0 ? 8.0 * static_cast<double>(size_bytes) / static_cast<double>(n_parameters) : 0.0;
  }
  void add(const gguf::TensorInfo& tensor) {
    ++n_tensors;
    n_parameters += static_cast<uint64_t>(tensor::n_elements(tensor.ne));
    size_bytes += tensor.size_bytes;
  }
};

std::string format_count(uint64_t n) {
  const double value = static_cast<double>(n);
  if (n >= 1000000000) return fmt::format("{:.2f} G", value / 1e9);
  if (n >= 1000000) return fmt::format("{:.2f} M", value / 1e6);
  return fmt::to_string(n);
}

std::string describe_totals(const gguf::Model& model) {
  Totals all;
  std::map<std::string_view, Totals> by_type;
  for (const gguf::TensorInfo& tensor : model.tensors()) {
    all.add(tensor);
    by_type[tensor::dtype_name(tensor.type)].add(tensor);
  }
  std::vector<std::vector<std::string>> rows;
  const auto add_row = [&](std::string_view name, const Totals& t) {
    rows.push_back({std::string(name), fmt::format("{} tensors", t.n_tensors),
                    fmt::format("{} parameters", format_count(t.n_parameters)), format_bytes(t.size_bytes),
                    fmt::format("{:.2f} bits per weight", t.bits_per_weight())});
  };
  for (const auto& [name, totals] : by_type) add_row(name, totals);
  add_row("total", all);
  return format_columns(rows, {false, true, true, true, true});
}

json to_json(const gguf::Value& value, size_t max_elements) {
  return std::visit(
      [&]<typename T>(const T& x) -> json {
        if constexpr (std::is_same_v<T, gguf::Array>) {
          json elements = json::array();
          std::visit(
              [&](const auto& all) {
                for (size_t i = 0; i < std::min(all.size(), max_elements); ++i) elements.push_back(all[i]);
              },
              x.values);
          return {{"type", "array"},
                  {"element_type", gguf::value_type_name(x.element_type)},
                  {"length", x.size()},
                  {"value", std::move(elements)}};
        } else {
          return {{"type", gguf::value_type_name(value.type)}, {"value", x}};
        }
      },
      value.data);
}

}  // namespace

std::string describe(const gguf::Model& model) {
  std::string text = fmt::format("{}{}\n", model.path(),
                                 model.n_files() > 1 ? fmt::format(" and {} more files", model.n_files() - 1) : "");
  std::vector<std::vector<std::string>> rows;
  for (const auto& [key, value] : model.metadata().entries())
    rows.push_back({key, type_of(value), std::visit([](const auto& x) { return show(x); }, value.data)});
  text += fmt::format("\nmetadata ({} entries)\n", rows.size()) + format_columns(rows, {false, false, false});

  rows = {{"name", "type", "shape", "file", "offset", "bytes"}};
  for (const gguf::TensorInfo& tensor : model.tensors())
    rows.push_back({tensor.name, std::string(tensor::dtype_name(tensor.type)), shape_of(tensor),
                    fmt::to_string(tensor.file + 1), fmt::to_string(tensor.offset), fmt::to_string(tensor.size_bytes)});
  text += fmt::format("\ntensors ({})\n", model.tensors().size()) +
          format_columns(rows, {false, false, false, true, true, true});
  return text + fmt::format("\ntotals (file type: {})\n", gguf::file_type_description(model.metadata())) +
         describe_totals(model);
}

json describe_json(const gguf::Model& model, size_t max_elements) {
  json metadata = json::object(), tensors = json::array();
  for (const auto& [key, value] : model.metadata().entries()) metadata[key] = to_json(value, max_elements);
  Totals totals;
  for (const gguf::TensorInfo& tensor : model.tensors()) {
    totals.add(tensor);
    tensors.push_back(
        {{"name", tensor.name},
         {"type", tensor::dtype_name(tensor.type)},
         {"shape", std::vector<int64_t>(tensor.ne.begin(), tensor.ne.begin() + std::max(tensor.n_dims, 1))},
         {"file", tensor.file},
         {"offset", tensor.offset},
         {"bytes", tensor.size_bytes}});
  }
  return {{"path", model.path()},
          {"files", model.n_files()},
          {"metadata", std::move(metadata)},
          {"tensors", std::move(tensors)},
          {"totals",
           {{"tensors", totals.n_tensors},
            {"parameters", totals.n_parameters},
            {"bytes", totals.size_bytes},
            {"file_type", gguf::file_type_description(model.metadata())},
            {"bits_per_weight", totals.bits_per_weight()}}}};
}

int run_inspect(int argc, char** argv) {
  std::string path;
  bool as_json = false;
  uint64_t max_elements = 16;
  OptionParser options("caravan inspect FILE [options]",
                       "Prints the metadata and the tensors of a GGUF model (of a split one, give the first part).");
  options.positional("FILE", "the GGUF file", into(path));
  options.add({{"--json"}, "", "print one JSON object", {}, into(as_json)});
  options.add({{"--elements"},
               "N",
               "with --json: elements of an array that are printed (default: 16)",
               {},
               into(max_elements, 0, std::numeric_limits<int64_t>::max())});
  if (options.parse(argc, argv) == OptionParser::Result::exit) return 0;
  const gguf::Model model = gguf::Model::open(path);
  if (as_json)
    fmt::print("{}\n", describe_json(model, max_elements).dump(2, ' ', false, json::error_handler_t::replace));
  else
    fmt::print("{}", describe(model));
  return 0;
}

}  // namespace caravan::app
