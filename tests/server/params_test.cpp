// JSON fields -> parameters: defaults, overrides, ranges, what is refused and how.
#include "server/params.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "server/api_harness.h"

namespace caravan::server {
namespace {

using engine::LogitBias;
using engine::test::byte_token;
using engine::test::kPieceA;
using engine::test::kVocabularySize;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Kind = RequestError::Kind;

class Params : public test::ApiTest {
 protected:
  CompletionParams parse(const char* text) const { return parse_completion(parse_object(text), api_); }
  engine::SamplingParams sampling(const char* text) const { return parse(text).generate.sampling; }
  // The error that text gives; its kind is checked.
  std::string error_of(const std::string& text, Kind kind = Kind::invalid) const {
    try {
      parse_completion(parse_object(text), api_);
    } catch (const RequestError& error) {
      EXPECT_EQ(error.kind(), kind) << text << ": " << error.what();
      return error.what();
    }
    ADD_FAILURE() << text << " was accepted";
    return "";
  }
  std::vector<Prompt> prompts(const char* text) const {
    return parse_prompts(Json::parse(text), "prompt", *vocabulary_);
  }
  std::string prompt_error(const char* text, Kind kind = Kind::invalid) const {
    try {
      prompts(text);
    } catch (const RequestError& error) {
      EXPECT_EQ(error.kind(), kind);
      return error.what();
    }
    ADD_FAILURE() << text << " was accepted";
    return "";
  }
};

TEST_F(Params, HaveTheDefaultsOfLlamaServer) {
  const CompletionParams params = parse("{}");
  EXPECT_EQ(params.generate.sampling, engine::SamplingParams{});
  EXPECT_EQ(params.generate.n_predict, -1);
  EXPECT_THAT(params.generate.stop, IsEmpty());
  EXPECT_FALSE(params.stream || params.return_tokens);
  const engine::SamplingParams p = params.generate.sampling;
  EXPECT_EQ(std::tie(p.temperature, p.top_k, p.top_p, p.min_p, p.repeat_last_n),
            std::make_tuple(0.8f, 40, 0.95f, 0.05f, 64));
}

TEST_F(Params, HaveTheDefaultsOfTheCommandLine) {
  api_.settings.sampling.temperature = 0.25f;
  api_.settings.sampling.seed = 7;
  api_.settings.sampling.ignore_eos = true;
  EXPECT_EQ(sampling("{}"), api_.settings.sampling);
  EXPECT_EQ(sampling(R"({"temperature": null, "seed": null, "ignore_eos": null})"), api_.settings.sampling);
  const auto changed = sampling(R"({"temperature": 1, "seed": -1, "ignore_eos": false})");
  EXPECT_EQ(changed.temperature, 1);
  EXPECT_EQ(changed.seed, std::nullopt);
  EXPECT_FALSE(changed.ignore_eos);
}

TEST_F(Params, TakeEveryFieldFromTheRequest) {
  const CompletionParams params = parse(R"({
    "stream": true, "return_tokens": true, "n_predict": 12, "stop": ["x", "", "y"], "temperature": 0.5, "top_k": 3,
    "top_p": 0.5, "min_p": 0.25, "min_keep": 2, "repeat_penalty": 1.5, "repeat_last_n": -1, "frequency_penalty": -0.5,
    "presence_penalty": 0.5, "n_probs": 4, "ignore_eos": true, "seed": 42, "samplers": ["top_k", "temperature"],
    "logit_bias": [[5, 1.5]], "response_fields": ["content", "timings/prompt_n"]})");
  EXPECT_TRUE(params.stream && params.return_tokens);
  EXPECT_EQ(params.generate.n_predict, 12);
  EXPECT_THAT(params.generate.stop, ElementsAre("x", "y"));
  EXPECT_THAT(params.response_fields, ElementsAre("content", "timings/prompt_n"));
  engine::SamplingParams expected;
  expected.temperature = 0.5f;
  expected.top_k = 3;
  expected.top_p = 0.5f;
  expected.min_p = 0.25f;
  expected.min_keep = 2;
  expected.repeat_penalty = 1.5f;
  expected.repeat_last_n = -1;
  expected.frequency_penalty = -0.5f;
  expected.presence_penalty = 0.5f;
  expected.n_probs = 4;
  expected.ignore_eos = true;
  expected.seed = 42;
  expected.samplers = {"top_k", "temperature"};
  expected.logit_bias = {{5, 1.5f}};
  EXPECT_EQ(params.generate.sampling, expected);
}

TEST_F(Params, TakeTheLessCommonSamplersFromTheRequest) {
  engine::SamplingParams expected;
  expected.typical_p = 0.5f;
  expected.top_n_sigma = 1.5f;
  expected.xtc_probability = 0.25f;
  expected.xtc_threshold = 0.125f;
  expected.dynatemp_range = 0.75f;
  expected.dynatemp_exponent = 2;
  expected.dry_multiplier = 0.5f;
  expected.dry_base = 3;
  expected.dry_allowed_length = 4;
  expected.dry_penalty_last_n = -1;
  expected.dry_sequence_breakers = {"x", "yz"};
  expected.mirostat = 2;
  expected.mirostat_tau = 4;
  expected.mirostat_eta = 0.5f;
  expected.adaptive_target = 0.5f;
  expected.adaptive_decay = 0.25f;
  expected.post_sampling_probs = true;
  expected.samplers = {"top_k", "adaptive_p", "typ_p"};
  EXPECT_EQ(sampling(R"({"typical_p": 0.5, "top_n_sigma": 1.5, "xtc_probability": 0.25, "xtc_threshold": 0.125,
    "dynatemp_range": 0.75, "dynatemp_exponent": 2, "dry_multiplier": 0.5, "dry_base": 3, "dry_allowed_length": 4,
    "dry_penalty_last_n": -1, "dry_sequence_breakers": ["x", "yz"], "mirostat": 2, "mirostat_tau": 4,
    "mirostat_eta": 0.5, "adaptive_target": 0.5, "adaptive_decay": 0.25, "post_sampling_probs": true,
    "samplers": ["top-k", "adaptive_p", "typical"]})"),
            expected);
  EXPECT_EQ(sampling(R"({"dry_base": 0.5})").dry_base, 1.75f);
}

