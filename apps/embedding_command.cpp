// caravan embedding (llama-embedding): embeddings of texts on standard output, in llama-embedding's formats.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <span>

#include "base/file.h"
#include "base/log.h"
#include "commands.h"
#include "engine/engine.h"
#include "engine/pooling.h"
#include "model_options.h"

namespace caravan::app {
namespace {

struct EmbeddingOptions {
  ModelOptions model;
  std::string text, separator = "\n", pooling, format;
  bool has_text = false, escape = true;
  int normalisation = 2;
};

OptionParser make_parser(EmbeddingOptions& o) {
  OptionParser parser("caravan embedding -m FILE -p TEXT [options]",
                      "Prints embeddings of texts, one per line of TEXT. Also runs under the name llama-embedding.");
  add_model_options(parser, o.model);
  parser.section("Text");
  parser.add({{"-p", "--prompt"}, "TEXT", "texts to embed", {}, [&o](const std::string& value) {
                o.text = value;
                o.has_text = true;
              }});
  parser.add({{"-f", "--file"}, "FILE", "file that holds the texts", {}, [&o](const std::string& value) {
                o.text = read_text_file(value);
                if (!o.text.empty() && o.text.back() == '\n') o.text.pop_back();
                o.has_text = true;
                o.escape = false;
              }});
  parser.add({{"--embd-separator"}, "S", "what separates texts (newline)", {}, into(o.separator)});
  parser.add(
      {{"--pooling"}, "TYPE", "none, mean, cls or last (the model's own)", {"LLAMA_ARG_POOLING"}, into(o.pooling)});
  parser.add({{"--embd-normalize"},
              "N",
              "-1 none, 0 max-abs to 32760, 1 sum, 2 Euclidean, p > 2 p-norm (2)",
              {},
              into(o.normalisation, -1, 1000)});
  parser.add({{"--embd-output-format"}, "F", "\"\", array, json, json+ or raw (\"\")", {}, into(o.format)});
  parser.add({{"--no-escape"}, "", "take backslashes in -p as they are", {}, into(o.escape, false)});
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  parser.accepted({"-e", "--escape"}, "", "escapes in -p are processed unless --no-escape is given");
  parser.unsupported({"--attention", "--cls-separator"});
  return parser;
}

std::vector<std::string> split_texts(const std::string& text, const std::string& separator) {
  if (separator.empty()) return {text};
  std::vector<std::string> texts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + separator.size())
    texts.push_back(text.substr(begin, end - begin));
  texts.push_back(text.substr(begin));
  return texts;
}

double cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

std::string cosine_row(const std::vector<std::vector<float>>& vectors, size_t i, const char* separator) {
  std::string row;
  for (size_t j = 0; j < vectors.size(); ++j)
    row += fmt::format("{}{:6.2f}", j ? separator : "", cosine(vectors[i], vectors[j]));
  return row;
}

std::string joined(const std::vector<float>& vector, const char* number_format, const char* separator) {
  std::string text;
  for (size_t i = 0; i < vector.size(); ++i)
    text += (i ? separator : "") + fmt::format(fmt::runtime(number_format), vector[i]);
  return text;
}

// Each number with a space behind it, as llama-embedding prints them.
std::string shown_numbers(std::span<const float> numbers, int normalisation) {
  std::string text;
  for (const float x : numbers) text += normalisation == 0 ? fmt::format("{:6.0f} ", x) : fmt::format("{:9.6f} ", x);
  return text;
}

// Of tokens the first and last three values, of several texts the first sixteen, of one text all.
void print_plain(const std::vector<std::vector<float>>& vectors, const std::vector<std::string>& texts,
                 const EmbeddingOptions& o, bool per_token) {
  constexpr size_t kShownOfTokens = 3, kShownOfSeveral = 16;
  for (size_t i = 0; i < vectors.size(); ++i) {
    const std::span<const float> all(vectors[i]);
    const size_t n_front = per_token ? kShownOfTokens : vectors.size() > 1 ? kShownOfSeveral : all.size();
    fmt::print("embedding {}: {}", i, shown_numbers(all.first(std::min(all.size(), n_front)), o.normalisation));
    if (per_token)
      fmt::print(" ... {}", shown_numbers(all.last(std::min(all.size(), kShownOfTokens)), o.normalisation));
    fmt::print("\n");
  }
  if (vectors.size() < 2 || per_token) return;
  fmt::print("\ncosine similarity matrix:\n\n");
  constexpr size_t kColumnLabel = 6, kRowLabel = 10;
  for (const std::string& text : texts) fmt::print("{:>6} ", text.substr(0, kColumnLabel));
  fmt::print("\n");
  for (size_t i = 0; i < vectors.size(); ++i)
    fmt::print("{} {}\n", cosine_row(vectors, i, " "), texts[i].substr(0, kRowLabel));
}

void print_json(const std::vector<std::vector<float>>& vectors, const char* number, bool with_cosines) {
  fmt::print("{{\n  \"object\": \"list\",\n  \"data\": [\n");
  for (size_t i = 0; i < vectors.size(); ++i)
    fmt::print("    {{\n      \"object\": \"embedding\",\n      \"index\": {},\n      \"embedding\": [{}]\n    }}{}\n",
               i, joined(vectors[i], number, ","), i + 1 < vectors.size() ? "," : "");
  fmt::print("  ]");
  if (with_cosines && vectors.size() > 1) {
    fmt::print(",\n  \"cosineSimilarity\": [\n");
    for (size_t i = 0; i < vectors.size(); ++i)
      fmt::print("    [{}]{}\n", cosine_row(vectors, i, ", "), i + 1 < vectors.size() ? "," : "");
    fmt::print("  ]");
  }
  fmt::print("\n}}\n");
}

}  // namespace

