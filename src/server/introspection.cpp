// What the server says about itself: /health, /livez, /v1/models, /props, /metrics, and the endpoints that it knows but
// lacks.
#include <fmt/format.h>

#include "server/api.h"
#include "server/chat_format.h"
#include "server/json.h"
#include "server/openai.h"
#include "server/params.h"

namespace caravan::server {
namespace {

using State = engine::EngineStatus::State;

http::Response health(const Api& api) {
  const engine::EngineStatus status = api.engine.status();
  if (status.state == State::ready) return json_response({{"status", "ok"}});
  const std::string message = status.state == State::loading    ? "Loading model"
                              : status.state == State::stopping ? "the server is stopping"
                                                                : "no usable plan: " + status.reason;
  http::Response response = json_response(error_body(503, "unavailable_error", message));
  response.status = 503;
  return response;
}

http::Response livez(const Api&) { return json_response({{"status", "alive"}}); }

http::Response models(const Api& api) {
  const engine::EngineStatus status = api.engine.status();
  const ModelFacts& m = api.model;
  const Json meta = {{"vocab_type", api.vocabulary.model_name()},
                     {"n_vocab", m.n_vocab},
                     {"n_ctx", status.plan ? Json(status.plan->n_ctx) : Json(nullptr)},
                     {"n_ctx_train", m.n_ctx_train},
                     {"n_embd", m.n_embd},
                     {"n_params", m.n_params},
                     {"size", m.size_bytes},
                     {"ftype", m.file_type}};
  const Json details = {{"parent_model", ""},           {"format", "gguf"},     {"family", m.architecture},
                        {"families", {m.architecture}}, {"parameter_size", ""}, {"quantization_level", m.file_type}};
  const Json capabilities = m.causal ? Json{"completion"} : Json{"embedding"};
  return json_response({{"models",
                         {{{"name", m.id()},
                           {"model", m.id()},
                           {"modified_at", ""},
                           {"size", ""},
                           {"digest", ""},
                           {"type", "model"},
                           {"description", ""},
                           {"tags", Json::array()},
                           {"capabilities", capabilities},
                           {"parameters", ""},
                           {"details", details}}}},
                        {"object", "list"},
                        {"data",
                         {{{"id", m.id()},
                           {"aliases", m.aliases},
                           {"tags", Json::array()},
                           {"object", "model"},
                           {"created", m.created},
                           {"owned_by", "caravan"},
                           {"meta", meta}}}}});
}

std::string token_text(const vocab::Vocabulary& vocabulary, std::optional<vocab::TokenId> token) {
  return token ? std::string(vocabulary.text(*token)) : std::string();
}

http::Response props(const Api& api) {
  const engine::EngineStatus status = api.engine.status();
  engine::GenerateParams defaults;
  defaults.n_predict = api.settings.n_predict;
  defaults.sampling = api.settings.sampling;
  constexpr uint32_t kRandomSeed = 0xFFFFFFFF;
  Json stages = Json::array();
  if (status.plan)
    for (const engine::StageSummary& stage : status.plan->stages)
      stages.push_back({{"device", stage.device},
                        {"replica", stage.replica},
                        {"layers", {stage.layer_begin, stage.layer_end}},
                        {"weight_bytes", stage.weight_bytes},
                        {"kv_bytes", stage.kv_bytes},
                        {"scratch_bytes", stage.scratch_bytes}});
  return json_response(
      {{"default_generation_settings",
        {{"params", generation_settings(defaults, false, defaults.sampling.seed.value_or(kRandomSeed))},
         {"n_ctx", status.plan ? status.plan->n_ctx : 0}}},
       {"total_slots", status.slots_total},
       {"model_alias", api.model.id()},
       {"model_path", api.model.path},
       {"model_ftype", api.model.file_type},
       {"modalities", {{"vision", false}, {"video", false}, {"audio", false}}},
       {"endpoint_slots", api.settings.slots_endpoint},
       {"endpoint_props", api.settings.props_endpoint},
       {"endpoint_metrics", true},
       {"chat_template", chat_template_source(api.settings.chat, api.vocabulary)},
       {"bos_token", token_text(api.vocabulary, api.vocabulary.bos())},
       {"eos_token", token_text(api.vocabulary, api.vocabulary.eos())},
       {"build_info", build_info()},
       {"is_sleeping", false},
       {"ui", api.settings.web_page},
       {"cors_proxy_enabled", false},
       {"plan", {{"epoch", status.plan ? Json(status.plan->epoch) : Json(nullptr)}, {"stages", stages}}}});
}

// One metric in Prometheus' text format.
std::string metric(std::string_view type, std::string_view name, std::string_view help, double value) {
  return fmt::format("# HELP llamacpp:{0} {2}\n# TYPE llamacpp:{0} {1}\nllamacpp:{0} {3}\n", name, type, help, value);
}

std::string head(std::string_view type, std::string_view name, std::string_view help) {
  return fmt::format("# HELP llamacpp:{0} {2}\n# TYPE llamacpp:{0} {1}\n", name, type, help);
}

// Rows per backend that is connected.
std::string backend_metrics(const engine::PipelineStatus& pipeline) {
  std::string text;
  const auto rows = [&](std::string_view type, std::string_view name, std::string_view help, auto field) {
    text += head(type, name, help);
    for (const engine::PipelineStatus::Machine& machine : pipeline.machines)
      text += fmt::format("llamacpp:{}{{backend=\"{}\"}} {}\n", name, machine.name, field(machine));
  };
  rows("gauge", "backend_rtt_seconds", "Round trip of the latest heartbeat, behind what was being sent.",
       [](const auto& machine) { return machine.rtt_seconds; });
  rows("gauge", "backend_rtt_mean_seconds", "Running mean of round trips.",
       [](const auto& machine) { return machine.mean_rtt_seconds; });
  rows("counter", "backend_received_bytes_total", "Bytes that came from it, since it was connected.",
       [](const auto& machine) { return machine.received_bytes; });
  rows("counter", "backend_sent_bytes_total", "Bytes sent to it, since it was connected.",
       [](const auto& machine) { return machine.sent_bytes; });
  return text;
}

// What was lost since the start, and came back.
std::string recovery_metrics(const engine::RecoveryCounters& recovery) {
  std::string text =
      metric("counter", "replicas_lost_total", "Replicas of the model that ended with a lost or failed device.",
             static_cast<double>(recovery.replicas_lost)) +
      metric("counter", "recoveries_total", "Times that requests went on after that: elsewhere or under the next plan.",
             static_cast<double>(recovery.recoveries)) +
      metric("counter", "recovery_seconds_total", "Seconds without a plan before these.", recovery.seconds) +
      head("counter", "device_losses_total", "Replicas that ended with this device.");
  for (const auto& [device, n] : recovery.losses)
    text += fmt::format("llamacpp:device_losses_total{{device=\"{}\"}} {}\n", device, n);
  return text;
}

// Rows per stage of the plan in use.
std::string stage_metrics(const engine::EngineStatus& status, const engine::PipelineStatus& pipeline) {
  if (!status.plan) return "";
  std::string compute = head("counter", "stage_compute_seconds_total", "Seconds that a stage of the plan computed.");
  std::string batches = head("counter", "stage_batches_total", "Batches that it computed.");
  std::string queue = head("gauge", "stage_queue", "Batches that came to it and are not computed.");
  const bool knows_queues =
      pipeline.epoch == status.plan->epoch && pipeline.queues.size() == status.plan->stages.size();
  std::string kv = head("gauge", "stage_kv_cache_bytes", "KV cache that it holds.");
  std::string used =
      head("gauge", "stage_kv_cache_usage_ratio", "Used part of its replica's fullest cache group, 0 to 1.");
  std::string from = head("gauge", "stage_weights_bytes", "Weight bytes of its load, by where they came from.");
  for (size_t i = 0; i < status.plan->stages.size(); ++i) {
    const engine::StageSummary& stage = status.plan->stages[i];
    const std::string labels = fmt::format("stage=\"{}\",replica=\"{}\",device=\"{}\",layers=\"{}-{}\"", i,
                                           stage.replica, stage.device, stage.layer_begin, stage.layer_end);
    if (stage.counters) {
      compute += fmt::format("llamacpp:stage_compute_seconds_total{{{}}} {}\n", labels,
                             static_cast<double>(stage.counters->compute_us) * 1e-6);
      batches += fmt::format("llamacpp:stage_batches_total{{{}}} {}\n", labels, stage.counters->batches.load());
    }
    if (knows_queues) queue += fmt::format("llamacpp:stage_queue{{{}}} {}\n", labels, pipeline.queues[i]);
    kv += fmt::format("llamacpp:stage_kv_cache_bytes{{{}}} {}\n", labels, stage.kv_bytes);
    if (stage.replica < status.replica_kv_usage.size())
      used +=
          fmt::format("llamacpp:stage_kv_cache_usage_ratio{{{}}} {}\n", labels, status.replica_kv_usage[stage.replica]);
    for (const auto& [source, bytes] : stage.weights_from)
      from += fmt::format("llamacpp:stage_weights_bytes{{{},source=\"{}\"}} {}\n", labels, source, bytes);
  }
  return compute + batches + queue + kv + used + from;
}

http::Response metrics(const Api& api) {
  const engine::EngineStatus status = api.engine.status();
  const engine::PipelineStatus pipeline = api.engine.pipeline_status();
  const engine::EngineCounters& c = status.counters;
  const auto number = [](auto value) { return static_cast<double>(value); };
  const auto rate = [](double n, double seconds) { return seconds > 0 ? n / seconds : 0.0; };
  http::Response response;
  response.content_type = "text/plain; version=0.0.4";
  response.headers = {{"Process-Start-Time-Unix", std::to_string(api.model.created)}};
  response.body =
      metric("counter", "prompt_tokens_total", "Prompt tokens processed.", number(c.prompt_tokens)) +
      metric("counter", "prompt_tokens_cached_total", "Prompt tokens taken from the prefix cache.",
             number(c.cached_prompt_tokens)) +
      metric("counter", "prompt_seconds_total", "Seconds spent on prompts.", c.prompt_seconds) +
      metric("counter", "tokens_predicted_total", "Tokens generated.", number(c.predicted_tokens)) +
      metric("counter", "tokens_predicted_seconds_total", "Seconds spent on generation.", c.predicted_seconds) +
      metric("counter", "n_decode_total", "Batches computed.", number(c.batches)) +
      metric("counter", "n_tokens_max", "Longest sequence seen.", number(c.max_tokens)) +
      metric("counter", "requests_total", "Requests accepted.", number(c.requests)) +
      metric("counter", "requests_failed_total", "Requests that ended with an error.", number(c.failed)) +
      metric("counter", "requests_cancelled_total", "Requests whose client left.", number(c.cancelled)) +
      metric("counter", "preemptions_total", "Sequences put back for lack of KV blocks.", number(c.preemptions)) +
      metric("counter", "plans_lost_total", "Times that a lost backend left requests waiting for a new plan.",
             number(c.plans_lost)) +
      metric("counter", "tokens_recomputed_total", "Tokens computed again after preemptions and losses.",
             number(c.recomputed_tokens)) +
      metric("gauge", "prompt_tokens_seconds", "Prompt tokens per second.",
             rate(number(c.prompt_tokens), c.prompt_seconds)) +
      metric("gauge", "predicted_tokens_seconds", "Generated tokens per second.",
             rate(number(c.predicted_tokens), c.predicted_seconds)) +
      metric("gauge", "kv_cache_usage_ratio", "Used part of the fullest cache group, 0 to 1.", status.kv_usage_ratio) +
      metric("gauge", "requests_processing", "Requests being computed.", status.slots_busy) +
      metric("gauge", "requests_deferred", "Requests waiting.", status.queue_length) +
      metric("gauge", "n_busy_slots_per_decode", "Sequences per batch, on average.",
             rate(number(c.busy_slot_steps), number(c.batches))) +
      recovery_metrics(pipeline.recovery) + backend_metrics(pipeline) + stage_metrics(status, pipeline);
  return response;
}

using Page = http::Response (*)(const Api&);

net::awaitable<void> answer(http::Exchange& exchange, Page page, const Api& api) {
  http::Response response = page(api);
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_introspection_routes(http::Router& router, const Api& api, const std::string& prefix) {
  const std::pair<const char*, Page> kPages[] = {{"/health", health},  {"/v1/health", health}, {"/livez", livez},
                                                 {"/models", models},  {"/v1/models", models}, {"/props", props},
                                                 {"/metrics", metrics}};
  for (const auto& [path, page] : kPages)
    router.add("GET", prefix + path,
               [&api, page = page](http::Exchange& exchange) { return answer(exchange, page, api); });
}

}  // namespace caravan::server