TEST_F(Params, TakeTheFieldsOfTheAnswersForm) {
  const CompletionParams none = parse(R"({"stream": false, "return_progress": true})");
  EXPECT_FALSE(none.timings_per_token || none.include_usage || none.generate.report_progress);
  EXPECT_EQ(none.n, 1u);
  EXPECT_EQ(none.ping_interval, std::chrono::seconds(30));
  const CompletionParams all = parse(R"({"stream": true, "return_progress": true, "timings_per_token": true, "n": 3,
    "stream_options": {"include_usage": true}, "n_indent": 4, "t_max_predict_ms": 900, "sse_ping_interval": 5})");
  EXPECT_TRUE(all.timings_per_token && all.include_usage && all.generate.report_progress);
  EXPECT_EQ(all.n, 3u);
  EXPECT_EQ(all.generate.n_indent, 4);
  EXPECT_EQ(all.generate.max_predict_ms, 900);
  EXPECT_EQ(all.ping_interval, std::chrono::seconds(5));
  EXPECT_GT(parse(R"({"sse_ping_interval": -1})").ping_interval, std::chrono::hours(1000));
  EXPECT_EQ(parse(R"({"n_cmpl": 2, "n": 5})").n, 2u);
}

TEST_F(Params, TakeOneStopString) { EXPECT_THAT(parse(R"({"stop": "end"})").generate.stop, ElementsAre("end")); }

TEST_F(Params, TakeANegativeTemperatureAsZero) { EXPECT_EQ(sampling(R"({"temperature": -1})").temperature, 0); }

