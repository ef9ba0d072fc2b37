// POST /infill: what belongs between a prefix and a suffix, for models trained to fill in the middle (FIM).
// Layout of the prompt: Bavarian et al. 2022, arXiv:2207.14255 (prefix, suffix, middle); other files as repository
// context before it, as in Hui et al. 2024, arXiv:2409.12186.
#include <fmt/format.h>

#include <algorithm>

#include "server/api.h"
#include "server/completion.h"
#include "server/generation.h"
#include "server/json.h"
#include "server/params.h"

namespace caravan::server {
namespace {

using vocab::AddSpecial, vocab::ParseSpecial;

std::string required_text(const Json& object, const char* field, const char* whole_name) {
  const auto text = find_text(object, field);
  if (!text) throw RequestError(fmt::format("Field '{}': missing; expected a string", whole_name));
  return *text;
}

void append(Prompt& tokens, const Prompt& more) { tokens.insert(tokens.end(), more.begin(), more.end()); }

// A model without these cannot fill in.
struct FimTokens {
  int32_t prefix, suffix, middle;
};

FimTokens require_fim_tokens(const vocab::Vocabulary& vocabulary) {
  std::string missing;
  if (!vocabulary.fim_pre()) missing += " prefix";
  if (!vocabulary.fim_suf()) missing += " suffix";
  if (!vocabulary.fim_mid()) missing += " middle";
  if (!missing.empty())
    throw RequestError(
        fmt::format("this model cannot fill in the middle: its vocabulary lacks the tokens for:{}", missing),
        RequestError::Kind::not_supported);
  return {*vocabulary.fim_pre(), *vocabulary.fim_suf(), *vocabulary.fim_mid()};
}

// Other files for context, from "input_extra".
Prompt extra_context(const Json& body, const vocab::Vocabulary& vocabulary) {
  const auto plain = [&](std::string_view text) { return vocabulary.tokenize(text, AddSpecial::no, ParseSpecial::no); };
  Prompt tokens;
  if (vocabulary.fim_rep()) {
    tokens.push_back(*vocabulary.fim_rep());
    append(tokens, plain("myproject\n"));
  }
  if (const Json* extra = find_field(body, "input_extra")) {
    if (!extra->is_array()) throw RequestError("Field 'input_extra': expected an array of {filename, text}");
    for (const Json& file : *extra) {
      if (!file.is_object()) throw RequestError("Field 'input_extra': expected an array of {filename, text}");
      const std::string text = required_text(file, "text", "input_extra/text");
      const std::string name = find_text(file, "filename").value_or("tmp");
      if (vocabulary.fim_sep()) {
        tokens.push_back(*vocabulary.fim_sep());
        append(tokens, plain(name + "\n"));
      } else {
        append(tokens, plain("\n\n--- snippet ---\n\n"));
      }
      append(tokens, plain(text));
    }
  }
  if (vocabulary.fim_sep()) {
    tokens.push_back(*vocabulary.fim_sep());
    append(tokens, plain("filename\n"));
  }
  return tokens;
}

// Three quarters of a batch for the end of the prefix, one for the beginning of the suffix, and what the context leaves
// for the end of the other files.
Prompt infill_prompt(const Json& body, int32_t n_predict, const Api& api) {
  const vocab::Vocabulary& vocabulary = api.vocabulary;
  const FimTokens fim = require_fim_tokens(vocabulary);
  const auto plain = [&](std::string_view text) { return vocabulary.tokenize(text, AddSpecial::no, ParseSpecial::no); };
  const Prompt prefix = plain(required_text(body, "input_prefix", "input_prefix"));
  const Prompt suffix = plain(required_text(body, "input_suffix", "input_suffix"));
  const Prompt prompt = vocabulary.tokenize(find_text(body, "prompt").value_or(""), AddSpecial::no, ParseSpecial::yes);
  const Prompt extra = extra_context(body, vocabulary);

  const engine::EngineStatus status = api.engine.status();
  const int64_t n_ctx = status.plan ? status.plan->n_ctx : 0;
  const int64_t n_batch = std::min<int64_t>(api.settings.n_batch, n_ctx);
  const auto clamp = [](int64_t wanted, const Prompt& tokens) {
    return std::min<int64_t>(std::max<int64_t>(0, wanted), static_cast<int64_t>(tokens.size()));
  };
  const int64_t n_prefix = clamp(3 * (n_batch / 4), prefix);
  const int64_t n_suffix = clamp(n_batch / 4 - (2 + static_cast<int64_t>(prompt.size())), suffix);
  const int64_t n_extra = clamp(n_ctx - n_batch - 2 * int64_t{n_predict}, extra);

  Prompt before{fim.prefix}, after{fim.suffix};
  before.insert(before.end(), prefix.end() - n_prefix, prefix.end());
  append(before, prompt);
  after.insert(after.end(), suffix.begin(), suffix.begin() + n_suffix);
  if (api.settings.spm_infill) std::swap(before, after);

  Prompt tokens(extra.end() - n_extra, extra.end());
  if (vocabulary.adds_bos() && vocabulary.bos()) tokens.push_back(*vocabulary.bos());
  append(tokens, before);
  append(tokens, after);
  tokens.push_back(fim.middle);
  return tokens;
}

net::awaitable<void> post_infill(http::Exchange& exchange, const Api& api) {
  require_generation(api);
  const Json body = parse_object(exchange.request().body);
  const CompletionParams params = parse_completion(body, api);
  std::vector<Prompt> prompts;
  prompts.push_back(infill_prompt(body, params.generate.n_predict, api));
  co_await complete(exchange, api, params, std::move(prompts));
}

}  // namespace

void add_infill_routes(http::Router& router, const Api& api, const std::string& prefix) {
  router.add("POST", prefix + "/infill", [&api](http::Exchange& exchange) { return post_infill(exchange, api); });
}

}  // namespace caravan::server
