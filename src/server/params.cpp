#include "server/params.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>

#include "server/grammar_params.h"

namespace caravan::server {
namespace {

using Kind = RequestError::Kind;

// A field that this version knows but does not act on; fine while it has the value that turns it off.
struct UnsupportedField {
  const char* name;
  std::function<bool(const Json&)> is_off;
};

bool is_zero(const Json& v) { return v.is_number() && v.get<double>() == 0; }
bool is_empty(const Json& v) { return v.empty() || (v.is_string() && v.get_ref<const std::string&>().empty()); }
bool is_false(const Json& v) { return v.is_boolean() && !v.get<bool>(); }

const std::vector<UnsupportedField>& unsupported_fields() {
  static const std::vector<UnsupportedField> fields = {
      {"lora", is_empty}, {"n_cache_reuse", is_zero}, {"backend_sampling", is_false},
      {"echo", is_false}, {"verbose", is_false},
  };
  return fields;
}

void refuse_unsupported(const Json& body) {
  for (const UnsupportedField& field : unsupported_fields())
    if (const Json* value = find_field(body, field.name); value != nullptr && !field.is_off(*value))
      throw RequestError(fmt::format("Field '{}': not supported by this version", field.name), Kind::not_supported);
}

float number_within(const Json& body, const char* field, float current, double least, double most, const char* range) {
  const auto value = find_number(body, field);
  if (!value) return current;
  if (!(*value >= least && *value <= most))
    throw RequestError(fmt::format("Field '{}': Value must be {}", field, range));
  return static_cast<float>(*value);
}

float any_number(const Json& body, const char* field, float current) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return number_within(body, field, current, -kMost, kMost, "a number of single precision");
}

int32_t integer_within(const Json& body, const char* field, int32_t current, int64_t least, const char* range) {
  const auto value = find_integer(body, field);
  if (!value) return current;
  if (*value < least || *value > std::numeric_limits<int32_t>::max())
    throw RequestError(fmt::format("Field '{}': Value must be {}", field, range));
  return static_cast<int32_t>(*value);
}

int32_t checked_token(int64_t id, const char* field, const vocab::Vocabulary& vocabulary) {
  if (id < 0 || static_cast<uint64_t>(id) >= vocabulary.size())
    throw RequestError(fmt::format("Field '{}': token id {} is not in [0, {})", field, id, vocabulary.size()));
  return static_cast<int32_t>(id);
}

// The tokens that a key of logit_bias means: an id, or the tokens of a text.
std::vector<int32_t> biased_tokens(const Json& key, const vocab::Vocabulary& vocabulary) {
  if (key.is_number_integer()) return {checked_token(key.get<int64_t>(), "logit_bias", vocabulary)};
  if (!key.is_string()) throw RequestError("Field 'logit_bias': each entry starts with a token id or a string");
  const auto& text = key.get_ref<const std::string&>();
  return vocabulary.tokenize(text, vocab::AddSpecial::no, vocab::ParseSpecial::no);
}

float bias_value(const Json& value) {
  if (value.is_boolean() && !value.get<bool>()) return -std::numeric_limits<float>::infinity();
  if (!value.is_number()) throw RequestError("Field 'logit_bias': a bias is a number or false");
  const auto bias = value.get<double>();
  if (std::abs(bias) > std::numeric_limits<float>::max())
    throw RequestError("Field 'logit_bias': Value must be a number of single precision, or false");
  return static_cast<float>(bias);
}

std::vector<engine::LogitBias> parse_logit_bias(const Json& value, const vocab::Vocabulary& vocabulary) {
  std::vector<engine::LogitBias> biases;
  const auto add = [&](const Json& key, const Json& bias) {
    for (const int32_t token : biased_tokens(key, vocabulary)) biases.push_back({token, bias_value(bias)});
  };
  if (value.is_array()) {
    for (const Json& entry : value) {
      if (!entry.is_array() || entry.size() != 2) throw RequestError("Field 'logit_bias': each entry is [token, bias]");
      add(entry[0], entry[1]);
    }
  } else if (value.is_object()) {
    for (const auto& [key, bias] : value.items()) {
      int64_t id = 0;
      const auto parsed = std::from_chars(key.data(), key.data() + key.size(), id);
      const bool is_number = parsed.ec == std::errc() && parsed.ptr == key.data() + key.size();
      add(is_number ? Json(id) : Json(key), bias);
    }
  } else {
    throw RequestError("Field 'logit_bias': expected an array of [token, bias] or an object");
  }
  return biases;
}

std::vector<std::string> text_list(const Json& value, const char* field) {
  if (value.is_string()) return {value.get<std::string>()};
  std::vector<std::string> list;
  if (!value.is_array()) throw RequestError(fmt::format("Field '{}': expected an array of strings", field));
  for (const Json& entry : value) {
    if (!entry.is_string()) throw RequestError(fmt::format("Field '{}': expected an array of strings", field));
    list.push_back(entry.get<std::string>());
  }
  return list;
}

// Sampler names, or one character for each.
std::vector<std::string> parse_samplers(const Json& value) {
  if (value.is_string()) return engine::sampler_names(value.get_ref<const std::string&>());
  if (!value.is_array()) throw RequestError("Field 'samplers': expected an array of names or a string of characters");
  std::vector<std::string> names = text_list(value, "samplers");
  for (std::string& name : names) name = engine::sampler_name(name);
  return names;
}

std::vector<std::string> parse_breakers(const Json& value) {
  if (!value.is_array() || value.empty())
    throw RequestError("Field 'dry_sequence_breakers': expected an array of at least one string");
  return text_list(value, "dry_sequence_breakers");
}

void parse_less_common_sampling(const Json& body, engine::SamplingParams& p) {
  const auto number = [&](const char* field, float& target) { target = any_number(body, field, target); };
  number("typical_p", p.typical_p);
  number("top_n_sigma", p.top_n_sigma);
  number("xtc_probability", p.xtc_probability);
  number("xtc_threshold", p.xtc_threshold);
  number("dynatemp_range", p.dynatemp_range);
  number("dynatemp_exponent", p.dynatemp_exponent);
  number("dry_multiplier", p.dry_multiplier);
  number("dry_base", p.dry_base);
  if (p.dry_base < 1) p.dry_base = engine::SamplingParams().dry_base;  // as llama-server does
  p.dry_allowed_length = integer_within(body, "dry_allowed_length", p.dry_allowed_length, 0, ">= 0");
  p.dry_penalty_last_n = integer_within(body, "dry_penalty_last_n", p.dry_penalty_last_n, -1, ">= -1");
  if (const Json* value = find_field(body, "dry_sequence_breakers")) p.dry_sequence_breakers = parse_breakers(*value);
  p.mirostat = integer_within(body, "mirostat", p.mirostat, 0, "0, 1 or 2");
  number("mirostat_tau", p.mirostat_tau);
  number("mirostat_eta", p.mirostat_eta);
  number("adaptive_target", p.adaptive_target);
  number("adaptive_decay", p.adaptive_decay);
}

engine::SamplingParams parse_sampling(const Json& body, const Api& api) {
  constexpr double kAny = std::numeric_limits<float>::max();
  engine::SamplingParams p = api.settings.sampling;
  p.temperature = std::max(0.0f, any_number(body, "temperature", p.temperature));
  p.top_k = integer_within(body, "top_k", p.top_k, std::numeric_limits<int32_t>::min(), "an integer");
  p.top_p = any_number(body, "top_p", p.top_p);
  p.min_p = any_number(body, "min_p", p.min_p);
  p.min_keep = integer_within(body, "min_keep", p.min_keep, 0, ">= 0");
  p.repeat_penalty = number_within(body, "repeat_penalty", p.repeat_penalty, 1e-6, kAny, "> 0");
  p.repeat_last_n = integer_within(body, "repeat_last_n", p.repeat_last_n, -1, ">= -1");
  p.frequency_penalty = any_number(body, "frequency_penalty", p.frequency_penalty);
  p.presence_penalty = any_number(body, "presence_penalty", p.presence_penalty);
  p.n_probs = integer_within(body, find_field(body, "n_probs") ? "n_probs" : "logprobs", p.n_probs, 0, ">= 0");
  p.post_sampling_probs = find_bool(body, "post_sampling_probs").value_or(p.post_sampling_probs);
  parse_less_common_sampling(body, p);
  p.ignore_eos = find_bool(body, "ignore_eos").value_or(p.ignore_eos);
  if (const auto seed = find_integer(body, "seed")) {
    constexpr int64_t kRandom = std::numeric_limits<uint32_t>::max();  // -1 as 32 bits
    if (*seed < -1 || *seed > kRandom)
      throw RequestError(fmt::format("Field 'seed': Value must be -1 (a random one) or in [0, {}]", kRandom));
    p.seed.reset();
    if (*seed != -1 && *seed != kRandom) p.seed = static_cast<uint32_t>(*seed);
  }
  if (const Json* value = find_field(body, "logit_bias")) p.logit_bias = parse_logit_bias(*value, api.vocabulary);
  if (const Json* value = find_field(body, "samplers")) p.samplers = parse_samplers(*value);
  engine::validate(p, static_cast<uint32_t>(api.vocabulary.size()));
  return p;
}

Prompt parse_one_prompt(const Json& value, const char* field, const vocab::Vocabulary& vocabulary) {
  using vocab::AddSpecial, vocab::ParseSpecial;
  if (value.is_string())
    return vocabulary.tokenize(value.get_ref<const std::string&>(), AddSpecial::yes, ParseSpecial::yes);
  if (value.is_object()) {
    if (const Json* media = find_field(value, "multimodal_data"); media != nullptr && !media->empty())
      throw RequestError(
          fmt::format("Field '{}': multimodal_data needs a model with a projector; not supported", field),
          Kind::not_supported);
    const auto text = find_text(value, "prompt_string");
    if (!text) throw RequestError(fmt::format("Field '{}': a prompt object needs prompt_string", field));
    return vocabulary.tokenize(*text, AddSpecial::yes, ParseSpecial::yes);
  }
  if (!value.is_array())
    throw RequestError(fmt::format("Field '{}': expected a string or an array, found {}", field, value.type_name()));
  Prompt tokens;
  bool first = true;
  for (const Json& part : value) {
    if (part.is_number_integer()) {
      tokens.push_back(checked_token(part.get<int64_t>(), field, vocabulary));
    } else if (part.is_string()) {
      const auto more = vocabulary.tokenize(part.get_ref<const std::string&>(),
                                            first ? AddSpecial::yes : AddSpecial::no, ParseSpecial::yes);
      tokens.insert(tokens.end(), more.begin(), more.end());
    } else {
      throw RequestError(
          fmt::format("Field '{}': an array prompt holds token ids and strings, found {}", field, part.type_name()));
    }
    first = false;
  }
  return tokens;
}

}  // namespace