TEST_F(Params, TakeTheSeedAs32BitsAndMinusOneAsRandom) {
  EXPECT_EQ(sampling(R"({"seed": 4294967294})").seed, 4294967294u);
  EXPECT_EQ(sampling(R"({"seed": 4294967295})").seed, std::nullopt);
  EXPECT_EQ(sampling(R"({"seed": -1})").seed, std::nullopt);
  EXPECT_EQ(sampling(R"({"seed": 0})").seed, 0u);
  EXPECT_EQ(sampling(R"({"seed": 3.0})").seed, 3u);
  EXPECT_THAT(error_of(R"({"seed": 4294967296})"), HasSubstr("'seed'"));
  EXPECT_THAT(error_of(R"({"seed": -2})"), HasSubstr("'seed'"));
}

TEST_F(Params, TakeNPredictUnderAllItsNamesAndWithinTheServersLimit) {
  EXPECT_EQ(parse(R"({"max_tokens": 5})").generate.n_predict, 5);
  EXPECT_EQ(parse(R"({"max_completion_tokens": 6})").generate.n_predict, 6);
  EXPECT_EQ(parse(R"({"n_predict": 7, "max_tokens": 5})").generate.n_predict, 7);
  api_.settings.n_predict = 10;
  EXPECT_EQ(parse("{}").generate.n_predict, 10);
  EXPECT_EQ(parse(R"({"n_predict": -1})").generate.n_predict, 10);
  EXPECT_EQ(parse(R"({"n_predict": 11})").generate.n_predict, 10);
  EXPECT_EQ(parse(R"({"n_predict": 9})").generate.n_predict, 9);
  EXPECT_EQ(parse(R"({"n_predict": 0})").generate.n_predict, 0);
}

TEST_F(Params, TakeLogprobsForNProbs) {
  EXPECT_EQ(sampling(R"({"logprobs": 3})").n_probs, 3);
  EXPECT_EQ(sampling(R"({"logprobs": 3, "n_probs": 2})").n_probs, 2);
}

struct Refused {
  const char* field;
  const char* value;
};

class RefusedField : public Params, public ::testing::WithParamInterface<Refused> {};

TEST_P(RefusedField, IsNamedInTheError) {
  const std::string text = std::string("{\"") + GetParam().field + "\": " + GetParam().value + "}";
  EXPECT_THAT(error_of(text), HasSubstr(std::string("'") + GetParam().field + "'")) << text;
}

INSTANTIATE_TEST_SUITE_P(OfRange, RefusedField,
                         ::testing::Values(Refused{"n_predict", "-2"}, Refused{"max_tokens", "-2"},
                                           Refused{"n_predict", "2147483648"}, Refused{"top_k", "3000000000"},
                                           Refused{"top_p", "-0.1"}, Refused{"min_p", "1.5"}, Refused{"min_keep", "-1"},
                                           Refused{"repeat_penalty", "0"}, Refused{"repeat_penalty", "-1"},
                                           Refused{"repeat_last_n", "-2"}, Refused{"n_probs", "-1"},
                                           Refused{"logprobs", "-1"}, Refused{"temperature", "1e39"},
                                           Refused{"frequency_penalty", "1e39"}, Refused{"presence_penalty", "-1e39"},
                                           Refused{"logit_bias", "[[263, 1]]"}, Refused{"logit_bias", "[[-1, 1]]"},
                                           Refused{"logit_bias", "{\"263\": 1}"}, Refused{"logit_bias", "[[5, 1e39]]"},
                                           Refused{"logit_bias", "[[5, -1e39]]"}, Refused{"mirostat", "3"},
                                           Refused{"mirostat", "-1"}, Refused{"dry_allowed_length", "-1"},
                                           Refused{"dry_penalty_last_n", "-2"}, Refused{"adaptive_decay", "1"},
                                           Refused{"adaptive_target", "0.5"}, Refused{"typical_p", "1e39"},
                                           Refused{"n", "0"}, Refused{"n_cmpl", "-1"}, Refused{"n_indent", "-1"},
                                           Refused{"sse_ping_interval", "0"}, Refused{"sse_ping_interval", "-2"}));

