// caravan cli (llama-cli): a conversation in the terminal, or the continuation of a text.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <optional>

#include "base/file.h"
#include "base/log.h"
#include "chat_loop.h"
#include "commands.h"
#include "engine/grammar.h"
#include "generate.h"
#include "grammar_options.h"
#include "interrupts.h"
#include "line_reader.h"

namespace caravan::app {
namespace {

struct CliOptions {
  ModelOptions model;
  engine::SamplingParams sampling;
  std::optional<engine::GrammarSpec> grammar;
  std::string prompt, system_prompt;
  server::ChatSettings chat;
  server::Json template_arguments = server::Json::object();
  std::optional<bool> conversation;  // -cnv, -no-cnv
  bool has_prompt = false, interactive = false, interactive_first = false, single_turn = false;
  bool escape = true, display_prompt = true, special = false, shows_timings = true;
  MessageEnd message_end = MessageEnd::by_line;
  ColorMode colors = ColorMode::automatic;
  int n_predict = -1;
  std::vector<std::string> stop;
};

std::string read_text_argument(const std::string& path) {
  std::string text = read_text_file(path);
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

void add_chat_options(OptionParser& parser, CliOptions& o) {
  parser.section("Conversation");
  parser.add({{"-cnv", "--conversation"},
              "",
              "talk, with -p as the first message (the default without -p, -f and -i if the model has a chat template)",
              {},
              [&o](const std::string&) { o.conversation = true; }});
  parser.add({{"-no-cnv", "--no-conversation"}, "", "continue the prompt as it is", {}, [&o](const std::string&) {
                o.conversation = false;
              }});
  parser.add({{"-sys", "--system-prompt"},
              "TEXT",
              "what the model is told before the first message",
              {},
              into(o.system_prompt)});
  parser.add({{"-sysf", "--system-prompt-file"}, "FILE", "file that holds it", {}, [&o](const std::string& value) {
                o.system_prompt = read_text_argument(value);
              }});
  parser.add({{"-st", "--single-turn"}, "", "end after the answer to -p", {}, into(o.single_turn)});
  parser.add({{"-mli", "--multiline-input"},
              "",
              "a message ends with a line that ends in a backslash",
              {},
              [&o](const std::string&) { o.message_end = MessageEnd::until_backslash; }});
  parser.add({{"--chat-template"},
              "TEMPLATE",
              "chat template: Jinja source, or a name such as chatml (the model's own)",
              {"LLAMA_ARG_CHAT_TEMPLATE"},
              into(o.chat.chat_template)});
  parser.add({{"--chat-template-file"},
              "FILE",
              "the same from a file",
              {"LLAMA_ARG_CHAT_TEMPLATE_FILE"},
              [&o](const std::string& value) { o.chat.chat_template = read_text_argument(value); }});
  parser.add({{"--reasoning-format"},
              "FORMAT",
              "auto, deepseek: reasoning is marked and dimmed; none: shown as the model writes it (auto)",
              {"LLAMA_ARG_THINK"},
              [&o](const std::string& value) {
                if (value != "auto" && value != "deepseek" && value != "none")
                  throw RequestError("expected auto, deepseek or none, found '" + value + "'");
                o.chat.reasoning_format = value;
              }});
  parser.add({{"--chat-template-kwargs"},
              "JSON",
              "an object with more variables for the template",
              {"LLAMA_ARG_CHAT_TEMPLATE_KWARGS"},
              [&o](const std::string& value) {
                o.template_arguments = server::Json::parse(value, nullptr, false);
                if (!o.template_arguments.is_object())
                  throw RequestError("expected a JSON object, found '" + value + "'");
              }});
  parser.add({{"--color", "--colors"},
              "[on|off|auto]",
              "colours (auto: on a terminal, unless NO_COLOR is set)",
              {},
              [&o](const std::string& value) { o.colors = parse_color_mode(value); }});
  parser.add({{"--no-show-timings"}, "", "no speed after an answer", {}, into(o.shows_timings, false)});
}

OptionParser make_parser(CliOptions& o) {
  OptionParser parser(
      "caravan cli -m FILE [-p TEXT] [-n N] [--rpc HOST:PORT,...] [options]",
      "Talks with a model in the terminal, or continues a text (-p). Also runs under the name llama-cli.\n"
      "Ctrl-C ends the answer, and the program where a message is expected. /help lists the commands of a\n"
      "conversation; with -i a text goes on with the next line of input.");
  add_model_options(parser, o.model);
  parser.section("Text");
  parser.add({{"-p", "--prompt"}, "TEXT", "text to continue, or the first message", {}, [&o](const std::string& value) {
                o.prompt = value;
                o.has_prompt = true;
              }});
  parser.add({{"-f", "--file"}, "FILE", "file that holds the prompt", {}, [&o](const std::string& value) {
                o.prompt = read_text_argument(value);
                o.has_prompt = true;
                o.escape = false;
              }});
  parser.add({{"-n", "--predict", "--n-predict"},
              "N",
              "most tokens of the answer, -1: no limit (-1)",
              {"LLAMA_ARG_N_PREDICT"},
              into(o.n_predict, -2, INT32_MAX)});
  parser.add(
      {{"-if", "--interactive-first"}, "", "a conversation that begins with input", {}, into(o.interactive_first)});
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
  add_chat_options(parser, o);
  add_sampling_options(parser, o.sampling);
  add_grammar_options(parser, o.grammar);
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  parser.accepted({"-e", "--escape"}, "", "escapes in -p are processed unless --no-escape is given");
  parser.accepted({"--simple-io"}, "", "lines are edited on terminals only");
  parser.accepted({"--show-timings"}, "", "the speed is said unless --no-show-timings is given");
  parser.accepted({"--jinja"}, "", "chat templates are always Jinja");
  parser.unsupported({"--no-jinja", "--in-prefix", "--in-suffix", "--in-prefix-bos", "--prompt-cache", "-bf",
                      "--binary-file", "--keep", "--verbose-prompt", "--image", "--server-base"});
  return parser;
}

// Whether to hold a conversation: as told, else where no text was given to continue and the model knows how.
bool wants_chat(const CliOptions& o, const vocab::Vocabulary& vocabulary) {
  if (o.conversation) return *o.conversation;
  if (!o.system_prompt.empty() || o.single_turn || o.interactive_first) return true;
  if (o.has_prompt || o.interactive) return false;
  return !o.chat.chat_template.empty() || vocabulary.chat_template().has_value();
}

std::string prompt_text(const CliOptions& o) { return o.escape ? unescape(o.prompt) : o.prompt; }

engine::GenerateParams generate_params(const CliOptions& o) {
  engine::GenerateParams params;
  params.n_predict = o.n_predict;
  params.stop = o.stop;
  params.sampling = o.sampling;
  params.grammar = o.grammar;
  return params;
}

ChatOptions chat_options(const CliOptions& o) {
  ChatOptions chat;
  chat.system_prompt = o.escape ? unescape(o.system_prompt) : o.system_prompt;
  chat.settings = o.chat;
  chat.template_arguments = o.template_arguments;
  if (o.has_prompt) chat.first_message = prompt_text(o);
  if (o.single_turn && !o.has_prompt) throw RequestError("--single-turn needs the message: give it with -p or -f");
  chat.single_turn = o.single_turn;
  chat.message_end = o.message_end;
  chat.colors = o.colors;
  chat.shows_timings = o.shows_timings;
  chat.generate = generate_params(o);
  return chat;
}

// Continues the prompt; with -i then every line of input.
int run_completion(OpenedModel& opened, engine::Engine& engine, const CliOptions& options) {
  const auto special = options.special ? vocab::ParseSpecial::yes : vocab::ParseSpecial::no;
  const std::string text = prompt_text(options);
  std::vector<int32_t> context = opened.vocabulary().tokenize(text, vocab::AddSpecial::yes, special);
  if (options.display_prompt) fmt::print("{}", text);
  LineReader reader(LineReader::ShowsPrompt::yes);
  bool pending = options.has_prompt;
  for (;;) {
    if (pending) {
      engine::GenerateParams params = generate_params(options);
      params.prompt = context;
      const Answer answer = generate(engine, std::move(params), [](std::string_view piece) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      });
      context.insert(context.end(), answer.tokens.begin(), answer.tokens.end());
      if (answer.end == Answer::End::interrupted) fmt::print(" [interrupted]");
      if (answer.end == Answer::End::eos && !options.interactive) fmt::print(" [end of text]");
      fmt::print("\n");
      std::fflush(stdout);
      if (options.shows_timings) fmt::print(stderr, "\n{}\n", describe(answer.timings));
    }
    if (!options.interactive) return 0;
    fmt::print("\n");
    const Input line =
        read_message([&](std::string_view prompt) { return reader.read_line(prompt); }, options.message_end);
    if (line.state == Input::State::interrupted) return 130;
    if (line.state == Input::State::end) return 0;
    const auto more = opened.vocabulary().tokenize(line.text + "\n", vocab::AddSpecial::no, special);
    context.insert(context.end(), more.begin(), more.end());
    pending = true;
  }
}

}  // namespace

int run_cli(int argc, char** argv) {
  CliOptions options;
  OptionParser parser = make_parser(options);
  options.model.n_parallel = 1;
  options.model.log_level = isatty(STDERR_FILENO) == 1 ? "warn" : "info";
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));

  OpenedModel opened(options.model);
  if (!opened.hyperparameters().causal) throw RequestError("this model is an encoder: use `caravan embedding`");
  const bool chats = wants_chat(options, opened.vocabulary());
  if (!chats && !options.has_prompt && !options.interactive)
    throw RequestError(
        "no prompt: give one with -p TEXT or -f FILE, or use -i; talk with -cnv (the model has no chat template)");
  const ChatOptions chat = chats ? chat_options(options) : ChatOptions{};
  engine::validate(options.sampling, opened.hyperparameters().n_vocab);
  if (options.grammar) engine::GrammarCompiler(opened.vocabulary()).compile(*options.grammar);  // before the load
  engine::EngineOptions engine_options;
  engine_options.recovery_timeout = std::chrono::seconds(options.model.recovery_timeout_s);
  engine::Engine engine(opened.pipeline(), opened.vocabulary(), engine_options);
  start(opened, engine);
  count_interrupts();
  return chats ? run_chat(opened, engine, chat) : run_completion(opened, engine, options);
}

}  // namespace caravan::app