std::vector<Prompt> parse_prompts(const Json& value, const char* field, const vocab::Vocabulary& vocabulary) {
  bool several = false;
  if (value.is_array()) {
    const bool has_number = std::any_of(value.begin(), value.end(), [](const Json& v) { return v.is_number(); });
    const bool has_nested =
        std::any_of(value.begin(), value.end(), [](const Json& v) { return v.is_array() || v.is_object(); });
    several = has_nested || !has_number;
  }
  std::vector<Prompt> prompts;
  if (several) {
    for (const Json& entry : value) prompts.push_back(parse_one_prompt(entry, field, vocabulary));
  } else {
    prompts.push_back(parse_one_prompt(value, field, vocabulary));
  }
  if (prompts.empty()) throw RequestError(fmt::format("Field '{}': the array is empty", field));
  return prompts;
}

namespace {

// llama-server's n_cmpl, or OpenAI's n.
uint32_t parse_n(const Json& body) {
  const char* name = find_field(body, "n_cmpl") ? "n_cmpl" : "n";
  return static_cast<uint32_t>(integer_within(body, name, 1, 1, ">= 1"));
}

bool parse_include_usage(const Json& body) {
  const Json* options = find_field(body, "stream_options");
  if (options == nullptr) return false;
  if (!options->is_object()) throw RequestError("Field 'stream_options': expected an object");
  return find_bool(*options, "include_usage").value_or(false);
}

net::Duration parse_ping_interval(const Json& body) {
  constexpr int32_t kDefault = kPingInterval.count();
  const int32_t seconds = integer_within(body, "sse_ping_interval", kDefault, -1, "-1 (never) or a number of seconds");
  if (seconds == 0) throw RequestError("Field 'sse_ping_interval': Value must be -1 (never) or a number of seconds");
  return seconds < 0 ? std::chrono::hours(24 * 365) : std::chrono::seconds(seconds);
}

}  // namespace