INSTANTIATE_TEST_SUITE_P(
    OfType, RefusedField,
    ::testing::Values(Refused{"n_predict", "\"5\""}, Refused{"n_predict", "1.5"}, Refused{"n_predict", "1e300"},
                      Refused{"temperature", "\"hot\""}, Refused{"temperature", "true"}, Refused{"top_k", "[1]"},
                      Refused{"stream", "1"}, Refused{"stream", "\"true\""}, Refused{"return_tokens", "0"},
                      Refused{"ignore_eos", "\"no\""}, Refused{"seed", "\"1\""}, Refused{"stop", "5"},
                      Refused{"stop", "[5]"}, Refused{"stop", "{}"}, Refused{"response_fields", "5"},
                      Refused{"response_fields", "[{}]"}, Refused{"samplers", "5"}, Refused{"samplers", "[5]"},
                      Refused{"samplers", "[\"topk\"]"}, Refused{"samplers", "\"kz\""}, Refused{"logit_bias", "5"},
                      Refused{"logit_bias", "\"a\""}, Refused{"logit_bias", "[5]"}, Refused{"logit_bias", "[[5]]"},
                      Refused{"logit_bias", "[[5, 1, 2]]"}, Refused{"logit_bias", "[[5, true]]"},
                      Refused{"logit_bias", "[[5, \"x\"]]"}, Refused{"logit_bias", "[[null, 1]]"},
                      Refused{"logit_bias", "[[1.5, 1]]"}, Refused{"dry_sequence_breakers", "\"x\""},
                      Refused{"dry_sequence_breakers", "[]"}, Refused{"dry_sequence_breakers", "[5]"},
                      Refused{"samplers", "[\"infill\"]"}, Refused{"xtc_probability", "\"often\""},
                      Refused{"post_sampling_probs", "1"}, Refused{"timings_per_token", "1"},
                      Refused{"stream_options", "5"}));

struct Unsupported {
  const char* field;
  const char* off;
  const char* on;
};

class UnsupportedField : public Params, public ::testing::WithParamInterface<Unsupported> {};

TEST_P(UnsupportedField, AnswersNotSupportedUnlessItIsOff) {
  const auto body = [](const char* value) { return std::string("{\"") + GetParam().field + "\": " + value + "}"; };
  EXPECT_NO_THROW(parse(body(GetParam().off).c_str())) << body(GetParam().off);
  EXPECT_NO_THROW(parse(body("null").c_str()));
  EXPECT_THAT(error_of(body(GetParam().on), Kind::not_supported), HasSubstr(std::string("'") + GetParam().field + "'"));
}

INSTANTIATE_TEST_SUITE_P(All, UnsupportedField,
                         ::testing::Values(Unsupported{"lora", "[]", "[{\"id\": 0, \"scale\": 1}]"},
                                           Unsupported{"n_cache_reuse", "0", "256"},
                                           Unsupported{"backend_sampling", "false", "true"},
                                           Unsupported{"echo", "false", "true"},
                                           Unsupported{"verbose", "false", "true"}));

