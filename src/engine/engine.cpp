// The engine's thread: takes requests in, drives scheduler and pipeline, turns rows into events.
#include "engine/engine.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/pooling.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/stream_state.h"
#include "vocab/vocabulary.h"

namespace caravan::engine {
namespace {

using Clock = Sequence::Clock;

// poll() ends when there is something to do; this only bounds the damage of a pipeline that forgets to.
constexpr std::chrono::milliseconds kIdlePoll{500};

double milliseconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

double milliseconds(std::optional<Clock::time_point> from, std::optional<Clock::time_point> to) {
  return from && to ? milliseconds(*from, *to) : 0;
}

void check_tokens(const std::vector<int32_t>& tokens, const PlanSummary& plan, std::string_view what) {
  if (tokens.empty()) throw RequestError(fmt::format("{}: expected at least one token, found none", what));
  for (const int32_t token : tokens) {
    if (token < 0 || static_cast<uint32_t>(token) >= plan.n_vocab) {
      throw RequestError(fmt::format("{}: expected token ids below {}, found {}", what, plan.n_vocab, token));
    }
  }
}

// Throws when the sequence cannot be computed under this plan, whatever else runs.
void check_fits(const PlanSummary& plan, uint32_t n_prompt, bool embeds) {
  if (is_encoder(plan) && n_prompt > plan.max_rows) {
    throw RequestError(
        fmt::format("the input ({} tokens) is too large to process: an encoder takes a text in one "
                    "batch, and the batch size is {} tokens",
                    n_prompt, plan.max_rows));
  }
  // An embedding needs no room for an answer.
  const uint32_t n_ctx = effective_context(plan);
  if (embeds ? n_prompt > n_ctx : n_prompt >= n_ctx) throw ContextExceededError(n_prompt, n_ctx);
}

}  // namespace

class Engine::Impl {
 public:
  Impl(Pipeline& pipeline, const vocab::Vocabulary& vocabulary, EngineOptions options)
      : pipeline_(pipeline),
        vocabulary_(vocabulary),
        options_(options),
        waker_(std::make_shared<Waker>(pipeline)),
        scheduler_(options.n_parallel, options.max_in_flight),
        thread_([this] { run(); }) {}

  ~Impl() { shutdown(std::chrono::milliseconds(0)); }

  std::shared_ptr<TokenStream> submit(GenerateParams params);
  std::shared_ptr<TokenStream> embed(EmbedParams params);
  EngineStatus status() const;
  bool wait_until_ready(std::chrono::milliseconds timeout) const;
  void shutdown(std::chrono::milliseconds grace);

 private:
  // Any thread, with mutex_ held.
  const PlanSummary& usable_plan() const;
  std::shared_ptr<TokenStream> accept(std::unique_ptr<Sequence> sequence, uint32_t seed);

  // The engine's thread.
  void run();
  bool take_inbox();
  void drop_cancelled();
  void submit_batches();
  void publish();
  void flush_outbox();
  void handle(PipelineEvent event);
  void on(Completion completion);
  void on(const TicketFailed& failed);
  void batch_failed(const ScheduledBatch& scheduled, const std::string& reason);
  void on(const PlanReady& ready);
  void on(const PlanLost& lost);
  void take_result(const BatchPart& part, std::span<const stage::RowOutput> rows);
  void report_progress(const Sequence& sequence, const BatchPart& part);
  void take_hidden(Sequence& sequence, const BatchPart& part, std::span<const stage::RowOutput> rows);
  void note_first_token(Sequence& sequence);
  void take_token(Sequence& sequence, const stage::RowOutput& row);
  void finish(Sequence& sequence, StopType stop_type, std::string stopping_word, bool truncated);
  void fail(uint64_t id, RequestError::Kind kind, const std::string& message);
  void fail_all(RequestError::Kind kind, const std::string& message);
  void end(uint64_t id);
  Timings timings(const Sequence& sequence) const;
  void send(const Sequence& sequence, Event event) { outbox_.emplace_back(sequence.stream, std::move(event)); }

  Pipeline& pipeline_;
  const vocab::Vocabulary& vocabulary_;
  const EngineOptions options_;
  const std::shared_ptr<Waker> waker_;