CompletionParams parse_completion(const Json& body, const Api& api) {
  refuse_unsupported(body);
  CompletionParams params;
  params.stream = find_bool(body, "stream").value_or(false);
  params.return_tokens = find_bool(body, "return_tokens").value_or(false);
  params.generate.cache_prompt = find_bool(body, "cache_prompt").value_or(api.settings.cache_prompt);
  params.timings_per_token = find_bool(body, "timings_per_token").value_or(false);
  params.include_usage = parse_include_usage(body);
  params.ping_interval = parse_ping_interval(body);
  params.n = parse_n(body);
  params.generate.report_progress = params.stream && find_bool(body, "return_progress").value_or(false);
  params.generate.n_indent = integer_within(body, "n_indent", 0, 0, ">= 0");
  params.generate.max_predict_ms = find_integer(body, "t_max_predict_ms").value_or(-1);
  const int32_t slot = integer_within(body, "id_slot", -1, -1, "-1 (any) or the number of a slot");
  if (slot >= 0) params.generate.slot = static_cast<uint32_t>(slot);
  params.generate.n_keep = integer_within(body, "n_keep", api.settings.n_keep, -1, ">= -1");
  params.generate.n_discard = integer_within(body, "n_discard", 0, 0, ">= 0");
  if (const Json* value = find_field(body, "response_fields"))
    params.response_fields = text_list(*value, "response_fields");

  int32_t n_predict = -1;
  for (const char* name : {"max_completion_tokens", "max_tokens", "n_predict"})
    n_predict = integer_within(body, name, n_predict, -1, ">= -1");
  if (api.settings.n_predict >= 0)
    n_predict = n_predict < 0 ? api.settings.n_predict : std::min(n_predict, api.settings.n_predict);
  params.generate.n_predict = n_predict;

  if (const Json* value = find_field(body, "stop")) params.generate.stop = text_list(*value, "stop");
  std::erase_if(params.generate.stop, [](const std::string& word) { return word.empty(); });
  params.generate.sampling = parse_sampling(body, api);
  params.generate.grammar = parse_grammar(body, api.vocabulary, api.settings.grammar);
  return params;
}