TEST_F(Params, TakeAGrammarOrASchemaInItsManyForms) {
  const auto grammar = [&](const char* text) { return parse(text).generate.grammar; };
  EXPECT_FALSE(grammar("{}"));
  EXPECT_FALSE(grammar(R"({"grammar": "", "response_format": {"type": "text"}, "json_schema": null})"));
  EXPECT_EQ(grammar(R"({"grammar": "root ::= [0-9]"})")->text, "root ::= [0-9]");
  const std::string number = grammar(R"({"json_schema": {"type": "integer"}})")->text;
  EXPECT_THAT(number, HasSubstr("root ::= "));
  EXPECT_EQ(grammar(R"({"response_format": {"type": "json_object", "schema": {"type": "integer"}}})")->text, number);
  EXPECT_EQ(
      grammar(R"({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}})")->text,
      number);
  EXPECT_THAT(grammar(R"({"response_format": {"type": "json_object"}})")->text, HasSubstr("root ::= object"));
  EXPECT_EQ(grammar(R"({"grammar": "root ::= [0-9]", "json_schema": {}})")->text, "root ::= [0-9]");
  for (const char* text :
       {R"({"grammar": 1})", R"({"json_schema": {"type": "hiccup"}})", R"({"json_schema": 5})",
        R"({"response_format": {"type": "sound"}})", R"({"response_format": {"type": "json_object", "schema": 123}})",
        R"({"response_format": {"type": "json_object", "schema": {"type": 123}}})",
        R"({"response_format": {"type": "json_schema"}})", R"({"response_format": "json"})",
        R"({"grammar_lazy": true})",
        R"({"grammar": "root ::= [0-9]", "grammar_triggers": [{"type": 1, "value": "x"}]})",
        R"({"grammar": "root ::= [0-9]", "grammar_lazy": true, "grammar_triggers": [{"type": 4, "value": "x"}]})",
        R"({"grammar": "root ::= [0-9]", "grammar_lazy": true, "grammar_triggers": [{"type": 0, "token": -1}]})"})
    EXPECT_THAT(error_of(text), HasSubstr("Field '"));
}

TEST_F(Params, TakeTriggersByNumberOrName) {
  const auto spec = parse(R"({"grammar": "root ::= [0-9]", "grammar_lazy": true, "preserved_tokens": ["</s>", "ab"],
      "grammar_triggers": [{"type": 0, "token": 7}, {"type": "word", "value": "x"}, {"type": 2, "value": "a+"},
                           {"type": "pattern_full", "value": "b"}, {"type": 1, "value": "<s>"}]})")
                        .generate.grammar;
  using engine::GrammarTrigger;
  ASSERT_TRUE(spec && spec->lazy);
  ASSERT_EQ(spec->triggers.size(), 5u);
  EXPECT_EQ(spec->triggers[0].token, 7);
  EXPECT_EQ(spec->triggers[1], (GrammarTrigger{GrammarTrigger::Kind::word, "x", -1}));
  EXPECT_EQ(spec->triggers[2].kind, GrammarTrigger::Kind::pattern);
  EXPECT_EQ(spec->triggers[3].kind, GrammarTrigger::Kind::pattern_full);
  EXPECT_EQ(spec->triggers[4], (GrammarTrigger{GrammarTrigger::Kind::token, "<s>", 1}))
      << "the word is a control token";
  EXPECT_THAT(spec->special_tokens, ElementsAre(2)) << "ab is text anyway";
}

TEST_F(Params, IgnoreUnknownFieldsAndThoseOfOldServers) {
  EXPECT_NO_THROW(parse(R"({"no_such_field": {"a": [1]}, "tfs_z": 0.5, "penalize_nl": true, "system_prompt": "x",
                            "cache_prompt": true, "model": "any"})"));
}

TEST_F(Params, TakeLogitBiasAsPairsOrAsAnObject) {
  EXPECT_THAT(sampling(R"({"logit_bias": [[5, -1], ["ab", 2]]})").logit_bias, ::testing::Contains(LogitBias{5, -1.0f}));
  EXPECT_THAT(sampling(R"({"logit_bias": {"5": -1.5, "6": 2}})").logit_bias,
              ElementsAre(LogitBias{5, -1.5f}, LogitBias{6, 2.0f}));
  EXPECT_THAT(sampling(R"({"logit_bias": []})").logit_bias, IsEmpty());
}

TEST_F(Params, BiasEveryTokenOfAText) {
  const auto tokens = vocabulary_->tokenize("xyz", vocab::AddSpecial::no, vocab::ParseSpecial::no);
  ASSERT_GT(tokens.size(), 2u);
  for (const char* text : {R"({"logit_bias": [["xyz", 3]]})", R"({"logit_bias": {"xyz": 3}})"}) {
    const auto biases = sampling(text).logit_bias;
    ASSERT_EQ(biases.size(), tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) EXPECT_EQ(biases[i], (LogitBias{tokens[i], 3.0f}));
  }
}

