// GET /slots, and POST /slots/{id}?action=save|restore|erase.
#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <filesystem>

#include "base/file.h"
#include "server/api.h"
#include "server/json.h"
#include "server/params.h"
#include "server/slot_file.h"
#include "server/stream_reader.h"

namespace caravan::server {
namespace {

using Kind = RequestError::Kind;
using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Without the texts and lists that may be long, and without what only the HTTP side of a request knows.
Json short_settings(const engine::SlotStatus::Task& task) {
  Json settings = generation_settings(*task.params, false, task.seed);
  for (const char* name :
       {"stop", "dry_sequence_breakers", "logit_bias", "grammar", "grammar_triggers", "preserved_tokens", "stream"})
    settings.erase(name);
  return settings;
}

Json slot_json(const engine::SlotStatus& slot, uint32_t n_ctx) {
  Json json = {{"id", slot.id}, {"n_ctx", n_ctx}, {"speculative", false}, {"is_processing", slot.processing}};
  if (!slot.task) return json;
  const engine::SlotStatus::Task& task = *slot.task;
  const int32_t n_predict = task.params->n_predict;
  json["id_task"] = task.id;
  json["n_prompt_tokens"] = task.n_prompt;
  json["n_prompt_tokens_processed"] = task.n_prompt_computed;
  json["n_prompt_tokens_cache"] = task.n_cached;
  json["params"] = short_settings(task);
  const Json next = {{"has_next_token", slot.processing},
                     {"has_new_line", task.has_new_line},
                     {"n_remain", n_predict < 0 ? -1 : n_predict - static_cast<int64_t>(task.n_predicted)},
                     {"n_decoded", task.n_predicted}};
  json["next_token"] = Json::array({next});
  return json;
}

net::awaitable<void> get_slots(http::Exchange& exchange, const Api& api) {
  if (!api.settings.slots_endpoint)
    throw RequestError("this server was started with --no-slots: /slots is not there", Kind::not_supported);
  const std::vector<engine::SlotStatus> slots = api.engine.slots();
  const auto& query = exchange.request().query;
  if (const auto flag = query.find("fail_on_no_slot"); flag != query.end() && flag->second == "1") {
    const bool idle = std::any_of(slots.begin(), slots.end(), [](const auto& slot) { return !slot.processing; });
    if (!idle) throw RequestError("no slot available", Kind::unavailable);
  }
  const engine::EngineStatus status = api.engine.status();
  Json list = Json::array();
  for (const engine::SlotStatus& slot : slots) list.push_back(slot_json(slot, status.plan ? status.plan->n_ctx : 0));
  http::Response response = json_response(list);
  co_await exchange.send(std::move(response));
}

uint32_t slot_of_path(const std::string& path) {
  const std::string_view last = std::string_view(path).substr(path.rfind('/') + 1);
  uint32_t id = 0;
  const auto [end, error] = std::from_chars(last.data(), last.data() + last.size(), id);
  if (error != std::errc() || end != last.data() + last.size())
    throw RequestError(fmt::format("expected the number of a slot, found '{}'", last));
  return id;
}

// A plain name in the folder of --slot-save-path.
std::string file_name(const http::Request& request) {
  const Json body = parse_object(request.body);
  const auto name = find_text(body, "filename");
  if (!name) throw RequestError("Field 'filename': missing; expected a string");
  const bool plain = !name->empty() && name->size() <= 255 && *name != "." && name->find("..") == std::string::npos &&
                     name->find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!plain) throw RequestError("Field 'filename': Value must be a file name without separators and without '..'");
  return *name;
}

SlotFileModel file_model(const Api& api) { return {api.model.n_vocab, api.model.n_params, api.model.size_bytes}; }

Json save(const Api& api, uint32_t id, const std::string& name) {
  const auto start = Clock::now();
  const std::vector<int32_t> tokens = api.engine.slot_tokens(id);
  const std::vector<std::byte> bytes = encode_slot_file(file_model(api), tokens);
  try {
    write_file_atomically(std::filesystem::path(*api.settings.slot_save_path) / name, bytes);
  } catch (const SystemError& error) {
    throw RequestError(fmt::format("the slot cannot be saved: {}", error.what()));
  }
  return {{"id_slot", id},
          {"filename", name},
          {"n_saved", tokens.size()},
          {"n_written", bytes.size()},
          {"timings", {{"save_ms", milliseconds_since(start)}}}};
}

struct SlotFile {
  std::vector<int32_t> tokens;
  size_t n_bytes = 0;
};

SlotFile load(const Api& api, const std::string& name) {
  const std::filesystem::path path = std::filesystem::path(*api.settings.slot_save_path) / name;
  try {
    const std::vector<std::byte> bytes = read_file(path);
    return {decode_slot_file(bytes, file_model(api), name), bytes.size()};
  } catch (const SystemError& error) {
    throw RequestError(fmt::format("the slot cannot be restored: {}", error.what()));
  } catch (const FormatError& error) {
    throw RequestError(fmt::format("the slot cannot be restored: {}", error.what()));
  }
}

// Computes the saved tokens in the slot, so that what they begin is found in the cache.
net::awaitable<void> restore(http::Exchange& exchange, const Api& api, uint32_t id, std::string name) {
  const auto start = Clock::now();
  SlotFile file = load(api, name);
  const size_t n_tokens = file.tokens.size();
  api.engine.slot_tokens(id);  // throws when there is no such slot, or when it is busy
  if (n_tokens > 0) {
    engine::GenerateParams params;
    params.prompt = std::move(file.tokens);
    params.n_predict = 0;
    params.slot = id;
    std::vector<std::shared_ptr<engine::TokenStream>> streams;
    streams.push_back(api.engine.submit(std::move(params)));
    StreamReader reader(exchange, std::move(streams));
    while (!reader.finished()) {
      const auto item = co_await reader.next(kPingInterval);
      if (!item) continue;
      if (const auto* error = std::get_if<engine::ErrorEvent>(&item->event))
        throw RequestError(error->message, error->kind);
    }
  }
  http::Response response = json_response({{"id_slot", id},
                                           {"filename", name},
                                           {"n_restored", n_tokens},
                                           {"n_read", file.n_bytes},
                                           {"timings", {{"restore_ms", milliseconds_since(start)}}}});
  co_await exchange.send(std::move(response));
}

net::awaitable<void> post_slot(http::Exchange& exchange, const Api& api) {
  const http::Request& request = exchange.request();
  if (!api.settings.slot_save_path)
    throw RequestError("slots are not kept in files: start the server with --slot-save-path", Kind::not_supported);
  const uint32_t id = slot_of_path(request.path);
  const auto action = request.query.find("action");
  const std::string what = action == request.query.end() ? "" : action->second;
  if (what != "save" && what != "restore" && what != "erase")
    throw RequestError(fmt::format("expected action=save, restore or erase, found '{}'", what));
  if (what == "restore") {
    std::string name = file_name(request);
    co_await restore(exchange, api, id, std::move(name));
    co_return;
  }
  Json answer;
  if (what == "save") {
    const std::string name = file_name(request);
    answer = save(api, id, name);
  } else {
    answer = {{"id_slot", id}, {"n_erased", api.engine.erase_slot(id)}};
  }
  http::Response response = json_response(answer);
  co_await exchange.send(std::move(response));
}

}  // namespace

void add_slot_routes(http::Router& router, const Api& api, const std::string& prefix) {
  router.add("GET", prefix + "/slots", [&api](http::Exchange& exchange) { return get_slots(exchange, api); });
  router.add("POST", prefix + "/slots/{id}", [&api](http::Exchange& exchange) { return post_slot(exchange, api); });
}

}  // namespace caravan::server