Json generation_settings(const engine::GenerateParams& params, bool stream, uint32_t seed) {
  const engine::SamplingParams& p = params.sampling;
  Json biases = Json::array();
  for (const engine::LogitBias& b : p.logit_bias)
    biases.push_back({{"bias", std::isfinite(b.bias) ? Json(b.bias) : Json(nullptr)}, {"token", b.token}});
  Json triggers = Json::array();
  if (params.grammar)
    for (const engine::GrammarTrigger& trigger : params.grammar->triggers) triggers.push_back(trigger_json(trigger));
  return {{"seed", seed},
          {"temperature", p.temperature},
          {"dynatemp_range", p.dynatemp_range},
          {"dynatemp_exponent", p.dynatemp_exponent},
          {"top_k", p.top_k},
          {"top_p", p.top_p},
          {"min_p", p.min_p},
          {"top_n_sigma", p.top_n_sigma},
          {"xtc_probability", p.xtc_probability},
          {"xtc_threshold", p.xtc_threshold},
          {"typical_p", p.typical_p},
          {"min_keep", p.min_keep},
          {"repeat_last_n", p.repeat_last_n},
          {"repeat_penalty", p.repeat_penalty},
          {"presence_penalty", p.presence_penalty},
          {"frequency_penalty", p.frequency_penalty},
          {"dry_multiplier", p.dry_multiplier},
          {"dry_base", p.dry_base},
          {"dry_allowed_length", p.dry_allowed_length},
          {"dry_penalty_last_n", p.dry_penalty_last_n},
          {"dry_sequence_breakers", p.dry_sequence_breakers},
          {"mirostat", p.mirostat},
          {"mirostat_tau", p.mirostat_tau},
          {"mirostat_eta", p.mirostat_eta},
          {"adaptive_target", p.adaptive_target},
          {"adaptive_decay", p.adaptive_decay},
          {"stop", params.stop},
          {"max_tokens", params.n_predict},
          {"n_predict", params.n_predict},
          {"n_keep", params.n_keep},
          {"n_discard", params.n_discard},
          {"ignore_eos", p.ignore_eos},
          {"stream", stream},
          {"logit_bias", biases},
          {"n_probs", p.n_probs},
          {"post_sampling_probs", p.post_sampling_probs},
          {"grammar", params.grammar ? params.grammar->text : ""},
          {"grammar_lazy", params.grammar && params.grammar->lazy},
          {"grammar_triggers", triggers},
          {"samplers", p.samplers}};
}

}  // namespace caravan::server
