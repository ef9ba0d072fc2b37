// caravan cli (llama-cli): a completion in the terminal.
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <iostream>

#include "base/file.h"
#include "base/log.h"
#include "commands.h"
#include "engine/engine.h"
#include "model_options.h"

namespace caravan::app {
namespace {

struct CliOptions {
  ModelOptions model;
  engine::SamplingParams sampling;
  std::string prompt;
  bool has_prompt = false, interactive = false, escape = true, display_prompt = true, special = false;
  int n_predict = -1;
  std::vector<std::string> stop;
};

std::atomic<int> interrupts{0};  // set by the signal handler, which can reach nothing else
extern "C" void count_interrupt(int) { interrupts.fetch_add(1); }

OptionParser make_parser(CliOptions& o) {
  OptionParser parser("caravan cli -m FILE -p TEXT [-n N] [--rpc HOST:PORT,...] [options]",
                      "Continues a prompt in the terminal. Also runs under the name llama-cli.\n"
                      "Ctrl-C ends the answer; with -i the next line of input continues the text.");
  add_model_options(parser, o.model);
  parser.section("Text");
  parser.add({{"-p", "--prompt"}, "TEXT", "text to continue", {}, [&o](const std::string& value) {
                o.prompt = value;
                o.has_prompt = true;
              }});
  parser.add({{"-f", "--file"}, "FILE", "file that holds the prompt", {}, [&o](const std::string& value) {
                o.prompt = read_text_file(value);
                if (!o.prompt.empty() && o.prompt.back() == '\n') o.prompt.pop_back();
                o.has_prompt = true;
                o.escape = false;
              }});
  parser.add({{"-n", "--predict", "--n-predict"},
              "N",
              "most tokens of the answer, -1: no limit (-1)",
              {"LLAMA_ARG_N_PREDICT"},
              into(o.n_predict, -2, INT32_MAX)});
  parser.add(
      {{"-i", "--interactive"}, "", "read further lines from the terminal after the answer", {}, into(o.interactive)});
  parser.add({{"-r", "--reverse-prompt"},
              "TEXT",
              "end the answer at TEXT; may be repeated",
              {},
              [&o](const std::string& value) { o.stop.push_back(unescape(value)); }});
  parser.add({{"--no-display-prompt"}, "", "print the answer only", {}, into(o.display_prompt, false)});
  parser.add({{"--no-escape"}, "", "take backslashes in -p as they are", {}, into(o.escape, false)});
  parser.add({{"-sp", "--special"}, "", "recognise special tokens in the prompt", {}, into(o.special)});
  add_sampling_options(parser, o.sampling);
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  parser.accepted({"-no-cnv", "--no-conversation"}, "", "the prompt is always continued as it is");
  parser.accepted({"-e", "--escape"}, "", "escapes in -p are processed unless --no-escape is given");
  parser.accepted({"--simple-io"}, "", "nothing is ever drawn");
  parser.unsupported({"-cnv",
                      "--conversation",
                      "-if",
                      "--interactive-first",
                      "-sys",
                      "--system-prompt",
                      "-sysf",
                      "--in-prefix",
                      "--in-suffix",
                      "--multiline-input",
                      "-mli",
                      "--color",
                      "--prompt-cache",
                      "-bf",
                      "--binary-file",
                      "--keep",
                      "--chat-template",
                      "--verbose-prompt",
                      "-st",
                      "--single-turn"});
  return parser;
}

struct Answer {
  std::vector<int32_t> tokens;
  engine::Timings timings;
  std::string ending;  // said after the text
};

// Prints the answer as it comes. Throws RequestError when it fails.
Answer generate(engine::Engine& engine, std::vector<int32_t> prompt, const CliOptions& options) {
  engine::GenerateParams params;
  params.prompt = std::move(prompt);
  params.n_predict = options.n_predict;
  params.stop = options.stop;
  params.sampling = options.sampling;
  const int interrupts_before = interrupts.load();
  const auto stream = engine.submit(std::move(params));
  Answer answer;
  const auto start = std::chrono::steady_clock::now();
  std::optional<std::chrono::steady_clock::time_point> first_token;
  while (!stream->finished()) {
    constexpr auto kInterruptCheck = std::chrono::milliseconds(50);
    const auto event = stream->next(kInterruptCheck);
    if (interrupts.load() != interrupts_before) {
      stream->cancel();
      const auto now = std::chrono::steady_clock::now();
      const auto ms = [](auto duration) { return std::chrono::duration<double, std::milli>(duration).count(); };
      answer.timings.predicted_n = static_cast<uint32_t>(answer.tokens.size());
      answer.timings.prompt_ms = ms(first_token.value_or(now) - start);
      answer.timings.predicted_ms = first_token ? ms(now - *first_token) : 0;
      answer.ending = " [interrupted]";
      break;
    }
    if (!event) continue;
    if (const auto* token = std::get_if<engine::TokenEvent>(&*event)) {
      if (!first_token) first_token = std::chrono::steady_clock::now();
      answer.tokens.insert(answer.tokens.end(), token->tokens.begin(), token->tokens.end());
      std::fwrite(token->text.data(), 1, token->text.size(), stdout);
      std::fflush(stdout);
    } else if (const auto* end = std::get_if<engine::FinalEvent>(&*event)) {
      answer.timings = end->timings;
      if (end->stop_type == engine::StopType::eos && !options.interactive) answer.ending = " [end of text]";
    } else if (const auto* error = std::get_if<engine::ErrorEvent>(&*event)) {
      throw RequestError(error->message, error->kind);
    }
  }
  return answer;
}

void print_timings(const engine::Timings& t) {
  const auto rate = [](double n, double ms) { return ms > 0 ? n * 1000 / ms : 0.0; };
  // The first token comes with the prompt: the time between tokens counts from it.
  const double steps = t.predicted_n > 0 ? t.predicted_n - 1 : 0;
  fmt::print(stderr, "\n[ prompt: {} tokens, {:.1f} tokens/s | generation: {} tokens, {:.1f} tokens/s ]\n", t.prompt_n,
             rate(t.prompt_n, t.prompt_ms), t.predicted_n, rate(steps, t.predicted_ms));
}

void install_interrupt_handler() {
  struct sigaction action{};
  action.sa_handler = count_interrupt;  // without SA_RESTART: reading a line ends too
  sigaction(SIGINT, &action, nullptr);
}

}  // namespace

int run_cli(int argc, char** argv) {
  CliOptions options;
  OptionParser parser = make_parser(options);
  options.model.n_parallel = 1;
  options.model.log_level = isatty(STDERR_FILENO) == 1 ? "warn" : "info";
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  if (!options.has_prompt && !options.interactive)
    throw RequestError("no prompt: give one with -p TEXT or -f FILE, or use -i");

  OpenedModel opened(options.model);
  if (!opened.hyperparameters().causal) throw RequestError("this model is an encoder: use `caravan embedding`");
  engine::validate(options.sampling, opened.hyperparameters().n_vocab);
  engine::Engine engine(opened.pipeline(), opened.vocabulary());
  start(opened, engine);
  install_interrupt_handler();

  const auto special = options.special ? vocab::ParseSpecial::yes : vocab::ParseSpecial::no;
  std::string text = options.escape ? unescape(options.prompt) : options.prompt;
  std::vector<int32_t> context = opened.vocabulary().tokenize(text, vocab::AddSpecial::yes, special);
  if (options.display_prompt) fmt::print("{}", text);
  bool pending = options.has_prompt;
  for (;;) {
    if (pending) {
      const Answer answer = generate(engine, context, options);
      context.insert(context.end(), answer.tokens.begin(), answer.tokens.end());
      fmt::print("{}\n", answer.ending);
      std::fflush(stdout);
      print_timings(answer.timings);
    }
    if (!options.interactive) return 0;
    fmt::print("\n> ");
    std::fflush(stdout);
    if (!std::getline(std::cin, text)) return interrupts.load() > 0 ? 130 : 0;
    const auto more = opened.vocabulary().tokenize(text + "\n", vocab::AddSpecial::no, special);
    context.insert(context.end(), more.begin(), more.end());
    pending = true;
  }
}

}  // namespace caravan::app
