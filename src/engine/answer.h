// From sampled tokens to the text that goes out: whole UTF-8 characters, stop strings withheld and cut.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/request.h"
#include "vocab/vocabulary.h"

namespace caravan::engine {

// Finds the first stop string to be completed, however the text is cut into pieces. When several end at the same
// character the longest counts.
class StopMatcher {
 public:
  // Empty strings are ignored.
  explicit StopMatcher(std::vector<std::string> stop);

  struct Result {
    std::string text;                          // can no longer be part of a stop string
    std::optional<std::string> stopping_word;  // found: text is what stands before it, the rest is dropped
  };
  Result push(std::string_view text);
  // What was withheld: the end of the output.
  std::string finish();

 private:
  size_t length_of_possible_start() const;

  std::vector<std::string> stop_;
  std::string held_;  // a proper prefix of a stop string between calls
};

// Finds the first line, but for the very first, that begins with fewer than n_indent blanks (spaces or tabs).
class IndentWatch {
 public:
  // n_indent <= 0: none is looked for.
  explicit IndentWatch(int32_t n_indent) : n_indent_(n_indent) {}
  // The length of the part of text, which goes on where the former one ended, that stands before such a line's first
  // character that is no blank; nullopt: all of it.
  std::optional<size_t> find_end(std::string_view text);

 private:
  int32_t n_indent_;
  std::optional<int32_t> n_blanks_;  // of the line that begins here
};

// The text side of one answer.
class AnswerText {
 public:
  // The vocabulary must outlive this object.
  // rendered: sorted; control tokens that are not left out of the text.
  AnswerText(const vocab::Vocabulary& vocabulary, std::vector<std::string> stop, int32_t n_indent = 0,
             std::vector<int32_t> rendered = {});

  struct Result {
    std::optional<TokenEvent> event;           // what can go out now
    std::optional<std::string> stopping_word;  // the answer ends here
    bool indent_ended = false;                 // the same
  };
  // Adds a token that is not an end-of-generation token. Throws RequestError for an id outside the vocabulary.
  Result push(int32_t token, std::optional<StepProbabilities> probabilities);
  // The end of the answer without a stop string: everything withheld; nothing when the indentation ended it.
  Result finish();

 private:
  struct Pending {
    int32_t token;
    std::optional<StepProbabilities> probabilities;
    uint64_t text_begin;  // bytes of the answer before the token's text
  };
  std::optional<TokenEvent> release(std::string text, uint64_t tokens_before);

  std::string text_of(int32_t token);

  const vocab::Vocabulary& vocabulary_;
  std::vector<int32_t> rendered_;
  vocab::IncrementalDetokenizer detokenizer_;
  StopMatcher matcher_;
  IndentWatch indent_;
  bool ended_ = false;           // by a stop string or the indentation
  std::deque<Pending> pending_;  // tokens that were in no event yet
  uint64_t pushed_ = 0;          // bytes given to the matcher
  uint64_t released_ = 0;        // bytes that went out
};

}  // namespace caravan::engine
