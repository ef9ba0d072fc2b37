// caravan plan: which backend would hold which layers, how fast that would be, and why a backend is left out.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "base/log.h"
#include "commands.h"
#include "model_options.h"

namespace caravan::app {
namespace {

using Json = nlohmann::ordered_json;
using Proposal = cluster::ClusterPipeline::Proposal;

struct PlanOptions {
  ModelOptions model;
  bool json = false;
};

OptionParser make_parser(PlanOptions& o) {
  OptionParser parser("caravan plan -m FILE --rpc HOST:PORT,... [--plan GOAL] [--json]",
                      "Shows which backend would hold which layers and how fast that would be. Loads nothing.");
  add_model_options(parser, o.model);
  parser.section("Output");
  parser.add({{"--json"}, "", "print JSON", {}, into(o.json)});
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  return parser;
}

// Per type of matrix what a device was measured to do.
std::string speeds_table(const Proposal& proposal) {
  std::string table;
  for (size_t i = 0; i < proposal.offers.size(); ++i) {
    const auto& speeds = proposal.speeds[i];
    if (!speeds) continue;
    std::string types;
    for (const auto& [type, rate] : speeds->device.matrices)
      types += fmt::format("{}{} {:.1f} GB/s {:.0f} Gop/s", types.empty() ? "" : ", ", tensor::dtype_name(type),
                           rate.bytes_per_s / 1e9, rate.ops_per_s / 1e9);
    std::string layers;
    for (const auto& [kind, times] : speeds->device.layers)
      layers += fmt::format("{}{:.3g} ms for a row, {:.3g} ms for {}", layers.empty() ? "; layers: " : ", ",
                            1e3 * times.seconds.front(), 1e3 * times.seconds.back(), times.n_rows.back());
    table += fmt::format("{:<28} link {:.2f} ms {:.0f} MB/s; {}{}\n", proposal.offers[i].name,
                         2e3 * speeds->link.latency_seconds, speeds->link.bytes_per_s / 1e6, types, layers);
  }
  return table;
}

Json to_json(const Proposal& proposal) {
  Json stages = Json::array(), devices = Json::array(), left_out = Json::array();
  for (const plan::PlacedStage& stage : proposal.placement.stages)
    stages.push_back({{"device", proposal.offers[stage.device].name},
                      {"replica", stage.replica},
                      {"layers", {stage.slice.layer_begin, stage.slice.layer_end}},
                      {"input", plan::input_name(stage.input)},
                      {"weights", stage.need.weights},
                      {"kv_cache", stage.need.kv_cache},
                      {"scratch", stage.need.scratch}});
  for (const auto& [i, reason] : proposal.left_out)
    left_out.push_back({{"device", proposal.offers[i].name}, {"reason", reason}});
  for (size_t i = 0; i < proposal.offers.size(); ++i) {
    Json device = {{"device", proposal.offers[i].name},
                   {"local", proposal.offers[i].local},
                   {"memory_free", proposal.offers[i].memory_free}};
    if (const auto& speeds = proposal.speeds[i]) {
      device["round_trip_ms"] = 2e3 * speeds->link.latency_seconds;
      device["link_bytes_per_s"] = speeds->link.bytes_per_s;
      for (const auto& [type, rate] : speeds->device.matrices)
        device["matrices"][std::string(tensor::dtype_name(type))] = {{"bytes_per_s", rate.bytes_per_s},
                                                                     {"ops_per_s", rate.ops_per_s}};
      device["layers"] = Json::array();  // of each kind
      for (const auto& [kind, times] : speeds->device.layers)
        device["layers"].push_back({{"n_rows", times.n_rows}, {"seconds", times.seconds}});
    }
    devices.push_back(std::move(device));
  }
  Json result = {{"stages", std::move(stages)},
                 {"n_ctx", proposal.placement.n_ctx},
                 {"devices", std::move(devices)},
                 {"left_out", std::move(left_out)},
                 {"missing", proposal.missing}};
  if (const auto& p = proposal.placement.prediction)
    result["predicted"] = {{"prompt_tokens_per_s", p->prompt},
                           {"generation_tokens_per_s", p->generation},
                           {"streams_tokens_per_s", p->streams},
                           {"n_streams", proposal.placement.cache.max_slots}};
  return result;
}

}  // namespace

int run_plan(int argc, char** argv) {
  PlanOptions options;
  options.model.log_level = "warn";
  options.model.wants_prediction = true;
  OptionParser parser = make_parser(options);
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  OpenedModel opened(options.model);
  const Proposal proposal = opened.pipeline().propose();
  if (options.json) {
    fmt::print("{}\n", to_json(proposal).dump(2));
    return 0;
  }
  fmt::print("{}\ncontext: {} tokens\n", plan::describe(proposal.placement, proposal.offers, proposal.left_out),
             proposal.placement.n_ctx);
  if (const std::string speeds = speeds_table(proposal); !speeds.empty()) fmt::print("\nmeasured:\n{}", speeds);
  if (!proposal.missing.empty()) fmt::print("\nwithout {}\n", fmt::join(proposal.missing, ", "));
  return 0;
}

}  // namespace caravan::app
