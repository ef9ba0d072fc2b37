// What the OpenAI-style endpoints have in common: ids, usage, reasons of the end.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/generation.h"
#include "server/json.h"

namespace caravan::server {

// prefix and n random letters and digits, from the system's source of randomness.
std::string random_id(std::string_view prefix, size_t n = 32);

// Seconds since 1970.
int64_t unix_time();

// "b<version>-caravan", the system_fingerprint; /props shows it as build_info.
std::string build_info();

// "length" for a limit, else "stop".
const char* finish_reason(engine::StopType type);

// OpenAI's "usage" of one or several completions.
struct Usage {
  uint64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;

  // Adds a completion. counts_prompt: it is the first one of its prompt.
  void add(const engine::FinalEvent& end, bool counts_prompt);
  Json json() const;
};

// Of answers of which every n have one prompt.
Usage usage_of(const std::vector<Answer>& answers, size_t n);

// The members that every object of a response has: the same id and time in all of them.
class ResponseFrame {
 public:
  ResponseFrame(const Api& api, const char* object);
  Json object(Json choices) const;

 private:
  const Api& api_;
  const char* object_;
  std::string id_;
  int64_t created_;
};

}  // namespace caravan::server
