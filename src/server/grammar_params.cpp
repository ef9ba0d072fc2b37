#include "server/grammar_params.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "engine/json_schema.h"

namespace caravan::server {
namespace {

using engine::GrammarSpec;
using engine::GrammarTrigger;

// By the numbers of llama-server's API.
constexpr std::array<std::pair<const char*, GrammarTrigger::Kind>, 4> kTriggerTypes = {
    {{"token", GrammarTrigger::Kind::token},
     {"word", GrammarTrigger::Kind::word},
     {"pattern", GrammarTrigger::Kind::pattern},
     {"pattern_full", GrammarTrigger::Kind::pattern_full}}};

GrammarSpec spec_for(const Json& schema, const char* field) {
  try {
    return {.text = engine::grammar_for_schema(schema)};
  } catch (const RequestError& error) {
    throw RequestError(fmt::format("Field '{}': {}", field, error.what()));
  }
}

// {"type": "text" | "json_object" | "json_schema", ...}; nullopt: any text.
std::optional<GrammarSpec> parse_response_format(const Json& format) {
  if (format.is_object() && format.empty()) return std::nullopt;
  const auto type = format.is_object() ? find_text(format, "type") : std::nullopt;
  if (!type) throw RequestError("Field 'response_format': expected an object with a type");
  if (*type == "text") return std::nullopt;
  if (*type == "json_object") {
    const Json* schema = find_field(format, "schema");
    return spec_for(schema != nullptr ? *schema : Json{{"type", "object"}}, "response_format");
  }
  if (*type != "json_schema")
    throw RequestError(
        fmt::format("Field 'response_format': type must be text, json_object or json_schema, found '{}'", *type));
  const Json* holder = find_field(format, "json_schema");
  const Json* schema = holder != nullptr && holder->is_object() ? find_field(*holder, "schema") : nullptr;
  if (schema == nullptr) throw RequestError("Field 'response_format': json_schema must be an object with a schema");
  return spec_for(*schema, "response_format");
}

// The control token that the text is, if it is exactly one.
std::optional<int32_t> control_token(const std::string& text, const vocab::Vocabulary& vocabulary) {
  if (!vocabulary.has_text()) return std::nullopt;
  const auto tokens = vocabulary.tokenize(text, vocab::AddSpecial::no, vocab::ParseSpecial::yes);
  if (tokens.size() != 1 || vocabulary.type(tokens[0]) != vocab::TokenType::control) return std::nullopt;
  return tokens[0];
}

GrammarTrigger parse_trigger(const Json& value, const vocab::Vocabulary& vocabulary) {
  if (!value.is_object()) throw RequestError("Field 'grammar_triggers': expected an array of objects");
  const Json* type = find_field(value, "type");
  GrammarTrigger trigger;
  const auto known = std::find_if(kTriggerTypes.begin(), kTriggerTypes.end(), [&](const auto& row) {
    const auto number = &row - kTriggerTypes.data();
    return type != nullptr && (*type == row.first || (type->is_number_integer() && *type == number));
  });
  if (known == kTriggerTypes.end())
    throw RequestError("Field 'grammar_triggers': type must be 0 or token, 1 or word, 2 or pattern, 3 or pattern_full");
  trigger.kind = known->second;
  trigger.text = find_text(value, "value").value_or("");
  if (trigger.kind == GrammarTrigger::Kind::token) {
    const auto token = find_integer(value, "token");
    if (!token || *token < 0 || static_cast<uint64_t>(*token) >= vocabulary.size())
      throw RequestError(fmt::format("Field 'grammar_triggers': token must be a token id below {}", vocabulary.size()));
    trigger.token = static_cast<int32_t>(*token);
  } else if (trigger.kind == GrammarTrigger::Kind::word) {
    // A control token has no text in the answer; its text can only mean the token.
    if (const auto token = control_token(trigger.text, vocabulary)) {
      trigger.kind = GrammarTrigger::Kind::token;
      trigger.token = *token;
    }
  }
  return trigger;
}

void parse_lazy_fields(GrammarSpec& spec, const Json& body, const vocab::Vocabulary& vocabulary) {
  spec.lazy = find_bool(body, "grammar_lazy").value_or(false);
  if (const Json* triggers = find_field(body, "grammar_triggers")) {
    if (!triggers->is_array()) throw RequestError("Field 'grammar_triggers': expected an array of objects");
    if (spec.lazy)
      for (const Json& value : *triggers) spec.triggers.push_back(parse_trigger(value, vocabulary));
    if (!spec.lazy && !triggers->empty())
      throw RequestError("Field 'grammar_triggers': only a lazy grammar (grammar_lazy) has triggers");
  }
  if (const Json* preserved = find_field(body, "preserved_tokens")) {
    if (!preserved->is_array()) throw RequestError("Field 'preserved_tokens': expected an array of strings");
    for (const Json& text : *preserved) {
      if (!text.is_string()) throw RequestError("Field 'preserved_tokens': expected an array of strings");
      if (const auto token = control_token(text.get<std::string>(), vocabulary)) spec.special_tokens.push_back(*token);
    }
  }
}

}  // namespace

std::optional<GrammarSpec> parse_grammar(const Json& body, const vocab::Vocabulary& vocabulary,
                                         const std::optional<GrammarSpec>& fallback, GrammarRules rules) {
  const std::optional<std::string> text = find_text(body, "grammar");
  const Json* schema = find_field(body, "json_schema");
  const Json* format = find_field(body, "response_format");
  const bool has_text = text && !text->empty();
  std::optional<GrammarSpec> from_format;
  if (format != nullptr) from_format = parse_response_format(*format);
  if (rules == GrammarRules::exclusive && has_text && (schema != nullptr || from_format))
    throw RequestError("Field 'grammar': it cannot be combined with json_schema or response_format");
  std::optional<GrammarSpec> spec;
  if (has_text) {
    spec = GrammarSpec{.text = *text};
  } else if (from_format) {
    spec = std::move(from_format);
  } else if (schema != nullptr) {
    spec = spec_for(*schema, "json_schema");
  }
  const bool from_request = spec.has_value();
  if (!spec && !text && format == nullptr) spec = fallback;
  if (!spec && find_bool(body, "grammar_lazy").value_or(false))
    throw RequestError("Field 'grammar_lazy': there is no grammar");
  if (from_request) parse_lazy_fields(*spec, body, vocabulary);
  return spec;
}

Json trigger_json(const GrammarTrigger& trigger) {
  const auto row = std::find_if(kTriggerTypes.begin(), kTriggerTypes.end(),
                                [&](const auto& entry) { return entry.second == trigger.kind; });
  Json json = {{"type", row - kTriggerTypes.begin()}, {"value", trigger.text}};
  if (trigger.kind == GrammarTrigger::Kind::token) json["token"] = trigger.token;
  return json;
}

}  // namespace caravan::server
