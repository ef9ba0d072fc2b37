// Requests at random, what a stream answered, and what it must answer: for tests of the engine over a FakePipeline.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/fake_pipeline.h"
#include "engine/grammar.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"

namespace caravan::engine::test {

inline constexpr std::chrono::seconds kLong{60};  // only bounds a test that hangs

struct Answer {
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<StepProbabilities> probabilities;
  std::vector<std::string> pieces;
  std::vector<ProgressEvent> progress;
  std::vector<Timings> timings;  // of each piece
  std::optional<FinalEvent> final;
  std::optional<EmbeddingEvent> embedding;
  std::optional<ErrorEvent> error;
};

inline Answer collect(TokenStream& stream) {
  Answer answer;
  while (!stream.finished()) {
    std::optional<Event> event = stream.next(kLong);
    if (!event) {
      ADD_FAILURE() << "no event came";
      return answer;
    }
    if (auto* token = std::get_if<TokenEvent>(&*event)) {
      answer.text += token->text;
      EXPECT_FALSE(!answer.progress.empty() &&
                   answer.progress.back().n_computed < answer.progress.back().n_prompt_tokens)
          << "a token came before the prompt was done";
      answer.pieces.push_back(token->text);
      answer.timings.push_back(token->timings);
      answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
      answer.probabilities.insert(answer.probabilities.end(), token->probabilities.begin(), token->probabilities.end());
    }
    if (auto* progress = std::get_if<ProgressEvent>(&*event)) answer.progress.push_back(*progress);
    if (auto* final = std::get_if<FinalEvent>(&*event)) answer.final = *final;
    if (auto* embedding = std::get_if<EmbeddingEvent>(&*event)) answer.embedding = *embedding;
    if (auto* error = std::get_if<ErrorEvent>(&*event)) answer.error = *error;
  }
  return answer;
}

// What the request must give: the toy model over all tokens at every step, all logits, no engine.
inline std::vector<int32_t> expected_tokens(const PlanSummary& plan, const GenerateParams& params,
                                            const vocab::Vocabulary& vocabulary) {
  const ToyModel model(plan.groups, plan.n_vocab, plan.n_embd);
  const auto& eog = vocabulary.end_of_generation_tokens();
  Sampler sampler(params.sampling, params.sampling.seed.value_or(0),
                  params.sampling.ignore_eos ? eog : std::vector<int32_t>{}, plan.n_vocab, &vocabulary);
  if (params.grammar) sampler.constrain(GrammarCompiler(vocabulary).compile(*params.grammar));
  std::vector<int32_t> tokens = params.prompt;
  std::vector<int32_t> answer;
  while (tokens.size() < effective_context(plan) &&
         (params.n_predict < 0 || answer.size() < static_cast<size_t>(params.n_predict))) {
    const stage::RowOutput row{0, stage::OutputKind::logits, model.logits(model.states(tokens).back()), {}, 0};
    const Sampler::Choice choice = sampler.sample(row, tokens);
    if (choice.kind == Sampler::Choice::Kind::end || vocabulary.is_end_of_generation(choice.token)) break;
    tokens.push_back(choice.token);
    answer.push_back(choice.token);
  }
  return answer;
}

inline GenerateParams greedy(std::vector<int32_t> prompt, int32_t n_predict) {
  GenerateParams params;
  params.prompt = std::move(prompt);
  params.n_predict = n_predict;
  params.sampling.temperature = 0;
  params.sampling.seed = 1;
  return params;
}

inline std::vector<int32_t> random_tokens(std::mt19937& random, size_t n) {
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % kVocabularySize);
  return tokens;
}

inline GenerateParams random_request(std::mt19937& random) {
  GenerateParams params = greedy(random_tokens(random, 1 + random() % 30), static_cast<int32_t>(random() % 25));
  SamplingParams& sampling = params.sampling;
  sampling.temperature = random() % 3 == 0 ? 0.0f : 0.9f;
  sampling.top_k = random() % 3 == 0 ? 0 : 1 + static_cast<int32_t>(random() % 50);
  sampling.repeat_penalty = random() % 2 ? 1.3f : 1.0f;
  sampling.frequency_penalty = random() % 2 ? 0.5f : 0.0f;
  sampling.ignore_eos = random() % 2 == 0;
  sampling.seed = random();
  sampling.dry_multiplier = random() % 3 == 0 ? 0.8f : 0.0f;
  sampling.xtc_probability = random() % 3 == 0 ? 0.5f : 0.0f;
  sampling.mirostat = random() % 3 == 0 ? 2 : 0;
  if (random() % 3 == 0) {
    sampling.samplers.emplace_back("adaptive_p");
    sampling.adaptive_target = 0.3f;
  }
  // A hash does not follow a grammar: nearly every token is drawn twice, and few candidates are allowed.
  const char* const grammars[] = {"root ::= (\"ab\" | \"b\")*", "root ::= \"a\"{3,30}", "root ::= [^a]+ \"a\" root?",
                                  "root ::= item (\", \" item)*\nitem ::= [0-9]+ | \"(\" root \")\""};
  if (random() % 3 == 0) params.grammar = GrammarSpec{.text = grammars[random() % 4]};
  if (random() % 6 == 0) {
    params.grammar = GrammarSpec{.text = "root ::= \"a\" [b-e]*", .lazy = true};
    params.grammar->triggers = {{.text = "a"}, {.kind = GrammarTrigger::Kind::token, .token = kPieceAB}};
  }
  return params;
}

}  // namespace caravan::engine::test