  mutable std::mutex mutex_;  // guards the members up to the blank line
  mutable std::condition_variable changed_;
  std::vector<std::unique_ptr<Sequence>> inbox_;
  EngineStatus status_;
  uint64_t next_id_ = 1;
  uint32_t n_active_ = 0;  // accepted and not ended
  bool stopping_ = false;  // nothing more is accepted
  bool stop_ = false;      // the thread is to end

  // The engine thread's own.
  Scheduler scheduler_;
  std::optional<PlanSummary> plan_;
  std::string lost_reason_;                       // why there is no plan any more
  std::map<uint64_t, ScheduledBatch> in_flight_;  // by ticket; of the batch only what a result is checked against
  EngineCounters counters_;
  uint32_t n_ended_ = 0;  // since the last publish()
  std::vector<std::pair<std::shared_ptr<StreamState>, Event>> outbox_;

  std::mutex shutdown_mutex_;
  std::thread thread_;  // last: starts when everything above is there
};

const PlanSummary& Engine::Impl::usable_plan() const {
  using Kind = RequestError::Kind;
  if (stopping_) throw RequestError("the server is shutting down", Kind::unavailable);
  if (status_.state == EngineStatus::State::loading) throw RequestError("Loading model", Kind::unavailable);
  if (!status_.plan) throw RequestError(fmt::format("no usable plan: {}", status_.reason), Kind::unavailable);
  if (n_active_ >= status_.slots_total + options_.max_queue) {
    throw RequestError(fmt::format("the queue is full: {} requests are accepted already", n_active_),
                       Kind::unavailable);
  }
  return *status_.plan;
}

std::shared_ptr<TokenStream> Engine::Impl::accept(std::unique_ptr<Sequence> sequence, uint32_t seed) {
  sequence->id = next_id_++;
  sequence->n_prompt = sequence->n_tokens();
  sequence->stream = std::make_shared<StreamState>(waker_, seed, options_.max_stream_events, options_.max_stream_bytes);
  auto stream = std::make_shared<TokenStream>(sequence->stream);
  inbox_.push_back(std::move(sequence));
  ++n_active_;
  ++status_.counters.requests;
  return stream;
}

std::shared_ptr<TokenStream> Engine::Impl::submit(GenerateParams params) {
  std::unique_lock lock(mutex_);
  try {
    const PlanSummary& plan = usable_plan();
    if (is_encoder(plan)) {
      throw RequestError("this model is an encoder: it embeds texts and cannot continue them",
                         RequestError::Kind::not_supported);
    }
    check_tokens(params.prompt, plan, "prompt");
    validate(params.sampling, plan.n_vocab);
    if (params.grammar) throw RequestError("Field 'grammar': not supported", RequestError::Kind::not_supported);
    check_fits(plan, static_cast<uint32_t>(params.prompt.size()), false);
    const uint32_t seed = params.sampling.seed ? *params.sampling.seed : std::random_device{}();
    std::vector<int32_t> banned = vocabulary_.suppressed_tokens();
    if (params.sampling.ignore_eos) {
      const auto& eog = vocabulary_.end_of_generation_tokens();
      banned.insert(banned.end(), eog.begin(), eog.end());
    }
    auto sequence = std::make_unique<Sequence>();
    sequence->tokens = std::move(params.prompt);
    sequence->uses_cache = params.cache_prompt;
    sequence->generation.emplace(
        Generation{params.n_predict, params.max_predict_ms, params.report_progress,
                   Sampler(std::move(params.sampling), seed, banned, plan.n_vocab, &vocabulary_),
                   AnswerText(vocabulary_, std::move(params.stop), params.n_indent)});
    auto stream = accept(std::move(sequence), seed);
    lock.unlock();
    pipeline_.wake();
    return stream;
  } catch (const RequestError&) {
    ++status_.counters.refused;
    throw;
  }
}

std::shared_ptr<TokenStream> Engine::Impl::embed(EmbedParams params) {
  std::unique_lock lock(mutex_);
  try {
    const PlanSummary& plan = usable_plan();
    check_tokens(params.tokens, plan, "input");
    check_fits(plan, static_cast<uint32_t>(params.tokens.size()), true);
    auto sequence = std::make_unique<Sequence>();
    sequence->tokens = std::move(params.tokens);
    sequence->embedding.emplace(Embedding{.pooling = params.pooling, .rows = {}});
    auto stream = accept(std::move(sequence), 0);
    lock.unlock();
    pipeline_.wake();
    return stream;
  } catch (const RequestError&) {
    ++status_.counters.refused;
    throw;
  }
}

EngineStatus Engine::Impl::status() const {
  std::lock_guard lock(mutex_);
  EngineStatus status = status_;
  if (stopping_) status.state = EngineStatus::State::stopping;
  status.queue_length += static_cast<uint32_t>(inbox_.size());
  return status;
}

bool Engine::Impl::wait_until_ready(std::chrono::milliseconds timeout) const {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return status_.state == EngineStatus::State::ready || stopping_; });
  return status_.state == EngineStatus::State::ready && !stopping_;
}

