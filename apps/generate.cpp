#include "generate.h"

#include <fmt/format.h>

#include <chrono>
#include <optional>

#include "interrupts.h"

namespace caravan::app {
namespace {

Answer::End end_of(engine::StopType type) {
  switch (type) {
    case engine::StopType::eos:
      return Answer::End::eos;
    case engine::StopType::limit:
      return Answer::End::limit;
    case engine::StopType::word:
      break;
  }
  return Answer::End::word;
}

}  // namespace

Answer generate(engine::Engine& engine, engine::GenerateParams params,
                const std::function<void(std::string_view text)>& on_text) {
  using Clock = std::chrono::steady_clock;
  const auto ms = [](Clock::duration time) { return std::chrono::duration<double, std::milli>(time).count(); };
  Answer answer;
  answer.n_prompt_tokens = static_cast<uint32_t>(params.prompt.size());
  const int interrupts_before = interrupt_count();
  const auto start = Clock::now();
  std::optional<Clock::time_point> first_token;
  const auto stream = engine.submit(std::move(params));
  while (!stream->finished()) {
    constexpr auto kInterruptCheck = std::chrono::milliseconds(50);
    const auto event = stream->next(kInterruptCheck);
    if (interrupt_count() != interrupts_before) {
      stream->cancel();
      const auto now = Clock::now();
      answer.timings.predicted_n = static_cast<uint32_t>(answer.tokens.size());
      answer.timings.prompt_ms = ms(first_token.value_or(now) - start);
      answer.timings.predicted_ms = first_token ? ms(now - *first_token) : 0;
      answer.end = Answer::End::interrupted;
      break;
    }
    if (!event) continue;
    if (const auto* token = std::get_if<engine::TokenEvent>(&*event)) {
      if (!first_token) first_token = Clock::now();
      answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
      on_text(token->text);
    } else if (const auto* end = std::get_if<engine::FinalEvent>(&*event)) {
      answer.timings = end->timings;
      answer.end = end_of(end->stop_type);
    } else if (const auto* error = std::get_if<engine::ErrorEvent>(&*event)) {
      throw RequestError(error->message, error->kind);
    }
  }
  return answer;
}

std::string describe(const engine::Timings& t) {
  const auto rate = [](double n, double ms) { return ms > 0 ? n * 1000 / ms : 0.0; };
  // The first token comes with the prompt: the time between tokens counts from it.
  const double steps = t.predicted_n > 0 ? t.predicted_n - 1 : 0;
  return fmt::format("[ prompt: {} tokens, {:.1f} tokens/s | generation: {} tokens, {:.1f} tokens/s ]", t.prompt_n,
                     rate(t.prompt_n, t.prompt_ms), t.predicted_n, rate(steps, t.predicted_ms));
}

}  // namespace caravan::app
