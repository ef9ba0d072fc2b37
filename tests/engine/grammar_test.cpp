// A grammar at work on one answer: constraint, triggers, and the sampler's second draw.
#include "engine/grammar.h"

#include <gmock/gmock.h>

#include <cmath>
#include <numeric>

#include "base/error.h"
#include "engine/sampler.h"
#include "engine/word_vocabulary.h"

namespace caravan::engine {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kBos = 1, kEnd = 2, kFirstByte = 3, kFirstWord = 259;

int32_t byte_token(char c) { return kFirstByte + static_cast<uint8_t>(c); }

class GrammarTest : public ::testing::Test {
 protected:
  GrammarConstraint compile(const GrammarSpec& spec) { return compiler_.compile(spec); }

  // Feeds text byte by byte, as long as that is allowed; returns what was.
  std::string feed(GrammarConstraint& grammar, const std::string& text) {
    std::string taken;
    for (const char c : text) {
      if (!grammar.allows(byte_token(c))) break;
      grammar.accept(byte_token(c));
      taken += c;
    }
    return taken;
  }

  std::string error_of(const GrammarSpec& spec) {
    try {
      compile(spec);
    } catch (const RequestError& error) {
      return error.what();
    }
    return "no error";
  }

  std::vector<std::string> words_ = {"ab", "tool", "l>{", "call>x", "<ca"};
  std::unique_ptr<const vocab::Vocabulary> vocabulary_ = test::word_vocabulary(words_);
  GrammarCompiler compiler_{*vocabulary_};
};

GrammarSpec lazy(std::string text, std::vector<GrammarTrigger> triggers) {
  GrammarSpec spec{.text = std::move(text), .lazy = true};
  spec.triggers = std::move(triggers);
  return spec;
}

TEST_F(GrammarTest, FollowsTheAnswerToItsEnd) {
  GrammarConstraint grammar = compile({.text = "root ::= \"ab\" \"c\"?"});
  EXPECT_FALSE(grammar.allows(kEnd));
  EXPECT_FALSE(grammar.is_complete());
  grammar.accept(kFirstWord);
  EXPECT_TRUE(grammar.allows(kEnd));
  EXPECT_FALSE(grammar.is_complete()) << "c may follow";
  EXPECT_EQ(feed(grammar, "cc"), "c");
  EXPECT_TRUE(grammar.is_complete());
  ASSERT_NE(grammar.mask(), nullptr);
  EXPECT_EQ(grammar.mask()->count(), 1u);
}

TEST_F(GrammarTest, RequestsOfOneGrammarDoNotDisturbEachOther) {
  GrammarConstraint first = compile({.text = "root ::= \"(\" root \")\" | \"x\""});
  GrammarConstraint second = compile({.text = "root ::= \"(\" root \")\" | \"x\""});
  feed(first, "((x)");
  EXPECT_EQ(feed(second, "(x))"), "(x)");
  EXPECT_EQ(feed(first, "))"), ")");
}

TEST_F(GrammarTest, KeepsItsPlaceWhenTheSharedStatesGrowTooLarge) {
  const GrammarSpec spec{.text = "root ::= \"[\" root* \"]\""};
  GrammarConstraint grammar = compile(spec), other = compile(spec);
  feed(other, "[[");
  // New states at every depth, 2 frames each: beyond the limit several times.
  const size_t depth = 300'000;
  EXPECT_EQ(feed(grammar, std::string(depth, '[')).size(), depth);
  for (int i = 0; i < 1000; ++i) feed(grammar, "[]");
  EXPECT_EQ(feed(grammar, std::string(depth + 1, ']')).size(), depth);
  EXPECT_TRUE(grammar.is_complete());
  EXPECT_EQ(feed(other, "]]]"), "]]");
}

TEST_F(GrammarTest, WaitsForAWordHoweverTokensCutIt) {
  const GrammarSpec spec = lazy("root ::= \"<call>\" [0-9]+", {{.text = "<call>"}});
  GrammarConstraint grammar = compile(spec);
  EXPECT_EQ(grammar.mask(), nullptr);
  EXPECT_TRUE(grammar.allows(kEnd));
  EXPECT_EQ(feed(grammar, "some <cal"), "some <cal");
  EXPECT_TRUE(grammar.waits_for_trigger());
  const int32_t l_brace = kFirstWord + 2;
  EXPECT_FALSE(grammar.allows(l_brace)) << "it completes the trigger and goes on against the grammar";
  EXPECT_EQ(feed(grammar, "l>"), "l>");
  EXPECT_FALSE(grammar.waits_for_trigger());
  EXPECT_FALSE(grammar.allows(kEnd));
  EXPECT_EQ(feed(grammar, "12x"), "12");
  EXPECT_TRUE(grammar.allows(kEnd));

  GrammarConstraint again = compile(spec);
  again.accept(kFirstWord + 4);  // <ca
  EXPECT_EQ(feed(again, "lx>"), "lx>");
  EXPECT_TRUE(again.waits_for_trigger()) << "<call> was not written";
}

TEST_F(GrammarTest, WaitsForATokenAndTakesItsText) {
  GrammarConstraint grammar =
      compile(lazy("root ::= \"<s>\" \"x\"", {{.kind = GrammarTrigger::Kind::token, .token = kBos}}));
  EXPECT_EQ(feed(grammar, "anything"), "anything");
  ASSERT_TRUE(grammar.allows(kBos));
  grammar.accept(kBos);
  EXPECT_EQ(feed(grammar, "xx"), "x");
  GrammarConstraint by_id =
      compile(lazy("root ::= <[1]> \"x\"", {{.kind = GrammarTrigger::Kind::token, .token = kBos}}));
  ASSERT_TRUE(by_id.allows(kBos));
  by_id.accept(kBos);
  EXPECT_EQ(feed(by_id, "xx"), "x");
}

TEST_F(GrammarTest, WaitsForAPatternAndBeginsAtItsGroup) {
  GrammarConstraint grammar =
      compile(lazy("root ::= \"{\" [a-z]* \"}\"", {{.kind = GrammarTrigger::Kind::pattern, .text = "tool[^{]*(\\{)"}}));
  EXPECT_EQ(feed(grammar, "{1} tool: {a1"), "{1} tool: {a");
  GrammarConstraint full =
      compile(lazy("root ::= \"{\" [a-z]* \"}\"", {{.kind = GrammarTrigger::Kind::pattern_full, .text = "\\s*(\\{)"}}));
  EXPECT_EQ(feed(full, "  {a1"), "  {a");
  GrammarConstraint other =
      compile(lazy("root ::= \"{\" [a-z]* \"}\"", {{.kind = GrammarTrigger::Kind::pattern_full, .text = "\\s*(\\{)"}}));
  EXPECT_EQ(feed(other, "x {a1"), "x {a1") << "the whole answer does not match";
}

TEST_F(GrammarTest, HearsNoTriggerInsideTheThoughtThatBeginsAnAnswer) {
  GrammarSpec spec = lazy("root ::= \"<call>\" [0-9]+", {{.text = "<call>"}});
  spec.thought = {.begin = "[T]", .end = "[/T]"};
  const auto takes = [&](const std::string& text) {
    GrammarConstraint grammar = compile(spec);
    return feed(grammar, text);
  };
  EXPECT_EQ(takes(" \n[T]a <call>b [/T <call>c[/T]d <call>5x"), " \n[T]a <call>b [/T <call>c[/T]d <call>5");
  EXPECT_EQ(takes("a [T] <call>x"), "a [T] <call>") << "a thought begins the answer or is none";
  EXPECT_EQ(takes("[T <call>x"), "[T <call>");
  EXPECT_EQ(takes("[T]<call>x [/T]<call>x[T]<call>"), "[T]<call>x [/T]<call>");
  spec.thought.open = true;
  EXPECT_EQ(takes("a <call>b[/T]<call>x"), "a <call>b[/T]<call>");
  spec.thought = {};
  EXPECT_EQ(takes("[T]<call>x"), "[T]<call>");

  // a token that ends the thought, and one that completes the trigger in its middle
  words_ = {"b[/", "T]<c", "all>7"};
  vocabulary_ = test::word_vocabulary(words_);
  GrammarCompiler compiler(*vocabulary_);
  spec.thought = {.begin = "[T]", .end = "[/T]", .open = true};
  GrammarConstraint grammar = compiler.compile(spec);
  for (const int32_t word : {0, 1, 2}) {
    ASSERT_TRUE(grammar.allows(kFirstWord + word));
    grammar.accept(kFirstWord + word);
  }
  EXPECT_FALSE(grammar.waits_for_trigger());
  EXPECT_EQ(feed(grammar, "7x"), "7");
}

TEST_F(GrammarTest, RefusesTriggersThatCannotWork) {
  EXPECT_THAT(error_of({.text = "root ::= \"a\"", .lazy = true}), HasSubstr("needs at least one trigger"));
  GrammarSpec eager = lazy("root ::= \"a\"", {{.text = "a"}});
  eager.lazy = false;
  EXPECT_THAT(error_of(eager), HasSubstr("only a lazy grammar"));
  EXPECT_THAT(error_of(lazy("root ::= \"a\"", {{.text = ""}})), HasSubstr("text is empty"));
  EXPECT_THAT(error_of(lazy("root ::= \"a\"", {{.kind = GrammarTrigger::Kind::pattern, .text = "(a"}})),
              HasSubstr("trigger pattern '(a', at byte 2"));
  EXPECT_THAT(error_of(lazy("root ::= \"a\"", {{.kind = GrammarTrigger::Kind::token, .token = 9999}})),
              HasSubstr("a token id below"));
  EXPECT_THAT(error_of({.text = "root ::= \"a\"", .special_tokens = {-1}}), HasSubstr("special tokens"));
}

TEST_F(GrammarTest, GivesUpPatternsThatTakeTooLong) {
  const TriggerPattern pattern("(x+x+)+[^x]", false);
  EXPECT_THROW(pattern.find(std::string(60, 'x')), RequestError);
  EXPECT_EQ(pattern.find("axxy"), 1u);
  EXPECT_EQ(TriggerPattern("b", false).find("\xC3\xA9 b\xC3"), 3u) << "the text ends inside a character";
}

// ---- the sampler ----

stage::RowOutput all_logits(const std::vector<float>& logits) { return {0, stage::OutputKind::logits, logits, {}, 0}; }

stage::RowOutput answer(const stage::OutputRequest& wanted, const std::vector<float>& logits) {
  if (wanted.kind == stage::OutputKind::logits) return all_logits(logits);
  stage::RowOutput output{0, wanted.kind, {}, {}, 0};
  output.ids.resize(logits.size());
  std::iota(output.ids.begin(), output.ids.end(), 0);
  std::sort(output.ids.begin(), output.ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  output.ids.resize(wanted.top_k);
  for (const int32_t id : output.ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  for (const int32_t id : wanted.named_ids) output.values.push_back(logits[static_cast<size_t>(id)]);
  return output;
}

std::vector<float> random_logits(std::mt19937& random, size_t n) {
  std::normal_distribution<float> normal(0, 4);
  std::vector<float> logits(n);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

SamplingParams random_params(std::mt19937& random) {
  SamplingParams params;
  params.temperature = random() % 2 ? 0.0f : 0.9f;
  params.top_k = std::array{0, 1, 20, 100}[random() % 4];
  params.repeat_penalty = random() % 2 ? 1.2f : 1.0f;
  params.top_n_sigma = random() % 4 == 0 ? 2.0f : -1.0f;
  params.xtc_probability = random() % 4 == 0 ? 0.5f : 0.0f;
  params.mirostat = random() % 6 == 0 ? 2 : 0;
  if (random() % 3 == 0) params.logit_bias = {{static_cast<int32_t>(random() % 250), 3.0f}, {kEnd, -2.0f}};
  return params;
}

TEST(GrammarSampler, CandidatesGiveTheTokensThatAllLogitsGive) {
  std::mt19937 random(5);
  const auto vocabulary = test::word_vocabulary(test::random_words(random, 300));
  const auto n_vocab = static_cast<uint32_t>(vocabulary->size());
  GrammarCompiler compiler(*vocabulary);
  const char* const grammars[] = {"root ::= [ab]{1,40}", "root ::= \"a\"* [b\xC3\xA9]+",
                                  "root ::= \"abababababab\" [ab]*", "root ::= (\"a\" root \"b\")?"};
  int n_all_needed = 0, n_from_candidates = 0;
  for (int round = 0; round < 150; ++round) {
    const SamplingParams params = random_params(random);
    const GrammarSpec spec{.text = grammars[random() % 4]};
    Sampler by_need(params, 3, {}, n_vocab, vocabulary.get()), by_logits(params, 3, {}, n_vocab, vocabulary.get());
    by_need.constrain(compiler.compile(spec));
    by_logits.constrain(compiler.compile(spec));
    GrammarConstraint check = compiler.compile(spec);
    std::vector<int32_t> history{1};
    for (int step = 0; step < 12; ++step) {
      const std::vector<float> logits = random_logits(random, n_vocab);
      const Sampler::Choice wanted = by_logits.sample(all_logits(logits), history);
      const stage::OutputRequest request = by_need.need(history);
      Sampler::Choice got = by_need.sample(answer(request, logits), history);
      if (got.kind == Sampler::Choice::Kind::all_logits_needed) {
        ++n_all_needed;
        const stage::OutputRequest second = by_need.need(history);
        ASSERT_EQ(second.kind, stage::OutputKind::logits);
        got = by_need.sample(answer(second, logits), history);
      } else if (request.kind == stage::OutputKind::candidates) {
        ++n_from_candidates;
      }
      ASSERT_EQ(got.kind, wanted.kind);
      if (got.kind == Sampler::Choice::Kind::end) break;
      ASSERT_EQ(got.token, wanted.token) << "round " << round << ", step " << step;
      ASSERT_TRUE(check.allows(got.token));
      if (got.token == kEnd) break;
      check.accept(got.token);
      history.push_back(got.token);
    }
  }
  EXPECT_GT(n_all_needed, 10);
  EXPECT_GT(n_from_candidates, 50);
}

TEST(GrammarSampler, GreedilyTakesTheFirstAllowedToken) {
  std::mt19937 random(6);
  const auto vocabulary = test::word_vocabulary({"ab", "ba"});
  const auto n_vocab = static_cast<uint32_t>(vocabulary->size());
  GrammarCompiler compiler(*vocabulary);
  SamplingParams params;
  params.temperature = 0;
  for (int round = 0; round < 50; ++round) {
    Sampler sampler(params, 1, {}, n_vocab, vocabulary.get());
    sampler.constrain(compiler.compile({.text = "root ::= [ab]+"}));
    const std::vector<float> logits = random_logits(random, n_vocab);
    const std::vector<int32_t> allowed{byte_token('a'), byte_token('b'), kFirstWord, kFirstWord + 1};
    const int32_t best = *std::max_element(allowed.begin(), allowed.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] < logits[static_cast<size_t>(b)];
    });
    EXPECT_EQ(sampler.sample(all_logits(logits), std::vector<int32_t>{1}).token, best);
  }
}

TEST(GrammarSampler, DrawsAsWithoutAGrammarWhereThatIsAllowed) {
  std::mt19937 random(8);
  const auto vocabulary = test::word_vocabulary({});
  const auto n_vocab = static_cast<uint32_t>(vocabulary->size());
  GrammarCompiler compiler(*vocabulary);
  Sampler free(SamplingParams{}, 4, {}, n_vocab, vocabulary.get()), bound = [&] {
    Sampler sampler(SamplingParams{}, 4, {}, n_vocab, vocabulary.get());
    sampler.constrain(compiler.compile({.text = "root ::= [\\x01-\\x7F]*"}));
    return sampler;
  }();
  std::vector<int32_t> history{1};
  int n_same = 0;
  for (int step = 0; step < 60; ++step) {
    std::vector<float> logits = random_logits(random, n_vocab);
    logits[kEnd] = -50;
    const int32_t wanted = free.sample(all_logits(logits), history).token;
    const int32_t got = bound.sample(all_logits(logits), history).token;
    const bool ascii = wanted > kFirstByte && wanted < kFirstByte + 128;
    if (ascii) {
      EXPECT_EQ(got, wanted);
    }
    n_same += ascii;
    history.push_back(got);
  }
  EXPECT_GT(n_same, 10);
}

// Where the grammar leaves three tokens, the second draw gives them as their softmax has it.
TEST(GrammarSampler, DrawsFromTheSoftmaxOfTheAllowed) {
  const auto vocabulary = test::word_vocabulary({});
  const auto n_vocab = static_cast<uint32_t>(vocabulary->size());
  GrammarCompiler compiler(*vocabulary);
  SamplingParams params;
  params.temperature = 1;
  params.top_k = 0;
  params.top_p = 1;
  params.min_p = 0;
  std::vector<float> logits(n_vocab, 0.0f);
  logits[5] = 20;  // always drawn first
  logits[static_cast<size_t>(byte_token('x'))] = std::log(1.0f);
  logits[static_cast<size_t>(byte_token('y'))] = std::log(2.0f);
  logits[static_cast<size_t>(byte_token('z'))] = std::log(5.0f);
  std::map<int32_t, int> counts;
  const int n = 8000;
  for (uint32_t seed = 0; seed < n; ++seed) {
    Sampler sampler(params, seed, {}, n_vocab, vocabulary.get());
    sampler.constrain(compiler.compile({.text = "root ::= [xyz]+"}));
    ++counts[sampler.sample(all_logits(logits), std::vector<int32_t>{1}).token];
  }
  // Standard deviations are below 45.
  EXPECT_NEAR(counts[byte_token('x')], n / 8, 180);
  EXPECT_NEAR(counts[byte_token('y')], n / 4, 180);
  EXPECT_NEAR(counts[byte_token('z')], n * 5 / 8, 180);
}

TEST(GrammarSampler, ALazyGrammarKeepsTheAnswerOffWrongTriggers) {
  const auto vocabulary = test::word_vocabulary({"t!", "t1"});
  const auto n_vocab = static_cast<uint32_t>(vocabulary->size());
  GrammarCompiler compiler(*vocabulary);
  SamplingParams params;
  params.temperature = 0;
  Sampler sampler(params, 1, {}, n_vocab, vocabulary.get());
  sampler.constrain(compiler.compile(lazy("root ::= \"t\" [0-9]", {{.text = "t"}})));
  std::vector<float> logits(n_vocab, 0.0f);
  logits[kFirstWord] = 9;      // t!
  logits[kFirstWord + 1] = 8;  // t1
  EXPECT_EQ(sampler.sample(all_logits(logits), std::vector<int32_t>{1}).token, kFirstWord + 1);
  EXPECT_EQ(sampler.sample(all_logits(logits), std::vector<int32_t>{1, kFirstWord + 1}).token, kEnd);
}

}  // namespace
}  // namespace caravan::engine