int run_embedding(int argc, char** argv) {
  EmbeddingOptions options;
  OptionParser parser = make_parser(options);
  options.model.log_level = "warn";
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  if (!options.has_text) throw RequestError("no text: give one with -p TEXT or -f FILE");
  const std::vector<std::string> formats = {"", "array", "json", "json+", "raw"};
  if (std::find(formats.begin(), formats.end(), options.format) == formats.end())
    throw RequestError("--embd-output-format '" + options.format +
                       "' is not known; accepted: \"\", array, json, json+, raw");

  OpenedModel opened(options.model);
  const engine::Pooling pooling = embedding_pooling(options.pooling, opened.hyperparameters());
  engine::Engine engine(opened.pipeline(), opened.vocabulary());
  start(opened, engine);

  const std::vector<std::string> texts =
      split_texts(options.escape ? unescape(options.text) : options.text, options.separator);
  std::vector<std::shared_ptr<engine::TokenStream>> streams;
  for (const std::string& text : texts)
    streams.push_back(
        engine.embed({opened.vocabulary().tokenize(text, vocab::AddSpecial::yes, vocab::ParseSpecial::yes), pooling}));
  std::vector<std::vector<float>> vectors;
  for (const auto& stream : streams) {
    while (!stream->finished()) {
      auto event = stream->next(std::chrono::seconds(1));
      if (!event) continue;
      if (const auto* error = std::get_if<engine::ErrorEvent>(&*event)) throw RequestError(error->message, error->kind);
      if (auto* done = std::get_if<engine::EmbeddingEvent>(&*event))
        for (auto& vector : done->vectors) {
          engine::normalise(vector, options.normalisation);
          vectors.push_back(std::move(vector));
        }
    }
  }

  const char* number = options.normalisation == 0 ? "{:.0f}" : "{:.7f}";
  const bool per_token = pooling == engine::Pooling::none;
  if (options.format.empty()) print_plain(vectors, texts, options, per_token);
  if (options.format == "json" || options.format == "json+")
    print_json(vectors, number, options.format == "json+" && !per_token);
  if (options.format == "raw")
    for (const auto& vector : vectors) fmt::print("{}\n", joined(vector, number, " "));
  if (options.format == "array") {
    for (size_t i = 0; i < vectors.size(); ++i) fmt::print("{}{}]", i ? ",[" : "[[", joined(vectors[i], number, ","));
    fmt::print("]\n");
  }
  return 0;
}

}  // namespace caravan::app
