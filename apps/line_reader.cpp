#include "line_reader.h"

#include <fmt/format.h>
#include <histedit.h>
#include <poll.h>
#include <unistd.h>

#include <clocale>
#include <cstdio>
#include <iostream>
#include <string>

#include "interrupts.h"
#include "vocab/utf8.h"

namespace caravan::app {
namespace {

// libedit writes characters as the locale says. Names of files and the like stay bytes.
void use_utf8_locale() {
  const char* name = std::setlocale(LC_CTYPE, "");
  const std::string_view charset = name == nullptr ? "" : name;
  if (charset.find("UTF-8") == std::string_view::npos && charset.find("utf8") == std::string_view::npos)
    std::setlocale(LC_CTYPE, "C.UTF-8");
}

std::string to_utf8(std::wstring_view text) {
  std::string out;
  for (const wchar_t c : text) vocab::append_utf8(out, static_cast<char32_t>(c));
  return out;
}

}  // namespace

// libedit's editor of wide lines. Only its address is known to libedit, as client data.
class LineReader::Editor {
 public:
  Editor() : editor_(el_init("caravan", stdin, stdout, stderr)), history_(history_winit()) {
    if (editor_ == nullptr || history_ == nullptr) return;
    HistEventW event;
    history_w(history_, &event, H_SETSIZE, kHistoryLines);
    history_w(history_, &event, H_SETUNIQUE, 1);
    el_wset(editor_, EL_CLIENTDATA, this);
    el_wset(editor_, EL_EDITOR, L"emacs");
    el_wset(editor_, EL_HIST, history_w, history_);
    el_wset(editor_, EL_PROMPT, &Editor::prompt_of);
    el_wset(editor_, EL_GETCFN, &Editor::read_character);
    el_source(editor_, nullptr);  // the user's ~/.editrc
  }
  ~Editor() {
    if (history_ != nullptr) history_wend(history_);
    if (editor_ != nullptr) el_end(editor_);
  }
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;

  bool is_usable() const { return editor_ != nullptr && history_ != nullptr; }

  Input read_line(std::string_view prompt) {
    prompt_.assign(prompt.begin(), prompt.end());
    interrupts_before_ = interrupt_count();
    int n = 0;
    const wchar_t* line = el_wgets(editor_, &n);
    if (interrupt_count() != interrupts_before_) {
      fmt::print("\n");
      return {Input::State::interrupted, ""};
    }
    if (line == nullptr || n <= 0) return {Input::State::end, ""};
    std::wstring_view text(line, static_cast<size_t>(n));
    while (!text.empty() && (text.back() == L'\n' || text.back() == L'\r')) text.remove_suffix(1);
    HistEventW event;
    if (!text.empty()) history_w(history_, &event, H_ENTER, std::wstring(text).c_str());
    return {Input::State::text, to_utf8(text)};
  }

 private:
  static constexpr int kHistoryLines = 1000;

  static Editor* of(EditLine* editor) {
    void* self = nullptr;
    el_wget(editor, EL_CLIENTDATA, &self);
    return static_cast<Editor*>(self);
  }

  static wchar_t* prompt_of(EditLine* editor) { return of(editor)->prompt_.data(); }

  // libedit's own reader goes on after a signal; this one looks for interrupts while it waits.
  static int read_character(EditLine* editor, wchar_t* out) {
    Editor* self = of(editor);
    for (;;) {
      if (interrupt_count() != self->interrupts_before_) return -1;
      constexpr int kInterruptCheckMs = 100;
      pollfd wanted{STDIN_FILENO, POLLIN, 0};
      if (poll(&wanted, 1, kInterruptCheckMs) <= 0) continue;
      char byte = 0;
      const ssize_t n = read(STDIN_FILENO, &byte, 1);
      if (n == 0) return 0;
      if (n < 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        return -1;
      }
      self->partial_ += byte;
      const vocab::Utf8Char c = vocab::decode_utf8(self->partial_, 0);
      if (c.state == vocab::Utf8Char::State::incomplete) continue;
      *out = static_cast<wchar_t>(c.code_point);
      self->partial_.clear();
      return 1;
    }
  }

  EditLine* editor_;
  HistoryW* history_;
  std::wstring prompt_;
  std::string partial_;  // the beginning of a character
  int interrupts_before_ = 0;
};

LineReader::LineReader(ShowsPrompt shows_prompt) : shows_prompt_(shows_prompt) {
  if (isatty(STDIN_FILENO) == 0 || isatty(STDOUT_FILENO) == 0) return;
  use_utf8_locale();
  auto editor = std::make_unique<Editor>();
  if (editor->is_usable()) editor_ = std::move(editor);
}

LineReader::~LineReader() = default;

Input LineReader::read_line(std::string_view prompt) {
  std::fflush(stdout);
  if (editor_) return editor_->read_line(prompt);
  if (shows_prompt_ == ShowsPrompt::yes) {
    fmt::print("{}", prompt);
    std::fflush(stdout);
  }
  Input line;
  const int interrupts_before = interrupt_count();
  if (!std::getline(std::cin, line.text))
    line.state = interrupt_count() != interrupts_before ? Input::State::interrupted : Input::State::end;
  return line;
}

}  // namespace caravan::app