void Engine::Impl::shutdown(std::chrono::milliseconds grace) {
  std::lock_guard once(shutdown_mutex_);
  if (!thread_.joinable()) return;
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, grace, [this] { return n_active_ == 0; });
    stop_ = true;
  }
  pipeline_.wake();
  thread_.join();
  waker_->disarm();
}

void Engine::Impl::run() {
  while (take_inbox()) {
    drop_cancelled();
    submit_batches();
    publish();
    flush_outbox();
    std::optional<PipelineEvent> event = pipeline_.poll(kIdlePoll);
    for (; event; event = pipeline_.poll(std::chrono::milliseconds(0))) handle(std::move(*event));
  }
  fail_all(RequestError::Kind::unavailable, "the server is shutting down");
  publish();
  flush_outbox();
}

// Moves new requests to the scheduler. False: the thread is to end.
bool Engine::Impl::take_inbox() {
  std::vector<std::unique_ptr<Sequence>> arrived;
  bool stop;
  {
    std::lock_guard lock(mutex_);
    arrived = std::exchange(inbox_, {});
    stop = stop_;
  }
  for (auto& sequence : arrived) {
    const uint64_t id = sequence->id;
    const uint32_t n_prompt = sequence->n_prompt;
    const bool embeds = sequence->embedding.has_value();
    scheduler_.add(std::move(sequence));
    // The plan may have changed since submit() checked.
    if (!plan_) {
      fail(id, RequestError::Kind::unavailable, lost_reason_);
      continue;
    }
    try {
      check_fits(*plan_, n_prompt, embeds);
    } catch (const RequestError& error) {
      fail(id, error.kind(), error.what());
    }
  }
  return !stop;
}

void Engine::Impl::drop_cancelled() {
  std::vector<uint64_t> gone;
  for (const auto& [id, sequence] : scheduler_.sequences()) {
    if (sequence->stream->cancelled()) gone.push_back(id);
  }
  for (const uint64_t id : gone) {
    ++counters_.cancelled;
    end(id);
  }
}

void Engine::Impl::submit_batches() {
  while (plan_ && in_flight_.size() < scheduler_.max_in_flight()) {
    std::optional<ScheduledBatch> next = scheduler_.next_batch(in_flight_.empty());
    if (!next) return;
    const Clock::time_point now = Clock::now();
    for (const BatchPart& part : next->parts) {
      Sequence& sequence = *scheduler_.find(part);
      if (!sequence.first_scheduled) sequence.first_scheduled = now;
    }
    ++counters_.batches;
    counters_.rows += next->batch.n_rows();
    counters_.busy_slot_steps += next->parts.size();
    counters_.recomputed_tokens += next->n_recomputed;
    stage::Batch batch = std::move(next->batch);
    next->batch = {};
    next->batch.outputs = batch.outputs;
    try {
      const uint64_t ticket = pipeline_.submit(std::move(batch));
      const bool added = in_flight_.emplace(ticket, std::move(*next)).second;
      CARAVAN_ASSERT(added, "a pipeline gives every batch its own ticket");
    } catch (const Error& error) {
      batch_failed(*next, error.what());
    }
  }
}

