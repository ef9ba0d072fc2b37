// caravan bench: prompt and generation speed of a model, beside what the machine can do at best.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
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
#include "parallel.h"
#include "stage/loaded_slice.h"

namespace caravan::app {
namespace {

using Json = nlohmann::ordered_json;

struct BenchOptions {
  ModelOptions model;
  int n_prompt = 256, n_gen = 64, n_depth = 0, repetitions = 5;
  std::string format = "md";
};

OptionParser make_parser(BenchOptions& o) {
  OptionParser parser(
      "caravan bench -m FILE [-p N] [-n N] [-d N] [-np N] [-t N] [--rpc HOST:PORT,...] [-r N] [-o md|json]",
      "Measures prompt and generation speed, of one sequence and with -np of several at once, and this "
      "machine's limits in the same run.");
  add_model_options(parser, o.model);
  parser.section("Measurement");
  parser.add({{"-p", "--n-prompt"}, "N", "tokens of the prompt (256)", {}, into(o.n_prompt, 1, 1000000)});
  parser.add({{"-n", "--n-gen"}, "N", "tokens generated after it (64)", {}, into(o.n_gen, 1, 1000000)});
  parser.add({{"-d", "--n-depth"}, "N", "tokens before the prompt (0)", {}, into(o.n_depth, 0, 10000000)});
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

// Speeds of one test, and what part of the machine's limit each run reached.
struct Test {
  Series tokens_per_s, share_of_limit;
};

// The machine's limits beside the runs.
struct Limits {
  Series read, int8, f32;
  void add(const device::cpu::MachineLimits& limits) {
    read.values.push_back(limits.read_bytes_per_s);
    int8.values.push_back(limits.int8_ops_per_s);
    f32.values.push_back(limits.f32_flop_per_s);
  }
};
// Appends what part of a limit the last run of a test reached: the limit being the mean of its last two measurements.
void add_share(Test& test, double work_per_token, const Series& limit) {
  const auto n = limit.values.size();
  test.share_of_limit.values.push_back(test.tokens_per_s.values.back() * work_per_token * 2 /
                                       (limit.values[n - 1] + limit.values[n - 2]));
}

// A greedy request for n_gen tokens after the first, whose prompt is `depth` tokens that all requests share and
// n_prompt that only those with the same `variant` share.
engine::GenerateParams make_request(const BenchOptions& options, uint32_t n_vocab, int n_prompt, uint32_t variant) {
  engine::GenerateParams params;
  const auto add = [&](int n, uint32_t seed) {
    for (int i = 0; i < n; ++i)
      params.prompt.push_back(static_cast<int32_t>((static_cast<uint32_t>(i) * 7919u + seed * 104729u + 13) % n_vocab));
  };
  add(options.n_depth, 0);
  add(n_prompt, variant);
  params.n_predict = options.n_gen + 1;  // the first is the prompt's
  params.cache_prompt = options.n_depth > 0;
  params.sampling.temperature = 0;
  params.sampling.ignore_eos = true;
  return params;
}

// One prompt and one generation after it, as the engine computes them for a request; rates are appended.
void measure(engine::Engine& engine, engine::GenerateParams params, Series& prompt, Series& generation) {
  const engine::Timings timings = generate(engine, std::move(params), [](std::string_view) {}).timings;
  prompt.values.push_back(timings.prompt_n / timings.prompt_ms * 1000);
  generation.values.push_back((timings.predicted_n - 1) / timings.predicted_ms * 1000);
}

// Tokens per second of n_parallel sequences together, while all of them generate. Throws what a request fails with.
double measure_together(engine::Engine& engine, const BenchOptions& options, uint32_t n_vocab) {
  constexpr int kShortPrompt = 8;
  using Clock = std::chrono::steady_clock;
  std::vector<std::vector<Clock::time_point>> times(options.model.n_parallel);  // of each sequence's tokens
  run_jobs(times.size(), static_cast<int>(times.size()), [&](size_t i) {
    const auto stream = engine.submit(make_request(options, n_vocab, kShortPrompt, static_cast<uint32_t>(i) + 1));
    while (!stream->finished()) {
      const auto event = stream->next(std::chrono::seconds(1));
      if (!event) continue;
      if (const auto* error = std::get_if<engine::ErrorEvent>(&*event)) throw RequestError(error->message, error->kind);
      if (const auto* token = std::get_if<engine::TokenEvent>(&*event))
        times[i].insert(times[i].end(), token->tokens.size(), Clock::now());
    }
  });
  auto begin = Clock::time_point::min(), end = Clock::time_point::max();
  for (const auto& sequence : times) {
    begin = std::max(begin, sequence.front());
    end = std::min(end, sequence.back());
  }
  double tokens = 0;
  for (const auto& sequence : times)
    tokens += static_cast<double>(
        std::count_if(sequence.begin(), sequence.end(), [&](auto time) { return time > begin && time <= end; }));
  return tokens / std::chrono::duration<double>(end - begin).count();
}

// Bytes of K and V that the tokens of a generation read, on average.
double cache_bytes_per_token(OpenedModel& opened, const engine::PlanSummary& plan, const BenchOptions& options,
                             const models::Arch& arch, const graph::TensorMap& tensors) {
  stage::CacheConfig config;
  config.k_type = cache_type(options.model.k_type);
  config.v_type = cache_type(options.model.v_type);
  config.block_tokens = plan.block_tokens;
  for (const engine::GroupLimits& group : plan.groups) config.n_blocks.push_back(group.n_blocks);
  const stage::LayerNeeds needs = stage::layer_needs(arch, opened.hyperparameters(), tensors, config, opened.device());
  double bytes = 0;
  const int first = options.n_depth + options.n_prompt;
  for (size_t group = 0; group < plan.groups.size(); ++group)
    for (int i = 0; i < options.n_gen; ++i) {
      const auto position = static_cast<uint32_t>(first + i);
      bytes += static_cast<double>(needs.group_block_bytes[group]) / plan.block_tokens *
               (position + 1 - plan.groups[group].first_visible(position));
    }
  return bytes / options.n_gen;
}

void print_markdown(const Json& r, const BenchOptions& o, const std::string& file_type) {
  const auto row = [](const std::string& test, const Json& s, const std::string& work, double percent, const char* of) {
    fmt::print("| {:<14} | {:>10.2f} | {:>8.2f} - {:<8.2f} | {:>14} | {:>5.1f}% of {} |\n", test,
               s["median"].get<double>(), s["min"].get<double>(), s["max"].get<double>(), work, percent, of);
  };
  const Json& limits = r["limits"];
  const double ops = r["prompt"]["ops_per_s"], bytes = r["generation"]["weight_bytes_per_s"];
  const auto percent = [](const Json& test) { return 100 * test["share_of_limit"]["median"].get<double>(); };
  fmt::print("{} ({}), {} threads{}\n\n", o.model.model, file_type, r["threads"].get<int>(),
             o.model.rpc.empty() ? "" : fmt::format(", {} backends", o.model.rpc.size()));
  fmt::print("| test           |   tokens/s |        min - max    |           rate | of the machine's limit |\n");
  fmt::print("|----------------|-----------:|:-------------------:|---------------:|------------------------|\n");
  const std::string at = o.n_depth > 0 ? fmt::format("@{}", o.n_depth) : "";
  const char* compute = r["float_weights"].get<bool>() ? "f32" : "int8";
  row(fmt::format("pp{}{}", o.n_prompt, at), r["prompt"]["tokens_per_s"], fmt::format("{:.1f} Gop/s", ops / 1e9),
      percent(r["prompt"]), compute);
  row(fmt::format("tg{}{}", o.n_gen, at), r["generation"]["tokens_per_s"], fmt::format("{:.2f} GB/s", bytes / 1e9),
      percent(r["generation"]), "read");
  if (r.contains("together")) {
    const Json& together = r["together"];
    const double rate = together["tokens_per_s"]["median"], together_ops = together["ops_per_s"];
    row(fmt::format("tg{}{} x{}", o.n_gen, at, o.model.n_parallel), together["tokens_per_s"],
        fmt::format("{:.1f} Gop/s", together_ops / 1e9), percent(together), compute);
    fmt::print("\n{} sequences together: {:.2f} times one, {:.2f} of the prompt's rate\n", o.model.n_parallel,
               rate / r["generation"]["tokens_per_s"]["median"].get<double>(),
               rate / r["prompt"]["tokens_per_s"]["median"].get<double>());
  }
  if (o.n_depth > 0) {
    const double cache = r["generation"]["cache_bytes_per_s"];
    fmt::print("\nwith the cache's {:.2f} GB/s generation reads {:.2f} GB/s, {:.1f}% of read\n", cache / 1e9,
               (bytes + cache) / 1e9, percent(r["generation"]) * (bytes + cache) / bytes);
  }
  const auto limit = [&](const char* name, const char* unit, int decimals) {
    const Json& s = limits[name];
    return fmt::format("{:.{}f} ({:.{}f} to {:.{}f}) {}", s["median"].get<double>() / 1e9, decimals,
                       s["min"].get<double>() / 1e9, decimals, s["max"].get<double>() / 1e9, decimals, unit);
  };
  fmt::print("\nlimits, {} threads, measured before and after each run: read {}, int8 {}, f32 {}; peak memory {}\n",
             r["threads"].get<int>(), limit("read_bytes_per_s", "GB/s", 1), limit("int8_ops_per_s", "Gop/s", 0),
             limit("f32_flop_per_s", "GFLOP/s", 0), format_bytes(peak_resident_memory_bytes()));
  if (r.contains("predicted"))
    fmt::print("predicted by the planner: prompts of {} tokens {:.2f} tokens/s, generation {:.2f} tokens/s\n",
               plan::kTypicalPrompt, r["predicted"]["prompt_tokens_per_s"].get<double>(),
               r["predicted"]["generation_tokens_per_s"].get<double>());
}

// Room for the shared tokens, two prompts with their answers, and all sequences that generate together.
uint32_t context_for(const BenchOptions& options) {
  constexpr int kRounding = 64;  // to whole blocks
  const int one = options.n_prompt + options.n_gen + kRounding;
  const int others = static_cast<int>(options.model.n_parallel) * (options.n_gen + kRounding);
  return static_cast<uint32_t>(options.n_depth + 2 * one + others);
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
  if (options.model.n_ctx == 0) options.model.n_ctx = context_for(options);

  const int n_threads = thread_count(options.model.n_threads);
  const device::cpu::LimitsMeter meter(n_threads);
  OpenedModel opened(options.model);
  engine::Engine engine(opened.pipeline(), opened.vocabulary(), {});
  start(opened, engine);
  const models::Arch& arch = models::find_arch(opened.file().metadata());
  const graph::TensorMap tensors = models::tensor_map(opened.file());
  const models::ModelWork work = models::model_work(arch, opened.hyperparameters(), tensors);
  const uint32_t n_vocab = opened.hyperparameters().n_vocab;

  const bool float_weights = has_float_matrices(opened.file());
  const double prompt_ops =  // per token
      2 * work.per_prompt_row().multiplies +
      2 * (work.per_token().multiplies - work.per_prompt_row().multiplies) / options.n_prompt;

  Test prompt, generation, together;
  Limits limits;
  {
    Series warm_up_prompt, warm_up_generation;
    measure(engine, make_request(options, n_vocab, options.n_prompt, 1), warm_up_prompt, warm_up_generation);
  }
  limits.add(meter.measure());
  for (int i = 0; i < options.repetitions; ++i) {
    measure(engine, make_request(options, n_vocab, options.n_prompt, static_cast<uint32_t>(i) + 2), prompt.tokens_per_s,
            generation.tokens_per_s);
    if (options.model.n_parallel > 1)
      together.tokens_per_s.values.push_back(measure_together(engine, options, n_vocab));
    limits.add(meter.measure());
    const Series& compute_limit = float_weights ? limits.f32 : limits.int8;
    add_share(prompt, prompt_ops, compute_limit);
    add_share(generation, work.per_token().bytes, limits.read);
    if (options.model.n_parallel > 1) add_share(together, 2 * work.per_token().multiplies, compute_limit);
  }
  const double cache_bytes = cache_bytes_per_token(opened, engine.status().plan.value(), options, arch, tensors);

  Json result = {{"model", options.model.model},
                 {"threads", n_threads},
                 {"depth", options.n_depth},
                 {"isa", std::string(isa_name(select_isa()))},
                 {"backends", options.model.rpc},
                 {"float_weights", float_weights},
                 {"prompt",
                  {{"n", options.n_prompt},
                   {"tokens_per_s", prompt.tokens_per_s.json()},
                   {"ops_per_s", prompt_ops * prompt.tokens_per_s.median()},
                   {"share_of_limit", prompt.share_of_limit.json()}}},
                 {"generation",
                  {{"n", options.n_gen},
                   {"tokens_per_s", generation.tokens_per_s.json()},
                   {"weight_bytes_per_s", work.per_token().bytes * generation.tokens_per_s.median()},
                   {"cache_bytes_per_s", cache_bytes * generation.tokens_per_s.median()},
                   {"share_of_limit", generation.share_of_limit.json()}}},
                 {"limits",
                  {{"read_bytes_per_s", limits.read.json()},
                   {"int8_ops_per_s", limits.int8.json()},
                   {"f32_flop_per_s", limits.f32.json()}}}};
  if (options.model.n_parallel > 1)
    result["together"] = {{"sequences", options.model.n_parallel},
                          {"tokens_per_s", together.tokens_per_s.json()},
                          {"ops_per_s", 2 * work.per_token().multiplies * together.tokens_per_s.median()},
                          {"share_of_limit", together.share_of_limit.json()}};
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
