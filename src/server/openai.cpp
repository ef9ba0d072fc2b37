#include "server/openai.h"

#include <chrono>
#include <random>

namespace caravan::server {

std::string random_id(std::string_view prefix, size_t n) {
  constexpr std::string_view kCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
  std::random_device random;
  std::uniform_int_distribution<size_t> index(0, kCharacters.size() - 1);
  std::string id(prefix);
  for (size_t i = 0; i < n; ++i) id += kCharacters[index(random)];
  return id;
}

int64_t unix_time() {
  using std::chrono::system_clock;
  return std::chrono::duration_cast<std::chrono::seconds>(system_clock::now().time_since_epoch()).count();
}

std::string build_info() { return "b" CARAVAN_VERSION "-caravan"; }

const char* finish_reason(engine::StopType type) { return type == engine::StopType::limit ? "length" : "stop"; }

void Usage::add(const engine::FinalEvent& end, bool counts_prompt) {
  completion_tokens += end.timings.predicted_n;
  if (!counts_prompt) return;
  prompt_tokens += end.n_prompt_tokens;
  cached_tokens += end.timings.cache_n;
}

Json Usage::json() const {
  return {{"completion_tokens", completion_tokens},
          {"prompt_tokens", prompt_tokens},
          {"total_tokens", prompt_tokens + completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", cached_tokens}}}};
}

Usage usage_of(const std::vector<Answer>& answers, size_t n) {
  Usage usage;
  for (const Answer& answer : answers)
    if (answer.end) usage.add(*answer.end, answer.index % n == 0);
  return usage;
}

ResponseFrame::ResponseFrame(const Api& api, const char* object)
    : api_(api), object_(object), id_(random_id("chatcmpl-")), created_(unix_time()) {}

Json ResponseFrame::object(Json choices) const {
  return {{"choices", std::move(choices)},      {"created", created_}, {"model", api_.model.id()},
          {"system_fingerprint", build_info()}, {"object", object_},   {"id", id_}};
}

}  // namespace caravan::server
