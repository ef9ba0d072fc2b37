// What a request asks of the engine, the events it is answered with, and the stream that carries them from the engine
// thread to whoever asked.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"
#include "engine/grammar_spec.h"
#include "engine/sampling_params.h"

namespace caravan::engine {

// Continue a prompt.
struct GenerateParams {
  std::vector<int32_t> prompt;  // token ids, BOS and the like included; not empty
  int32_t n_predict = -1;       // tokens at most; negative: until an end-of-generation token or the end of the context
  std::vector<std::string> stop;         // texts that end the answer and are not part of it
  std::vector<int32_t> rendered_tokens;  // control tokens whose text is part of the answer; sorted
  int32_t n_indent = 0;         // > 0: the answer ends before a line (the first excepted) that begins with fewer blanks
  int64_t max_predict_ms = -1;  // > 0: the answer ends with the first line that is complete after this time
  bool report_progress = false;  // ProgressEvents while the prompt is computed
  SamplingParams sampling;
  std::optional<GrammarSpec> grammar;  // the form of the answer; unset: any text
  // Take what earlier requests computed for the same beginning, and leave one's own for later ones.
  bool cache_prompt = true;
  std::optional<uint32_t> slot;  // runs in this slot (modulo their number), and waits until it is free; unset: in any
  // What stays when a full context is shifted (EngineOptions::context_shift): the first n_keep tokens (-1: the prompt),
  // and of the others all but the first n_discard (0: half).
  int32_t n_keep = 0, n_discard = 0;
};

// Which rows of the last hidden state are wanted, and how they become one vector.
enum class Pooling : uint8_t { none, mean, cls, last };

// Embed a text. The vectors are raw: pooling.h normalises them.
struct EmbedParams {
  std::vector<int32_t> tokens;  // special tokens included; not empty
  Pooling pooling = Pooling::mean;
};

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;  // natural logarithm
};

// The probabilities at one step: of the softmax over all raw logits, before biases, penalties and samplers; or
// (post_sampling) of the distribution that the token was drawn from.
struct StepProbabilities {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;  // the n_probs most likely, most likely first (ties: lowest id first)
  bool post_sampling = false;     // then no entry of top is impossible, and there may be fewer than n_probs
};

struct Timings {
  uint32_t cache_n = 0;      // prompt tokens taken from a cache
  uint32_t prompt_n = 0;     // prompt tokens evaluated: the others
  double prompt_ms = 0;      // from the first prefill to the first token
  uint32_t predicted_n = 0;  // tokens generated, the end-of-generation token included
  double predicted_ms = 0;   // from the first token to the last
};

// A piece of the answer. text is whole UTF-8 characters and holds nothing that could be the start of a stop string.
// tokens and probabilities belong to the text; a piece may hold several tokens (one character can take more than one)
// or, at the end, tokens without text. End-of-generation tokens are not listed.
struct TokenEvent {
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<StepProbabilities> probabilities;  // one per token when n_probs > 0, else empty
  Timings timings = {};                          // up to here
  uint32_t slot = 0;
};

// So much of the prompt is computed. After every batch until the first token, when report_progress is set.
struct ProgressEvent {
  uint32_t n_prompt_tokens = 0;
  uint32_t n_cached = 0;    // of these, taken from a cache
  uint32_t n_computed = 0;  // of these, done: the cached ones included
  double elapsed_ms = 0;    // since the first prefill
  uint32_t slot = 0;
};

enum class StopType : uint8_t {
  eos,    // an end-of-generation token
  limit,  // n_predict, n_indent, max_predict_ms, or the end of the context (then truncated is set)
  word,   // a stop string
};

// "eos", "limit" or "word".
std::string_view name(StopType type);

// The answer is complete.
struct FinalEvent {
  StopType stop_type = StopType::eos;
  std::string stopping_word;  // StopType::word
  bool truncated = false;     // the context was full: the answer ends there, or parts of the text were discarded
  uint32_t n_prompt_tokens = 0;
  uint32_t slot = 0;
  Timings timings;
};

// The result of an embedding, the only event of its stream: n_embd values per vector; one vector per token for
// Pooling::none, otherwise one.
struct EmbeddingEvent {
  std::vector<std::vector<float>> vectors;
  Timings timings;
};

// The request failed after it was accepted.
struct ErrorEvent {
  RequestError::Kind kind = RequestError::Kind::unavailable;
  std::string message;
};

using Event = std::variant<TokenEvent, ProgressEvent, FinalEvent, EmbeddingEvent, ErrorEvent>;

// True for the last event of a stream: everything but a TokenEvent or ProgressEvent.
bool ends_stream(const Event& event);

// The prompt does not fit the context. The message contains "exceeds the available context size".
class ContextExceededError : public RequestError {
 public:
  ContextExceededError(uint32_t n_prompt_tokens, uint32_t n_ctx);
  uint32_t n_prompt_tokens() const { return n_prompt_tokens_; }
  uint32_t n_ctx() const { return n_ctx_; }

 private:
  uint32_t n_prompt_tokens_, n_ctx_;
};

class StreamState;

// The reading end of a request. One consumer; its calls may come from any one thread at a time. Dropping it cancels
// the request. A consumer that leaves too much unread gets an ErrorEvent and its request is cancelled: the engine never
// waits for it. It may outlive the Engine.
class TokenStream {
 public:
  explicit TokenStream(std::shared_ptr<StreamState> state) : state_(std::move(state)) {}
  ~TokenStream();
  TokenStream(const TokenStream&) = delete;
  TokenStream& operator=(const TokenStream&) = delete;

  // The next event, or nullopt when none is there yet or the last one was already taken (then finished()).
  std::optional<Event> try_next();

  // The next event; waits for one at most timeout. nullopt: none came in time, or finished().
  std::optional<Event> next(std::chrono::milliseconds timeout);

  // True when the last event was taken, or the stream was cancelled: no more events will come.
  bool finished() const;

  // hook is called whenever something was pushed since, by the engine's thread, and at once by this thread if something
  // is waiting already. It must only post elsewhere: not block, not throw, not use this stream. Once set_notify({}) has
  // returned, the former hook does not run any more.
  void set_notify(std::function<void()> hook);

  // Stops the request and frees what it holds; from any thread, more than once. No event follows.
  void cancel();

  // The seed of the random stream: that of the request, or the one chosen for it.
  uint32_t seed() const;

 private:
  std::shared_ptr<StreamState> state_;  // shared with the engine, which may live shorter or longer than the consumer
};

}  // namespace caravan::engine