// Makes the state of the engine visible to status(), before the events that tell consumers of it.
void Engine::Impl::publish() {
  std::lock_guard lock(mutex_);
  n_active_ -= std::exchange(n_ended_, 0);
  const uint64_t requests = status_.counters.requests, refused = status_.counters.refused;
  counters_.preemptions = scheduler_.n_preemptions();
  status_.counters = counters_;
  status_.counters.requests = requests;
  status_.counters.refused = refused;
  status_.slots_total = scheduler_.n_slots();
  status_.slots_busy = scheduler_.n_running();
  status_.queue_length = scheduler_.n_waiting();
  status_.kv_usage_ratio = scheduler_.kv_usage();
  changed_.notify_all();
}

void Engine::Impl::flush_outbox() {
  for (auto& [stream, event] : outbox_) stream->push(std::move(event));
  outbox_.clear();
}

void Engine::Impl::handle(PipelineEvent event) {
  std::visit([this](auto&& value) { on(std::forward<decltype(value)>(value)); }, std::move(event));
}

void Engine::Impl::on(Completion completion) {
  auto node = in_flight_.extract(completion.ticket);
  if (node.empty()) return;  // of a plan that is gone
  const ScheduledBatch& scheduled = node.mapped();
  for (const BatchPart& part : scheduled.parts) {
    Sequence* sequence = scheduler_.find(part);
    if (!sequence) continue;
    const uint64_t id = sequence->id;
    try {
      if (completion.rows.size() != scheduled.batch.outputs.size()) {
        throw Error(
            fmt::format("expected {} output rows, found {}", scheduled.batch.outputs.size(), completion.rows.size()));
      }
      const auto rows = std::span(completion.rows).subspan(part.first_output, part.n_outputs);
      for (uint32_t i = 0; i < part.n_outputs; ++i) {
        const stage::OutputRequest& wanted = scheduled.batch.outputs[part.first_output + i];
        const size_t n_values = wanted.kind == stage::OutputKind::hidden   ? plan_->n_embd
                                : wanted.kind == stage::OutputKind::logits ? plan_->n_vocab
                                                                           : wanted.top_k + wanted.named_ids.size();
        const size_t n_ids = wanted.kind == stage::OutputKind::candidates ? wanted.top_k : 0;
        if (rows[i].kind != wanted.kind || rows[i].values.size() != n_values || rows[i].ids.size() != n_ids) {
          throw Error(fmt::format("output row {}: expected {} values and {} ids, found {} and {}", rows[i].row,
                                  n_values, n_ids, rows[i].values.size(), rows[i].ids.size()));
        }
      }
      take_result(part, rows);
    } catch (const Error& error) {
      fail(id, RequestError::Kind::unavailable, fmt::format("the result of a batch cannot be used: {}", error.what()));
    }
  }
}

void Engine::Impl::on(const TicketFailed& failed) {
  auto node = in_flight_.extract(failed.ticket);
  if (!node.empty()) batch_failed(node.mapped(), failed.reason);
}

void Engine::Impl::batch_failed(const ScheduledBatch& scheduled, const std::string& reason) {
  spdlog::warn("a batch failed, {} requests end with it: {}", scheduled.parts.size(), reason);
  for (const BatchPart& part : scheduled.parts) {
    if (scheduler_.find(part)) fail(part.sequence, RequestError::Kind::unavailable, reason);
  }
  scheduler_.recompute_all();
}

void Engine::Impl::on(const PlanReady& ready) {
  CARAVAN_ASSERT(ready.plan.block_tokens > 0 && ready.plan.max_rows > 0 && ready.plan.max_slots > 0,
                 "a usable plan has room for a row");
  plan_ = ready.plan;
  in_flight_.clear();
  scheduler_.set_plan(*plan_);
  std::vector<std::pair<uint64_t, ContextExceededError>> too_long;
  const uint32_t n_ctx = effective_context(*plan_);
  for (const auto& [id, sequence] : scheduler_.sequences()) {
    const bool fits = sequence->embedding ? sequence->n_tokens() <= n_ctx : sequence->n_tokens() < n_ctx;
    if (!fits) too_long.emplace_back(id, ContextExceededError(sequence->n_tokens(), n_ctx));
  }
  for (const auto& [id, error] : too_long) fail(id, error.kind(), error.what());
  std::lock_guard lock(mutex_);
  status_.state = EngineStatus::State::ready;
  status_.reason.clear();
  status_.plan = plan_;
  status_.slots_total = scheduler_.n_slots();
  changed_.notify_all();
}

