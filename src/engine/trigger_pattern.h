// A regular expression from a request that is searched in an answer while it grows.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace caravan::engine {

class TriggerPattern {
 public:
  // whole: text must match from its first to its last byte, else any part of it may.
  // Throws RequestError(invalid) where the pattern (PCRE2 syntax, Unicode) has an error.
  TriggerPattern(const std::string& pattern, bool whole);
  ~TriggerPattern();
  TriggerPattern(TriggerPattern&&) noexcept;
  TriggerPattern& operator=(TriggerPattern&&) noexcept;

  // Where in text the first non-empty capture group begins, or the match when there is none; nullopt: no match. text
  // may end inside a character. Throws RequestError when the search would take too long.
  std::optional<size_t> find(std::string_view text) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace caravan::engine