TEST_F(Params, BanATokenWhoseBiasIsFalse) {
  const auto biases = sampling(R"({"logit_bias": [[5, false]]})").logit_bias;
  ASSERT_EQ(biases.size(), 1u);
  EXPECT_TRUE(std::isinf(biases[0].bias) && biases[0].bias < 0);
}

TEST_F(Params, TakeSamplersAsNamesOrCharacters) {
  EXPECT_THAT(sampling(R"({"samplers": "edskypmxt"})").samplers,
              ::testing::ElementsAreArray(engine::default_sampler_order()));
  EXPECT_THAT(sampling(R"({"samplers": "kt"})").samplers, ElementsAre("top_k", "temperature"));
  EXPECT_THAT(sampling(R"({"samplers": []})").samplers, IsEmpty());
  EXPECT_THAT(sampling(R"({"samplers": ["min_p"]})").samplers, ElementsAre("min_p"));
}

TEST_F(Params, TakeAPromptAsTextWithItsSpecialTokens) {
  const auto expected = vocabulary_->tokenize("ab", vocab::AddSpecial::yes, vocab::ParseSpecial::yes);
  EXPECT_EQ(expected.front(), 1);
  EXPECT_THAT(prompts(R"("ab")"), ElementsAre(expected));
  EXPECT_THAT(prompts(R"({"prompt_string": "ab"})"), ElementsAre(expected));
  EXPECT_THAT(prompts(R"(["ab"])"), ElementsAre(expected));
}

TEST_F(Params, TakeAPromptAsTokensAsTheyAre) { EXPECT_THAT(prompts("[1, 5, 262]"), ElementsAre(Prompt{1, 5, 262})); }

TEST_F(Params, GiveSpecialTokensToALeadingTextOnly) {
  const auto with = vocabulary_->tokenize("ab", vocab::AddSpecial::yes, vocab::ParseSpecial::yes);
  const auto without = vocabulary_->tokenize("ab", vocab::AddSpecial::no, vocab::ParseSpecial::yes);
  ASSERT_NE(with, without);
  Prompt first = with;
  first.push_back(9);
  EXPECT_THAT(prompts(R"(["ab", 9])"), ElementsAre(first));
  Prompt second = {9};
  second.insert(second.end(), without.begin(), without.end());
  EXPECT_THAT(prompts(R"([9, "ab"])"), ElementsAre(second));
}

TEST_F(Params, TakeSeveralPrompts) {
  EXPECT_THAT(prompts("[[1, 2], [3]]"), ElementsAre(Prompt{1, 2}, Prompt{3}));
  EXPECT_EQ(prompts(R"(["a", "b"])").size(), 2u);
  EXPECT_EQ(prompts(R"(["a", [1, "b"], {"prompt_string": "c"}])").size(), 3u);
  EXPECT_THAT(prompts("[[1, 2]]"), ElementsAre(Prompt{1, 2}));
}

TEST_F(Params, RefusePromptsOfOtherForms) {
  for (const char* text : {"5", "true", "[]", "[1.5]", "[true, 1]", "[null]", "[1, null]", R"({})", "[[1], 5]",
                           "[[[1]]]", "[-1]", "[263]", "[18446744073709551615]", "[99999999999999999999]"})
    EXPECT_THAT(prompt_error(text), HasSubstr("'prompt'")) << text;
  EXPECT_THAT(prompt_error("[1, 263]"), AllOf(HasSubstr("263"), HasSubstr("[0, 263)")));
  EXPECT_THAT(prompt_error(R"({"prompt_string": "a", "multimodal_data": ["x"]})", Kind::not_supported),
              HasSubstr("multimodal_data"));
  EXPECT_NO_THROW(prompts(R"({"prompt_string": "a", "multimodal_data": []})"));
  EXPECT_THAT(prompt_error(R"({"prompt_string": 5})"), HasSubstr("'prompt_string'"));
}