void Engine::Impl::on(const PlanLost& lost) {
  plan_.reset();
  lost_reason_ = lost.reason;
  in_flight_.clear();
  fail_all(RequestError::Kind::unavailable, lost.reason);
  std::lock_guard lock(mutex_);
  status_.state = EngineStatus::State::no_plan;
  status_.reason = lost.reason;
  status_.plan.reset();
  changed_.notify_all();
}

void Engine::Impl::take_result(const BatchPart& part, std::span<const stage::RowOutput> rows) {
  Sequence& sequence = *scheduler_.find(part);
  report_progress(sequence, part);
  if (sequence.embedding) {
    take_hidden(sequence, part, rows);
  } else if (!rows.empty()) {
    take_token(sequence, rows.front());
  } else if (part.reaches_end) {  // n_predict 0: only the prompt was wanted
    note_first_token(sequence);
    finish(sequence, StopType::limit, {}, false);
  }
}

// For a request that asked for it, until its first token.
void Engine::Impl::report_progress(const Sequence& sequence, const BatchPart& part) {
  if (!sequence.generation || !sequence.generation->report_progress || sequence.first_token) return;
  ProgressEvent event;
  event.n_prompt_tokens = sequence.n_prompt;
  event.n_cached = timings(sequence).cache_n;
  event.n_computed = std::min(sequence.n_prompt, part.first_position + part.n_rows);
  event.elapsed_ms = milliseconds(sequence.first_scheduled, Clock::now());
  send(sequence, event);
}

void Engine::Impl::take_hidden(Sequence& sequence, const BatchPart& part, std::span<const stage::RowOutput> rows) {
  Embedding& embedding = *sequence.embedding;
  const uint32_t n_embd = plan_->n_embd;
  const uint32_t n_wanted = embedding.n_wanted(sequence.n_tokens());
  embedding.rows.resize(size_t{n_wanted} * n_embd);
  size_t next = 0;
  for (uint32_t i = 0; i < part.n_rows; ++i) {
    const std::optional<uint32_t> index = embedding.index_of(part.first_position + i, sequence.n_tokens());
    if (!index) continue;
    std::copy(rows[next].values.begin(), rows[next].values.end(),
              embedding.rows.begin() + static_cast<ptrdiff_t>(size_t{*index} * n_embd));
    ++next;
    ++embedding.n_received;
  }
  if (embedding.n_received < n_wanted) return;
  note_first_token(sequence);
  EmbeddingEvent event;
  // The wanted rows of cls and last are one already.
  event.vectors = pool(embedding.rows, n_embd, embedding.pooling);
  event.timings = timings(sequence);
  ++counters_.finished;
  send(sequence, std::move(event));
  end(sequence.id);
}

// The prompt is done.
void Engine::Impl::note_first_token(Sequence& sequence) {
  if (sequence.first_token) return;
  sequence.first_token = Clock::now();
  counters_.prompt_tokens += sequence.n_prompt - sequence.n_cached.value_or(0);
  counters_.cached_prompt_tokens += sequence.n_cached.value_or(0);
  counters_.prompt_seconds += milliseconds(sequence.first_scheduled, sequence.first_token) / 1000;
}

