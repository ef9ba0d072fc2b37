// caravan bench: prompt and generation speed of a model, beside what the machine can do at best.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "base/memory.h"
#include "base/progress.h"
#include "commands.h"
#include "device/cpu/limits.h"
#include "engine/engine.h"
#include "generate.h"
#include "gguf/file_type.h"
#include "model_options.h"
#include "models/registry.h"
#include "models/work.h"

namespace caravan::app {
namespace {

using Json = nlohmann::ordered_json;

struct BenchOptions {
  ModelOptions model;
  int n_prompt = 256, n_gen = 64, repetitions = 5;
  std::string format = "md";
};

OptionParser make_parser(BenchOptions& o) {
  OptionParser parser("caravan bench -m FILE [-p N] [-n N] [-t N] [--rpc HOST:PORT,...] [-r N] [-o md|json]",
                      "Measures prompt and generation speed, and this machine's limits in the same run.");
  add_model_options(parser, o.model);
  parser.section("Measurement");
  parser.add({{"-p", "--n-prompt"}, "N", "tokens of the prompt (256)", {}, into(o.n_prompt, 1, 1000000)});
  parser.add({{"-n", "--n-gen"}, "N", "tokens generated after it (64)", {}, into(o.n_gen, 1, 1000000)});
  parser.add(
      {{"-r", "--repetitions"}, "N", "runs, of which the median is given (5)", {}, into(o.repetitions, 1, 1000)});
  parser.add({{"-o", "--output"}, "F", "md or json (md)", {}, [&o](const std::string& value) {
                if (value != "md" && value != "json") throw RequestError("accepted: md, json; found '" + value + "'");
                o.format = value;
              }});
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  return parser;
}

struct Series {
  std::vector<double> values;
  double median() const {
    std::vector<double> sorted = values;
    std::sort(sorted.begin(), sorted.end());
    const size_t n = sorted.size();
    return n % 2 == 1 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
  }
  double min() const { return *std::min_element(values.begin(), values.end()); }
  double max() const { return *std::max_element(values.begin(), values.end()); }
  Json json() const { return {{"median", median()}, {"min", min()}, {"max", max()}, {"n", values.size()}}; }
};

// One prompt and one generation after it, as the engine computes them for a request; rates are appended.
void measure(engine::Engine& engine, const BenchOptions& options, uint32_t n_vocab, Series& prompt,
             Series& generation) {
  engine::GenerateParams params;
  for (int i = 0; i < options.n_prompt; ++i)
    params.prompt.push_back(static_cast<int32_t>((static_cast<uint32_t>(i) * 7919u + 13) % n_vocab));
  params.n_predict = options.n_gen + 1;  // the first is the prompt's
  params.cache_prompt = false;
  params.sampling.temperature = 0;
  params.sampling.ignore_eos = true;
  const engine::Timings timings = generate(engine, std::move(params), [](std::string_view) {}).timings;
  prompt.values.push_back(timings.prompt_n / timings.prompt_ms * 1000);
  generation.values.push_back((timings.predicted_n - 1) / timings.predicted_ms * 1000);
}

void print_markdown(const Json& r, const BenchOptions& o, const std::string& file_type) {
  const auto row = [](const std::string& test, const Json& s, const std::string& work, double percent, const char* of) {
    fmt::print("| {:<7} | {:>10.2f} | {:>8.2f} - {:<8.2f} | {:>14} | {:>5.1f}% of {} |\n", test,
               s["median"].get<double>(), s["min"].get<double>(), s["max"].get<double>(), work, percent, of);
  };
  const Json& limits = r["limits"];
  const double ops = r["prompt"]["ops_per_s"], bytes = r["generation"]["weight_bytes_per_s"];
  const bool is_float = r["float_weights"];
  const double compute_limit = is_float ? limits["f32_flop_per_s"] : limits["int8_ops_per_s"];
  fmt::print("{} ({}), {} threads{}\n\n", o.model.model, file_type, r["threads"].get<int>(),
             o.model.rpc.empty() ? "" : fmt::format(", {} backends", o.model.rpc.size()));
  fmt::print("| test    |   tokens/s |        min - max    |           rate | of the machine's limit |\n");
  fmt::print("|---------|-----------:|:-------------------:|---------------:|------------------------|\n");
  row(fmt::format("pp{}", o.n_prompt), r["prompt"]["tokens_per_s"], fmt::format("{:.1f} Gop/s", ops / 1e9),
      100 * ops / compute_limit, is_float ? "f32" : "int8");
  row(fmt::format("tg{}", o.n_gen), r["generation"]["tokens_per_s"], fmt::format("{:.2f} GB/s", bytes / 1e9),
      100 * bytes / limits["read_bytes_per_s"].get<double>(), "read");
  fmt::print(
      "\nlimits measured in this run, {} threads: read {:.1f} GB/s, int8 {:.0f} Gop/s, f32 {:.0f} GFLOP/s; peak memory "
      "{}\n",
      r["threads"].get<int>(), limits["read_bytes_per_s"].get<double>() / 1e9,
      limits["int8_ops_per_s"].get<double>() / 1e9, limits["f32_flop_per_s"].get<double>() / 1e9,
      format_bytes(peak_resident_memory_bytes()));
  if (r.contains("predicted"))
    fmt::print("predicted by the planner: prompts of {} tokens {:.2f} tokens/s, generation {:.2f} tokens/s\n",
               plan::kTypicalPrompt, r["predicted"]["prompt_tokens_per_s"].get<double>(),
               r["predicted"]["generation_tokens_per_s"].get<double>());
}

bool has_float_matrices(const gguf::Model& file) {
  for (const gguf::TensorInfo& tensor : file.tensors())
    if (tensor.name.rfind("blk.", 0) == 0 && tensor.ne[1] > 1) return tensor::dtype_info(tensor.type).block_length == 1;
  return true;
}

}  // namespace

int run_bench(int argc, char** argv) {
  BenchOptions options;
  OptionParser parser = make_parser(options);
  options.model.n_parallel = 1;
  options.model.wants_prediction = true;
  options.model.log_level = "warn";
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  if (options.model.n_ctx == 0) options.model.n_ctx = static_cast<uint32_t>(options.n_prompt + options.n_gen + 2);

  const int n_threads = thread_count(options.model.n_threads);
  const device::cpu::MachineLimits limits = device::cpu::measure_limits(n_threads);
  OpenedModel opened(options.model);
  engine::Engine engine(opened.pipeline(), opened.vocabulary(), {});
  start(opened, engine);
  const models::ModelWork work = models::model_work(models::find_arch(opened.file().metadata()),
                                                    opened.hyperparameters(), models::tensor_map(opened.file()));

  Series prompt, generation;
  Series warm_up_prompt, warm_up_generation;
  measure(engine, options, opened.hyperparameters().n_vocab, warm_up_prompt, warm_up_generation);
  for (int i = 0; i < options.repetitions; ++i)
    measure(engine, options, opened.hyperparameters().n_vocab, prompt, generation);

  const double prompt_ops = 2 * work.per_prompt_row().multiplies * options.n_prompt +
                            2 * (work.per_token().multiplies - work.per_prompt_row().multiplies);
  Json result = {{"model", options.model.model},
                 {"threads", n_threads},
                 {"isa", std::string(isa_name(select_isa()))},
                 {"backends", options.model.rpc},
                 {"float_weights", has_float_matrices(opened.file())},
                 {"prompt",
                  {{"n", options.n_prompt},
                   {"tokens_per_s", prompt.json()},
                   {"ops_per_s", prompt_ops * prompt.median() / options.n_prompt}}},
                 {"generation",
                  {{"n", options.n_gen},
                   {"tokens_per_s", generation.json()},
                   {"weight_bytes_per_s", work.per_token().bytes * generation.median()}}},
                 {"limits",
                  {{"read_bytes_per_s", limits.read_bytes_per_s},
                   {"int8_ops_per_s", limits.int8_ops_per_s},
                   {"f32_flop_per_s", limits.f32_flop_per_s}}}};
  if (const auto predicted = opened.pipeline().prediction())
    result["predicted"] = {{"prompt_tokens_per_s", predicted->prompt},
                           {"generation_tokens_per_s", predicted->generation}};
  if (options.format == "json") {
    fmt::print("{}\n", result.dump(2));
  } else {
    print_markdown(result, options, gguf::file_type_description(opened.file().metadata()));
  }
  return 0;
}

}  // namespace caravan::app
