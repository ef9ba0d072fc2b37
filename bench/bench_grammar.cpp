// What a grammar costs per token: bench_grammar VOCABULARY.gguf. For several grammars and answers, in microseconds:
// testing the winner (every token pays it), and the mask of the whole vocabulary (paid where the winner was refused),
// new, with only the places inside rules known, and at a place that was met before.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/gbnf.h"
#include "engine/grammar_mask.h"
#include "engine/json_schema.h"
#include "gguf/reader.h"

namespace caravan {
namespace {

using Clock = std::chrono::steady_clock;

struct Case {
  const char* name;
  std::string grammar;
  std::string answer;
};

double microseconds(Clock::duration duration) { return std::chrono::duration<double, std::micro>(duration).count(); }

std::string summary(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  double sum = 0;
  for (const double time : times) sum += time;
  return fmt::format("{:9.1f} {:9.1f} {:9.1f}", sum / static_cast<double>(times.size()), times[times.size() / 2],
                     times.back());
}

std::vector<Case> cases() {
  using Json = nlohmann::ordered_json;
  const char* person = R"({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer",
      "minimum": 0, "maximum": 150}, "email": {"type": "string", "pattern": "^[a-z.]+@[a-z.]+$"}, "tags": {"type":
      "array", "items": {"enum": ["red", "green", "blue"]}}, "friends": {"type": "array", "items": {"$ref": "#"}}},
      "required": ["name", "age", "friends"]})";
  std::string words = "root ::= word (\" \" word)*\nword ::= ";
  for (int i = 0; i < 200; ++i) words += fmt::format("{}\"word{}{}\"", i == 0 ? "" : " | ", i, "abcdefgh"[i % 8]);
  return {
      {"any JSON", engine::grammar_for_schema(Json::object()),
       R"({"title": "A longer text with some words in it", "list": [1, 2.5, {"deep": [true, null, {"er": "x"}]}],
 "unicode": "Größe 漢字", "n": -12})"},
      {"schema", engine::grammar_for_schema(Json::parse(person)),
       R"({"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "tags": ["red", "blue"], "friends": )"
       R"([{"name": "Charles Babbage", "age": 79, "friends": [{"name": "Mary Somerville", "age": 91, "friends": []}]}]})"},
      {"200 words", words, "word0a word17b word103h word199h word8a word64a"},
      {"arithmetic", "root ::= e\ne ::= t ([-+*/] t)*\nt ::= [0-9]+ | \"(\" e \")\"",
       "(12+3)*(4/(5-6))-((7*(8+9))/10)*(((1)))"},
      {"any text", "root ::= .*", "Any text at all, which is what a model writes most of the time: Größe 漢字."},
  };
}

void run(const Case& test, const vocab::Vocabulary& vocabulary, const engine::TokenTrie& trie) {
  const engine::GrammarAutomaton automaton(
      engine::parse_gbnf(test.grammar, {static_cast<uint32_t>(vocabulary.size()), {}}));
  const auto tokens = vocabulary.tokenize(test.answer, vocab::AddSpecial::no, vocab::ParseSpecial::no);
  std::vector<double> winner, cold, warm_rules, warm;
  double n_allowed = 0;
  engine::GrammarMachine shared_machine(automaton);
  engine::GrammarMasks shared(shared_machine, trie, {});
  const auto time = [](std::vector<double>& times, const auto& work) {
    const auto start = Clock::now();
    work();
    times.push_back(microseconds(Clock::now() - start));
  };
  auto state = shared_machine.initial();
  std::string prefix;
  for (const int32_t token : tokens) {
    {
      engine::GrammarMachine machine(automaton);
      engine::GrammarMasks masks(machine, trie, {});
      const auto place = machine.step(machine.initial(), prefix);
      time(cold, [&] { masks.mask(place); });
    }
    time(winner, [&] { shared.allows(state, token); });
    time(warm_rules, [&] { n_allowed += shared.mask(state).count(); });
    time(warm, [&] { shared.mask(state); });
    prefix += vocabulary.piece(token, vocab::RenderSpecial::no);
    state = shared.after(state, token);
    if (state == engine::GrammarMachine::kDead)
      throw Error(fmt::format("{}: '{}' is not of the grammar", test.name, prefix));
  }
  const auto n = static_cast<double>(tokens.size());
  fmt::print("{} ({} tokens, {} nodes, {:.0f} tokens allowed on average)\n", test.name, tokens.size(),
             automaton.n_nodes(), n_allowed / n);
  fmt::print("  {:24} {:>9} {:>9} {:>9}\n", "us per token", "mean", "median", "most");
  fmt::print("  {:24} {}\n  {:24} {}\n  {:24} {}\n  {:24} {}\n", "winner only", summary(winner), "mask, nothing known",
             summary(cold), "mask, one answer", summary(warm_rules), "mask, place known", summary(warm));
}

}  // namespace
}  // namespace caravan

int main(int argc, char** argv) {
  using namespace caravan;
  if (argc != 2) {
    fmt::print(stderr, "usage: {} VOCABULARY.gguf\n", argv[0]);
    return 1;
  }
  try {
    const auto vocabulary = vocab::Vocabulary::load(gguf::Model::open(argv[1]).metadata());
    const auto start = Clock::now();
    const engine::TokenTrie trie(*vocabulary);
    fmt::print("{} tokens, trie of {} nodes in {:.0f} ms\n\n", vocabulary->size(), trie.nodes().size(),
               microseconds(Clock::now() - start) / 1000);
    for (const Case& test : cases()) run(test, *vocabulary, trie);
  } catch (const Error& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
