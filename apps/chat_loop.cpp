#include "chat_loop.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

#include "base/file.h"
#include "conversation.h"
#include "generate.h"
#include "interrupts.h"
#include "line_reader.h"
#include "server/chat_format.h"

namespace caravan::app {
namespace {

constexpr const char* kHelp =
    "  /clear        forget the conversation, but for the system prompt\n"
    "  /regen        answer the last message again\n"
    "  /read FILE    put the text of a file in front of the next message\n"
    "  /save FILE    write the conversation to a file (JSON)\n"
    "  /load FILE    go on with a saved conversation\n"
    "  /stats        how full the context is, and the speed of the last answer\n"
    "  /exit         end (also Ctrl-D, or Ctrl-C where a message is expected)\n"
    "A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of several lines. Ctrl-C ends an "
    "answer.\n";

// Prints an answer as it comes: reasoning dimmed and between marks, then the content.
class AnswerPrinter {
 public:
  explicit AnswerPrinter(Style style) : style_(style) {}

  void print(const std::vector<chat::Delta>& deltas) {
    for (const chat::Delta& part : deltas) {
      if (part.kind == chat::Delta::Kind::reasoning) {
        if (reasoning_.empty()) write(fmt::format("{}[Start thinking]\n", style_.dim()));
        reasoning_ += part.text;
      } else {
        end_reasoning();
        content_ += part.text;
      }
      write(part.text);
    }
    std::fflush(stdout);
  }
  void finish() {
    end_reasoning();
    write("\n");
    std::fflush(stdout);
  }
  Message message() const { return {"assistant", content_, reasoning_}; }

 private:
  static void write(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

  void end_reasoning() {
    if (reasoning_.empty() || reasoning_ended_) return;
    write(fmt::format("\n[End thinking]{}\n\n", style_.plain()));
    reasoning_ended_ = true;
  }

  Style style_;
  std::string reasoning_, content_;
  bool reasoning_ended_ = false;
};

class ChatLoop {
 public:
  ChatLoop(OpenedModel& opened, engine::Engine& engine, const ChatOptions& options)
      : vocabulary_(opened.vocabulary()),
        engine_(engine),
        options_(options),
        format_(options.settings, opened.vocabulary()),
        conversation_(options.system_prompt),
        reader_(LineReader::ShowsPrompt::no),
        style_(uses_colors(options.colors, STDOUT_FILENO)),
        notes_style_(uses_colors(options.colors, STDERR_FILENO)) {}

  int run() {
    if (options_.first_message) {
      answer_message(*options_.first_message);
      if (options_.single_turn) return 0;
    } else if (reader_.edits()) {
      note("type a message; /help lists the commands");
    }
    for (;;) {
      const Input input =
          read_message([this](std::string_view prompt) { return reader_.read_line(prompt); }, options_.message_end);
      if (input.state == Input::State::interrupted) return 130;
      if (input.state == Input::State::end) return 0;
      const ChatCommand command = parse_command(input.text);
      if (command.name == "exit" || command.name == "quit") return 0;
      if (!command.name.empty()) {
        run_command(command);
      } else if (!input.text.empty()) {
        answer_message(input.text);
      }
    }
  }

 private:
  // To standard error, so that standard output holds answers only.
  void note(std::string_view text) const {
    fmt::print(stderr, "{}{}{}\n", notes_style_.dim(), text, notes_style_.plain());
  }

  void run_command(const ChatCommand& command) {
    try {
      if (command.name == "clear") {
        conversation_.clear();
        pending_text_.clear();
        note("the conversation is empty");
      } else if (command.name == "regen") {
        if (!conversation_.take_back_answer()) throw RequestError("there is no answer yet");
        answer();
      } else if (command.name == "read") {
        pending_text_ += read_text_file(with_argument(command));
        note(fmt::format("{} bytes go in front of the next message", pending_text_.size()));
      } else if (command.name == "save") {
        conversation_.save(with_argument(command));
        note(fmt::format("saved {} messages to {}", conversation_.messages().size(), command.argument));
      } else if (command.name == "load") {
        conversation_.load(with_argument(command));
        note(fmt::format("loaded {} messages from {}", conversation_.messages().size(), command.argument));
      } else if (command.name == "stats") {
        print_stats();
      } else if (command.name == "help") {
        fmt::print(stderr, "{}", kHelp);
      } else {
        throw RequestError(fmt::format(
            "unknown command /{}; /help lists them. Put a space in front of a message that begins with a slash",
            command.name));
      }
    } catch (const Error& error) {
      report(error);
    }
  }

  static const std::string& with_argument(const ChatCommand& command) {
    if (command.argument.empty()) throw RequestError(fmt::format("/{} needs the name of a file", command.name));
    return command.argument;
  }

  // A person can do something about it; a script has to hear of it.
  void report(const Error& error) const {
    if (!reader_.edits()) throw RequestError(error.what());
    fmt::print(stderr, "error: {}\n", error.what());
  }

  void answer_message(const std::string& text) {
    conversation_.add({"user", pending_text_ + text, ""});
    pending_text_.clear();
    try {
      answer();
    } catch (const Error& error) {
      conversation_.take_back_question();
      report(error);
    }
  }

  // Answers the last message of the conversation.
  void answer() {
    server::ChatFormat::Conversation conversation;
    conversation.messages = conversation_.to_json();
    conversation.extra = options_.template_arguments;
    const server::ChatFormat::Prompt prompt = format_.render(conversation);
    engine::GenerateParams params = options_.generate;
    params.prompt = vocabulary_.tokenize(prompt.text, vocab::AddSpecial::yes, vocab::ParseSpecial::yes);
    params.rendered_tokens = format_.marks_in_vocabulary(*prompt.syntax);
    const bool tells_reasoning = options_.settings.reasoning_format != "none";
    chat::OutputParser parser(*prompt.syntax, {false, tells_reasoning, prompt.reasoning_open});
    AnswerPrinter printer(style_);
    last_ = generate(engine_, std::move(params), [&](std::string_view text) { printer.print(parser.push(text)); });
    printer.print(parser.finish());
    printer.finish();
    conversation_.add(printer.message());
    if (last_->end == Answer::End::interrupted) note("[interrupted]");
    if (last_->end == Answer::End::limit) note("[the answer was cut: -n or the end of the context]");
    if (options_.shows_timings) note(describe(last_->timings));
  }

  void print_stats() const {
    const auto plan = engine_.status().plan;
    fmt::print(stderr, "messages: {}\n", conversation_.messages().size());
    const size_t n_used = last_ ? last_->n_prompt_tokens + last_->tokens.size() : 0;
    fmt::print(stderr, "context: {} of {} tokens after the last answer\n", n_used, plan ? plan->n_ctx : 0);
    if (last_) fmt::print(stderr, "last answer: {}\n", describe(last_->timings));
  }

  const vocab::Vocabulary& vocabulary_;
  engine::Engine& engine_;
  const ChatOptions& options_;
  server::ChatFormat format_;
  Conversation conversation_;
  LineReader reader_;
  Style style_, notes_style_;
  std::string pending_text_;  // of /read
  std::optional<Answer> last_;
};

}  // namespace

int run_chat(OpenedModel& opened, engine::Engine& engine, const ChatOptions& options) {
  return ChatLoop(opened, engine, options).run();
}

}  // namespace caravan::app
