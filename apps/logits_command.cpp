// caravan logits: the logits of every token of one sequence, for comparing with other programs.
#include <fmt/format.h>

#include "base/file.h"
#include "base/log.h"
#include "commands.h"
#include "model_options.h"
#include "sequence_driver.h"

namespace caravan::app {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::vector<std::string> tokens;
  std::string output;
};

OptionParser make_parser(LogitsOptions& o) {
  OptionParser parser("caravan logits -m FILE --tokens 1,2,3 -o FILE [--rpc HOST:PORT,...]",
                      "Writes the logits of every token of a sequence: n_tokens x n_vocab little-endian f32.\n"
                      "The KV cache is f32 unless -ctk and -ctv say otherwise; -ub sets the size of prompt chunks.");
  add_model_options(parser, o.model);
  parser.section("Logits");
  parser.add({{"--tokens"}, "ID,ID,...", "token ids at positions 0, 1, ...", {}, [&o](const std::string& value) {
                o.tokens = split(value, ',');
              }});
  parser.add({{"-o", "--output"}, "FILE", "file to write", {}, into(o.output)});
  parser.add({{"--kv-type"}, "TYPE", "the same as -ctk TYPE -ctv TYPE", {}, [&o](const std::string& value) {
                o.model.k_type = o.model.v_type = value;
              }});
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  return parser;
}

std::vector<int32_t> parse_tokens(const std::vector<std::string>& texts, uint32_t n_vocab) {
  std::vector<int32_t> tokens;
  for (const std::string& text : texts) {
    try {
      tokens.push_back(static_cast<int32_t>(parse_integer(text, 0, int64_t{n_vocab} - 1)));
    } catch (const RequestError& error) {
      throw RequestError(std::string("--tokens: ") + error.what());
    }
  }
  if (tokens.empty()) throw RequestError("no tokens: give some with --tokens 1,2,3");
  return tokens;
}

}  // namespace

int run_logits(int argc, char** argv) {
  LogitsOptions options;
  OptionParser parser = make_parser(options);
  options.model.n_parallel = 1;
  options.model.k_type = options.model.v_type = "f32";
  options.model.log_level = "warn";
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  if (options.output.empty()) throw RequestError("no file to write: give one with -o FILE");
  if (options.model.n_ctx == 0) options.model.n_ctx = static_cast<uint32_t>(options.tokens.size());

  OpenedModel opened(options.model);
  const std::vector<int32_t> tokens = parse_tokens(options.tokens, opened.hyperparameters().n_vocab);
  opened.pipeline().start();
  SequenceDriver driver(opened.pipeline());
  std::vector<uint32_t> rows(tokens.size());
  for (uint32_t i = 0; i < rows.size(); ++i) rows[i] = i;
  std::vector<float> values;
  for (const stage::RowOutput& row : driver.forward(0, tokens, rows, {0, stage::OutputKind::logits, 0, {}}))
    values.insert(values.end(), row.values.begin(), row.values.end());
  write_file_atomically(options.output, std::as_bytes(std::span(values)));
  return 0;
}

}  // namespace caravan::app