TEST_F(Params, EchoTheSettings) {
  const CompletionParams params = parse(
      R"({"n_predict": 3, "stop": ["a"], "logit_bias": [[5, false], [6, 1.5]], "samplers": "k", "stream": true})");
  const Json echo = generation_settings(params.generate, params.stream, 99);
  ASSERT_TRUE(echo.is_object());
  EXPECT_EQ(echo.at("seed"), 99);
  EXPECT_EQ(echo.at("n_predict"), 3);
  EXPECT_EQ(echo.at("max_tokens"), 3);
  EXPECT_EQ(echo.at("stop"), Json::parse(R"(["a"])"));
  EXPECT_EQ(echo.at("samplers"), Json::parse(R"(["top_k"])"));
  EXPECT_EQ(echo.at("logit_bias"), Json::parse(R"([{"bias": null, "token": 5}, {"bias": 1.5, "token": 6}])"));
  EXPECT_EQ(echo.at("stream"), true);
  EXPECT_EQ(generation_settings({}, false, 0).at("stop"), Json::array());
  EXPECT_EQ(generation_settings({}, false, 0).at("logit_bias"), Json::array());
}

std::string json_error(std::string_view body) {
  try {
    parse_object(body);
  } catch (const RequestError& error) {
    EXPECT_EQ(error.kind(), Kind::invalid);
    return error.what();
  }
  return "";
}

TEST(JsonBody, MustBeAnObject) {
  for (const char* body :
       {"", "{", "[1]", "5", "null", "\"x\"", "{\"a\": 1} x", "{\"a\": nul}", "{\"a\": 1e999}", "{'a': 1}"})
    EXPECT_NE(json_error(body), "") << body;
  EXPECT_EQ(json_error("{}"), "");
  EXPECT_THAT(json_error("[1]"), HasSubstr("array"));
}

TEST(JsonBody, MustBeUtf8) {
  EXPECT_NE(json_error("{\"prompt\": \"\xff\"}"), "");
  EXPECT_NE(json_error(std::string_view("{\"a\": \"\0\"}", 10)), "");
  EXPECT_EQ(json_error("{\"prompt\": \"\xc3\xbc\"}"), "");
}

TEST(JsonBody, IsNotNestedWithoutBound) {
  const auto nested = [](size_t depth) { return "{\"a\": " + std::string(depth, '[') + std::string(depth, ']') + "}"; };
  EXPECT_EQ(json_error(nested(60)), "");
  EXPECT_THAT(json_error(nested(100)), HasSubstr("64"));
  EXPECT_NE(json_error(nested(1'000'000)), "");
  EXPECT_NE(json_error("{\"a\": " + std::string(1'000'000, '[')), "");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_NE(json_error(objects), "");
}

TEST(JsonBody, IsWrittenOnOneLineWithoutInvalidUtf8) {
  EXPECT_EQ(to_text({{"a", "line\nline"}}), R"({"a":"line\nline"})");
  EXPECT_EQ(to_text({{"a", "\xff"}}), "{\"a\":\"\xef\xbf\xbd\"}");
}

TEST(JsonFields, CountNullAsAbsentAndNameTypes) {
  const Json object = Json::parse(R"({"n": 1.5, "i": 3, "b": true, "t": "x", "null": null, "big": 1e300})");
  EXPECT_EQ(find_number(object, "n"), 1.5);
  EXPECT_EQ(find_integer(object, "i"), 3);
  EXPECT_EQ(find_bool(object, "b"), true);
  EXPECT_EQ(find_text(object, "t"), "x");
  EXPECT_EQ(find_field(object, "null"), nullptr);
  EXPECT_EQ(find_number(object, "null"), std::nullopt);
  EXPECT_EQ(find_text(object, "absent"), std::nullopt);
  EXPECT_THROW(find_integer(object, "n"), RequestError);
  EXPECT_THROW(find_integer(object, "big"), RequestError);
  EXPECT_THROW(find_bool(object, "i"), RequestError);
  EXPECT_THROW(find_text(object, "b"), RequestError);
  EXPECT_THROW(find_number(object, "t"), RequestError);
}

}  // namespace
}  // namespace caravan::server
