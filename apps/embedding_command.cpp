// caravan embedding (llama-embedding): embeddings of texts on standard output.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

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
  bool has_text = false;
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
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
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

void print_plain(const std::vector<std::vector<float>>& vectors, const std::vector<std::string>& texts,
                 const EmbeddingOptions& o, bool per_token) {
  const char* number = o.normalisation == 0 ? "{:6.0f}" : "{:9.6f}";
  for (size_t i = 0; i < vectors.size(); ++i) {
    std::vector<float> shown = vectors[i];
    constexpr size_t kShownOfSeveral = 16;
    if (vectors.size() > 1 && !per_token) shown.resize(std::min(shown.size(), kShownOfSeveral));
    fmt::print("embedding {}: {}\n", i, joined(shown, number, " "));
  }
  if (vectors.size() < 2 || per_token) return;
  fmt::print("\ncosine similarity matrix:\n\n");
  constexpr size_t kLabel = 6;
  for (const std::string& text : texts) fmt::print("{:>6} ", text.substr(0, kLabel));
  fmt::print("\n");
  for (size_t i = 0; i < vectors.size(); ++i)
    fmt::print("{} {}\n", cosine_row(vectors, i, " "), texts[i].substr(0, kLabel));
}

void print_json(const std::vector<std::vector<float>>& vectors, bool with_cosines) {
  fmt::print("{{\n  \"object\": \"list\",\n  \"data\": [\n");
  for (size_t i = 0; i < vectors.size(); ++i)
    fmt::print("    {{\n      \"object\": \"embedding\",\n      \"index\": {},\n      \"embedding\": [{}]\n    }}{}\n",
               i, joined(vectors[i], "{:.7f}", ","), i + 1 < vectors.size() ? "," : "");
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

  const std::vector<std::string> texts = split_texts(options.text, options.separator);
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
          if (pooling != engine::Pooling::none) engine::normalise(vector, options.normalisation);
          vectors.push_back(std::move(vector));
        }
    }
  }

  if (options.format.empty()) print_plain(vectors, texts, options, pooling == engine::Pooling::none);
  if (options.format == "json" || options.format == "json+") print_json(vectors, options.format == "json+");
  if (options.format == "raw")
    for (const auto& vector : vectors) fmt::print("{}\n", joined(vector, "{:.7f}", " "));
  if (options.format == "array") {
    const char* number = options.normalisation == 0 ? "{:.0f}" : "{:.7f}";
    for (size_t i = 0; i < vectors.size(); ++i) fmt::print("{}{}]", i ? ",[" : "[[", joined(vectors[i], number, ","));
    fmt::print("]\n");
  }
  return 0;
}

}  // namespace caravan::app