void Engine::Impl::take_token(Sequence& sequence, const stage::RowOutput& row) {
  Generation& generation = *sequence.generation;
  Sampler::Choice choice = generation.sampler.sample(row, sequence.tokens);
  sequence.awaits_output = false;
  note_first_token(sequence);
  sequence.last_token = Clock::now();
  sequence.tokens.push_back(choice.token);
  ++counters_.predicted_tokens;
  counters_.max_tokens = std::max<uint64_t>(counters_.max_tokens, sequence.n_tokens());

  if (static_cast<size_t>(choice.token) < vocabulary_.size() && vocabulary_.is_end_of_generation(choice.token)) {
    finish(sequence, StopType::eos, {}, false);
    return;
  }
  AnswerText::Result result = generation.answer.push(choice.token, std::move(choice.probabilities));
  const bool line_ended = result.event && result.event->text.find('\n') != std::string::npos;
  if (result.event) {
    result.event->timings = timings(sequence);
    send(sequence, std::move(*result.event));
  }
  if (result.stopping_word) {
    finish(sequence, StopType::word, std::move(*result.stopping_word), false);
    return;
  }
  const uint32_t n_predicted = sequence.n_tokens() - sequence.n_prompt;
  const bool context_full = sequence.n_tokens() >= effective_context(*plan_);
  const bool late =
      line_ended && generation.max_predict_ms > 0 &&
      milliseconds(sequence.first_token, sequence.last_token) > static_cast<double>(generation.max_predict_ms);
  const bool enough = late || result.indent_ended ||
                      (generation.n_predict >= 0 && n_predicted >= static_cast<uint32_t>(generation.n_predict));
  if (enough || context_full) finish(sequence, StopType::limit, {}, !enough);
}

// Sends what is still withheld and the FinalEvent, and removes the sequence.
void Engine::Impl::finish(Sequence& sequence, StopType stop_type, std::string stopping_word, bool truncated) {
  if (stop_type != StopType::word) {
    AnswerText::Result rest = sequence.generation->answer.finish();
    if (rest.event) {
      rest.event->timings = timings(sequence);
      send(sequence, std::move(*rest.event));
    }
    if (rest.stopping_word) {
      stop_type = StopType::word;
      stopping_word = std::move(*rest.stopping_word);
      truncated = false;
    }
  }
  FinalEvent event;
  event.stop_type = stop_type;
  event.stopping_word = std::move(stopping_word);
  event.truncated = truncated;
  event.n_prompt_tokens = sequence.n_prompt;
  event.timings = timings(sequence);
  counters_.predicted_seconds += event.timings.predicted_ms / 1000;
  ++counters_.finished;
  send(sequence, std::move(event));
  end(sequence.id);
}

void Engine::Impl::fail(uint64_t id, RequestError::Kind kind, const std::string& message) {
  send(*scheduler_.sequences().at(id), ErrorEvent{kind, message});
  ++counters_.failed;
  end(id);
}

void Engine::Impl::fail_all(RequestError::Kind kind, const std::string& message) {
  while (!scheduler_.sequences().empty()) fail(scheduler_.sequences().begin()->first, kind, message);
}

void Engine::Impl::end(uint64_t id) {
  scheduler_.remove(id);
  ++n_ended_;
}

Timings Engine::Impl::timings(const Sequence& sequence) const {
  Timings timings;
  timings.cache_n = sequence.n_cached.value_or(0);
  timings.prompt_n = sequence.n_prompt - timings.cache_n;
  timings.prompt_ms = milliseconds(sequence.first_scheduled, sequence.first_token);
  timings.predicted_n = sequence.n_tokens() - sequence.n_prompt;
  timings.predicted_ms = milliseconds(sequence.first_token, sequence.last_token);
  return timings;
}

Engine::Engine(Pipeline& pipeline, const vocab::Vocabulary& vocabulary, EngineOptions options)
    : impl_(std::make_unique<Impl>(pipeline, vocabulary, options)) {}

Engine::~Engine() = default;

std::shared_ptr<TokenStream> Engine::submit(GenerateParams params) { return impl_->submit(std::move(params)); }

std::shared_ptr<TokenStream> Engine::embed(EmbedParams params) { return impl_->embed(std::move(params)); }

EngineStatus Engine::status() const { return impl_->status(); }

bool Engine::wait_until_ready(std::chrono::milliseconds timeout) const { return impl_->wait_until_ready(timeout); }

void Engine::shutdown(std::chrono::milliseconds grace) { impl_->shutdown(grace); }

}  // namespace caravan::engine
