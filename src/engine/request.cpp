#include "engine/request.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/stream_state.h"

namespace caravan::engine {
namespace {

uint64_t size_bytes(const Event& event) {
  uint64_t bytes = sizeof(Event);
  if (const auto* token = std::get_if<TokenEvent>(&event)) {
    bytes += token->text.size() + token->tokens.size() * sizeof(int32_t);
    for (const StepProbabilities& step : token->probabilities) {
      bytes += sizeof(step) + step.top.size() * sizeof(TokenLogprob);
    }
  } else if (const auto* embedding = std::get_if<EmbeddingEvent>(&event)) {
    for (const auto& vector : embedding->vectors) bytes += sizeof(vector) + vector.size() * sizeof(float);
  }
  return bytes;
}

}  // namespace

std::string_view name(StopType type) {
  switch (type) {
    case StopType::eos:
      return "eos";
    case StopType::limit:
      return "limit";
    case StopType::word:
      return "word";
  }
  CARAVAN_ASSERT(false, "the enum has no other value");
}

bool ends_stream(const Event& event) {
  return !std::holds_alternative<TokenEvent>(event) && !std::holds_alternative<ProgressEvent>(event);
}

ContextExceededError::ContextExceededError(uint32_t n_prompt_tokens, uint32_t n_ctx)
    : RequestError(fmt::format("the request ({} tokens) exceeds the available context size ({} tokens): shorten the "
                               "prompt or start the server with a larger context",
                               n_prompt_tokens, n_ctx),
                   Kind::context_exceeded),
      n_prompt_tokens_(n_prompt_tokens),
      n_ctx_(n_ctx) {}

void StreamState::push(Event event) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    const uint64_t bytes = size_bytes(event);
    // The last event always fits: it is what the consumer waits for, and nothing follows it.
    if (!ends_stream(event) && (events_.size() >= max_events_ || bytes_ + bytes > max_bytes_)) {
      events_.clear();
      bytes_ = 0;
      event = ErrorEvent{RequestError::Kind::unavailable,
                         fmt::format("the client reads too slowly: more than {} events or {} bytes were waiting for it",
                                     max_events_, max_bytes_)};
      cancelled_ = true;
    }
    closed_ = ends_stream(event);
    bytes_ += size_bytes(event);
    events_.push_back(std::move(event));
    pushed_.notify_all();
  }
  std::lock_guard lock(notify_mutex_);
  if (notify_) notify_();
}

bool StreamState::cancelled() const {
  std::lock_guard lock(mutex_);
  return cancelled_;
}

std::optional<Event> StreamState::take(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  if (timeout.count() > 0) pushed_.wait_for(lock, timeout, [this] { return !events_.empty() || closed_; });
  if (events_.empty()) return std::nullopt;
  Event event = std::move(events_.front());
  events_.pop_front();
  bytes_ = events_.empty() ? 0 : bytes_ - std::min(bytes_, size_bytes(event));
  return event;
}

bool StreamState::finished() const {
  std::lock_guard lock(mutex_);
  return closed_ && events_.empty();
}

void StreamState::set_notify(std::function<void()> hook) {
  std::lock_guard notify_lock(notify_mutex_);
  notify_ = std::move(hook);
  if (!notify_) return;
  bool waiting;
  {
    std::lock_guard lock(mutex_);
    waiting = !events_.empty() || closed_;
  }
  if (waiting) notify_();
}

void StreamState::cancel() {
  {
    std::lock_guard lock(mutex_);
    if (closed_ && !cancelled_) {  // complete: the engine holds nothing for it
      events_.clear();
      bytes_ = 0;
      return;
    }
    if (cancelled_) return;
    cancelled_ = closed_ = true;
    events_.clear();
    bytes_ = 0;
    pushed_.notify_all();
  }
  waker_->wake();
}

TokenStream::~TokenStream() {
  set_notify({});
  cancel();
}

std::optional<Event> TokenStream::try_next() { return state_->take(std::chrono::milliseconds(0)); }

std::optional<Event> TokenStream::next(std::chrono::milliseconds timeout) { return state_->take(timeout); }

bool TokenStream::finished() const { return state_->finished(); }

void TokenStream::set_notify(std::function<void()> hook) { state_->set_notify(std::move(hook)); }

void TokenStream::cancel() { state_->cancel(); }

uint32_t TokenStream::seed() const { return state_->seed(); }

}  // namespace caravan::engine
