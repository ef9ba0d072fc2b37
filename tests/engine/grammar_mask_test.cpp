#include "engine/grammar_mask.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "engine/grammar_reference.h"
#include "engine/word_vocabulary.h"
#include "gguf/reader.h"
#include "support/kit.h"

namespace caravan::engine {
namespace {

using test::random_words;
using test::word_vocabulary;

// The mask at state says of every token what the machine says of it alone.
void expect_exact(GrammarMasks& masks, const TokenTrie& trie, GrammarMachine::State state, const std::string& where) {
  const TokenMask mask = masks.mask(state);
  for (int32_t token = 0; token < static_cast<int32_t>(trie.n_tokens()); ++token)
    if (mask.allows(token) != masks.allows(state, token)) {
      FAIL() << "token " << token << ": the mask says " << mask.allows(token) << " at " << where;
    }
}

TEST(TokenTrie, RanksTokensByTheirBytes) {
  const auto vocabulary = word_vocabulary({"b", "ab", "abc", "abd"});
  const TokenTrie trie(*vocabulary);
  EXPECT_EQ(trie.n_tokens(), 263u);
  EXPECT_EQ(trie.n_ranked(), 260u) << "<unk>, <s> and </s> add nothing";
  EXPECT_FALSE(trie.has(1));
  std::string last;
  for (uint32_t rank = 0; rank < trie.n_ranked(); ++rank) {
    const int32_t token = trie.token_at(rank);
    EXPECT_EQ(trie.rank_of(token), rank);
    EXPECT_EQ(trie.bytes(token), vocabulary->piece(token, vocab::RenderSpecial::no));
    EXPECT_LE(last, trie.bytes(token));
    last = trie.bytes(token);
  }
}

TEST(TokenTrie, HasANodeForEachBeginning) {
  const auto vocabulary = word_vocabulary({"ab", "abc", "abd", "bb"});
  const TokenTrie trie(*vocabulary);
  EXPECT_EQ(trie.nodes().size(), 1u + 256u + 4u + 1u);
  std::vector<std::string> path(16);
  for (uint32_t i = 1; i + 1 < trie.nodes().size(); ++i) {
    const TokenTrie::Node& node = trie.nodes()[i];
    path[node.depth] = path[node.depth - 1u] + static_cast<char>(node.byte);
    for (uint32_t rank = node.first_rank; rank < trie.nodes()[i + 1].first_rank; ++rank)
      EXPECT_EQ(trie.bytes(trie.token_at(rank)), path[node.depth]);
    EXPECT_GT(node.end, i);
    EXPECT_LE(node.end, trie.nodes()[0].end);
  }
}

TEST(TokenMask, SetsRangesOfBits) {
  const auto vocabulary = word_vocabulary({});
  const TokenTrie trie(*vocabulary);
  for (uint32_t begin = 0; begin < 200; begin += 7) {
    for (uint32_t end = begin; end <= 259; end += 5) {
      TokenMask mask(trie);
      mask.allow_ranks(begin, end);
      for (uint32_t rank = 0; rank < 259; ++rank) ASSERT_EQ(mask.allows_rank(rank), begin <= rank && rank < end);
      EXPECT_EQ(mask.count(), end - begin);
    }
  }
}

TEST(GrammarMasks, AgreeWithEachTokenAloneOnRandomGrammars) {
  std::mt19937 random(1);
  int n_grammars = 0;
  for (uint32_t seed = 1; n_grammars < 150; ++seed) {
    const std::string text = test::RandomGrammar(seed).make();
    const GrammarRules rules = parse_gbnf(text, {300, {}});
    std::unique_ptr<GrammarAutomaton> automaton;
    try {
      automaton = std::make_unique<GrammarAutomaton>(rules);
    } catch (const RequestError&) {
      continue;  // left-recursive
    }
    ++n_grammars;
    const auto vocabulary = word_vocabulary(random_words(random, 40));
    const TokenTrie trie(*vocabulary);
    GrammarMachine machine(*automaton);
    GrammarMasks masks(machine, trie, {});
    std::set<GrammarMachine::State> states{machine.initial()};
    for (int step = 0; step < 3; ++step) {
      std::set<GrammarMachine::State> next;
      for (const auto state : states) {
        if (next.size() > 10) break;
        expect_exact(masks, trie, state, "seed " + std::to_string(seed) + "\n" + text);
        if (::testing::Test::HasFatalFailure()) return;
        for (int32_t token = 0; token < static_cast<int32_t>(trie.n_tokens()); ++token) {
          const auto after = masks.after(state, token);
          if (after != GrammarMachine::kDead) next.insert(after);
        }
      }
      states = std::move(next);
    }
  }
}

TEST(GrammarMasks, LetTheAnswerEndOnlyWhereTheGrammarCan) {
  const auto vocabulary = word_vocabulary({"ab"});
  const TokenTrie trie(*vocabulary);
  const GrammarAutomaton automaton(parse_gbnf("root ::= \"ab\" \"c\"?", {300, {}}));
  GrammarMachine machine(automaton);
  GrammarMasks masks(machine, trie, {});
  const int32_t kEnd = 2, kAb = 259, kC = 3 + 'c';
  EXPECT_FALSE(masks.mask(machine.initial()).allows(kEnd));
  const auto after = masks.after(machine.initial(), kAb);
  EXPECT_TRUE(masks.mask(after).allows(kEnd));
  EXPECT_TRUE(masks.mask(after).allows(kC));
  EXPECT_EQ(masks.mask(after).count(), 2u);
  EXPECT_EQ(masks.after(after, kEnd), GrammarMachine::kDead);
}

TEST(GrammarMasks, MatchControlTokensOnlyWhereTheyAreNamedOrListed) {
  const auto vocabulary = word_vocabulary({"x"});
  const TokenTrie trie(*vocabulary);
  const int32_t kBos = 1, kEnd = 2;
  for (const auto& [text, listed, wanted] : {std::tuple{"root ::= \"<s>x\"", false, false},
                                             {"root ::= \"<s>x\"", true, true},
                                             {"root ::= <[1]> \"x\"", false, true},
                                             {"root ::= !<[2]> \"x\"", false, false},
                                             {"root ::= !<[2]> \"x\"", true, true},
                                             {"root ::= !<[1]> \"x\"", true, false}}) {
    const GrammarAutomaton automaton(parse_gbnf(text, {300, {}}));
    GrammarMachine machine(automaton);
    std::vector<std::pair<int32_t, std::string>> special;
    if (listed) special = {{kBos, "<s>"}, {kEnd, "</s>"}};
    GrammarMasks masks(machine, trie, special);
    EXPECT_EQ(masks.mask(machine.initial()).allows(kBos), wanted) << text;
    expect_exact(masks, trie, machine.initial(), text);
  }
}

constexpr const char* kJson = R"(root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
)";

TEST(GrammarMasks, AgreeWithEachTokenAloneOverARealVocabulary) {
  CARAVAN_REQUIRE_KIT(kit);
  const auto vocabulary = vocab::Vocabulary::load(gguf::Model::open(kit / "tokenizers/llama-bpe.gguf").metadata());
  const TokenTrie trie(*vocabulary);
  for (const auto& [grammar, sample] :
       {std::pair{kJson, "{\"name\": \"J\xC3\xBCrgen \\u00e9\", \"list\": [1, -2.5e3, {\"a\": [true]}]}"},
        {"root ::= e\ne ::= t ([-+*/] t)*\nt ::= [0-9]+ | \"(\" e \")\"", "(12+3)*(4/(5-6))"},
        {"root ::= (\"apple\" | \"banana\" | \"cherry pie\") (\", \" root)?", "apple, cherry pie, banana"}}) {
    const GrammarAutomaton automaton(parse_gbnf(grammar, {static_cast<uint32_t>(vocabulary->size()), {}}));
    GrammarMachine machine(automaton);
    GrammarMasks masks(machine, trie, {});
    auto state = machine.initial();
    std::string so_far;
    for (const int32_t token : vocabulary->tokenize(sample, vocab::AddSpecial::no, vocab::ParseSpecial::no)) {
      expect_exact(masks, trie, state, so_far);
      ASSERT_FALSE(HasFatalFailure());
      so_far += vocabulary->piece(token, vocab::RenderSpecial::no);
      state = masks.after(state, token);
      ASSERT_NE(state, GrammarMachine::kDead) << so_far;
    }
    EXPECT_TRUE(machine.accepts(state));
    expect_exact(masks, trie, state, so_far);
  }
}

}  // namespace
}  // namespace caravan::engine
