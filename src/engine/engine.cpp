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
#include "engine/dispatcher.h"
#include "engine/grammar.h"
#include "engine/pooling.h"
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
        grammars_(vocabulary),
        waker_(std::make_shared<Waker>(pipeline)),
        dispatcher_(options.n_parallel, options.max_in_flight),
        thread_([this] { run(); }) {}

  ~Impl() { shutdown(std::chrono::milliseconds(0)); }

  void check_grammar(const GrammarSpec& grammar);
  std::shared_ptr<TokenStream> submit(GenerateParams params);
  std::shared_ptr<TokenStream> embed(EmbedParams params);
  EngineStatus status() const;
  PipelineStatus pipeline_status() const { return pipeline_.status(); }
  std::vector<SlotStatus> slots() const;
  std::vector<int32_t> slot_tokens(uint32_t slot) const;
  size_t erase_slot(uint32_t slot);
  bool wait_until_ready(std::chrono::milliseconds timeout) const;
  void shutdown(std::chrono::milliseconds grace);

 private:
  // Any thread, with mutex_ held.
  const PlanSummary& usable_plan() const;
  void check_idle(uint32_t slot) const;
  std::shared_ptr<TokenStream> accept(std::unique_ptr<Sequence> sequence, uint32_t seed);

  // The engine's thread.
  void run();
  bool take_inbox();
  void drop_cancelled();
  void submit_batches();
  void submit_batches(Scheduler& replica);
  void publish();
  void flush_outbox();
  void handle(PipelineEvent event);
  void on(Completion completion);
  void on(const TicketFailed& failed);
  void batch_failed(const ScheduledBatch& scheduled, const std::string& reason);
  void on(const PlanReady& ready);
  void on(const PlanLost& lost);
  void take_result(const BatchPart& part, std::span<const stage::RowOutput> rows);
  void report_progress(Sequence& sequence, const BatchPart& part);
  void take_hidden(Sequence& sequence, const BatchPart& part, std::span<const stage::RowOutput> rows);
  void note_first_token(Sequence& sequence);
  void take_token(Sequence& sequence, const stage::RowOutput& row);
  bool shift_context(Sequence& sequence);
  void finish(Sequence& sequence, StopType stop_type, std::string stopping_word, bool truncated);
  void fail(uint64_t id, RequestError::Kind kind, const std::string& message);
  void fail_all(RequestError::Kind kind, const std::string& message);
  void fail_those_that_waited();
  void end(uint64_t id);
  void note_slot(const Sequence& sequence);
  void resize_slots(uint32_t n_slots);
  Timings timings(const Sequence& sequence) const;
  void send(Sequence& sequence, Event event);

  Pipeline& pipeline_;
  const vocab::Vocabulary& vocabulary_;
  const EngineOptions options_;
  GrammarCompiler grammars_;
  const std::shared_ptr<Waker> waker_;

  mutable std::mutex mutex_;  // guards the members up to the blank line
  mutable std::condition_variable changed_;
  std::vector<std::unique_ptr<Sequence>> inbox_;
  std::vector<std::vector<int32_t>> erasures_;  // tokens to forget before the inbox is taken
  EngineStatus status_;
  std::optional<PlanSummary> known_plan_;  // the current or the last one: what new requests are checked against
  std::vector<SlotStatus> slots_;
  std::vector<std::vector<int32_t>> slot_tokens_;  // what the last request in each slot left
  uint64_t next_id_ = 1;
  uint32_t n_active_ = 0;  // accepted and not ended
  bool stopping_ = false;  // nothing more is accepted
  bool stop_ = false;      // the thread is to end

  // The engine thread's own.
  Dispatcher dispatcher_;
  std::optional<PlanSummary> plan_;
  std::string lost_reason_;                       // why there is no plan any more
  std::map<uint64_t, ScheduledBatch> in_flight_;  // by ticket; of the batch only what a result is checked against
  EngineCounters counters_;
  std::vector<SlotStatus> slot_states_;                                 // published as slots_
  std::vector<std::pair<uint32_t, std::vector<int32_t>>> left_tokens_;  // for slot_tokens_, since the last publish()
  uint32_t n_ended_ = 0;                                                // since the last publish()
  std::vector<std::pair<std::shared_ptr<StreamState>, Event>> outbox_;

  std::mutex shutdown_mutex_;
  std::thread thread_;  // last: starts when everything above is there
};

const PlanSummary& Engine::Impl::usable_plan() const {
  using Kind = RequestError::Kind;
  if (stopping_) throw RequestError("the server is shutting down", Kind::unavailable);
  if (status_.state == EngineStatus::State::loading) throw RequestError("Loading model", Kind::unavailable);
  if (n_active_ >= status_.slots_total + options_.max_queue) {
    throw RequestError(fmt::format("the queue is full: {} requests are accepted already", n_active_),
                       Kind::unavailable);
  }
  return *known_plan_;
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

void Engine::Impl::check_grammar(const GrammarSpec& grammar) { grammars_.compile(grammar); }

std::shared_ptr<TokenStream> Engine::Impl::submit(GenerateParams params) {
  std::unique_lock lock(mutex_, std::defer_lock);
  try {
    std::optional<GrammarConstraint> grammar;
    if (params.grammar) grammar = grammars_.compile(*params.grammar);  // may take milliseconds
    lock.lock();
    const PlanSummary& plan = usable_plan();
    if (is_encoder(plan)) {
      throw RequestError("this model is an encoder: it embeds texts and cannot continue them",
                         RequestError::Kind::not_supported);
    }
    check_tokens(params.prompt, plan, "prompt");
    validate(params.sampling, plan.n_vocab);
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
    sequence->wanted_slot = params.slot;
    params.prompt.clear();
    auto asked = std::make_shared<const GenerateParams>(params);
    sequence->generation.emplace(Generation{
        std::move(asked), params.n_predict, params.max_predict_ms, params.report_progress,
        Sampler(std::move(params.sampling), seed, banned, plan.n_vocab, &vocabulary_),
        AnswerText(vocabulary_, std::move(params.stop), params.n_indent, std::move(params.rendered_tokens))});
    if (grammar) sequence->generation->sampler.constrain(std::move(*grammar));
    auto stream = accept(std::move(sequence), seed);
    lock.unlock();
    pipeline_.wake();
    return stream;
  } catch (const RequestError&) {
    if (!lock.owns_lock()) lock.lock();
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

std::vector<SlotStatus> Engine::Impl::slots() const {
  std::lock_guard lock(mutex_);
  return slots_;
}

void Engine::Impl::check_idle(uint32_t slot) const {
  if (status_.state == EngineStatus::State::no_plan)
    throw RequestError(fmt::format("no usable plan: {}", status_.reason), RequestError::Kind::unavailable);
  if (slot >= slots_.size()) {
    throw RequestError(fmt::format("there is no slot {}: expected one below {}", slot, slots_.size()));
  }
  if (slots_[slot].processing) {
    throw RequestError(fmt::format("slot {} is working on a request", slot), RequestError::Kind::unavailable);
  }
}

std::vector<int32_t> Engine::Impl::slot_tokens(uint32_t slot) const {
  std::lock_guard lock(mutex_);
  check_idle(slot);
  return slot_tokens_[slot];
}

size_t Engine::Impl::erase_slot(uint32_t slot) {
  size_t n_erased;
  {
    std::lock_guard lock(mutex_);
    check_idle(slot);
    n_erased = slot_tokens_[slot].size();
    erasures_.push_back(std::exchange(slot_tokens_[slot], {}));
  }
  pipeline_.wake();
  return n_erased;
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
    fail_those_that_waited();
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

// Moves new requests to the dispatcher. False: the thread is to end.
bool Engine::Impl::take_inbox() {
  std::vector<std::unique_ptr<Sequence>> arrived;
  std::vector<std::vector<int32_t>> erasures;
  bool stop;
  {
    std::lock_guard lock(mutex_);
    arrived = std::exchange(inbox_, {});
    erasures = std::exchange(erasures_, {});
    stop = stop_;
  }
  for (const auto& tokens : erasures) dispatcher_.erase_cached(tokens);
  for (auto& sequence : arrived) {
    const uint64_t id = sequence->id;
    const uint32_t n_prompt = sequence->n_prompt;
    const bool embeds = sequence->embedding.has_value();
    if (!plan_) sequence->waits_since = Clock::now();
    if (plan_) sequence->n_ctx = effective_context(*plan_);
    dispatcher_.add(std::move(sequence));
    if (!plan_) continue;
    try {  // the plan may have changed since submit() checked
      check_fits(*plan_, n_prompt, embeds);
    } catch (const RequestError& error) {
      fail(id, error.kind(), error.what());
    }
  }
  return !stop;
}

void Engine::Impl::drop_cancelled() {
  std::vector<uint64_t> gone;
  for (const auto& [id, sequence] : dispatcher_.sequences()) {
    if (sequence->stream->cancelled()) gone.push_back(id);
  }
  for (const uint64_t id : gone) {
    ++counters_.cancelled;
    end(id);
  }
}

void Engine::Impl::submit_batches() {
  dispatcher_.admit();
  for (const auto& [id, replica] : dispatcher_.replicas()) submit_batches(*replica);
}

void Engine::Impl::submit_batches(Scheduler& replica) {
  Scheduler::InFlight in_flight;
  for (const auto& [ticket, batch] : in_flight_) {
    if (batch.replica != replica.id()) continue;
    ++in_flight.n;
    in_flight.n_decoding += batch.decodes;
  }
  while (in_flight.n < replica.max_in_flight()) {
    std::optional<ScheduledBatch> next = replica.next_batch(in_flight);
    if (!next) return;
    const Clock::time_point now = Clock::now();
    for (const BatchPart& part : next->parts) {
      Sequence& sequence = *dispatcher_.find(part);
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
      const uint64_t ticket = pipeline_.submit(std::move(batch), replica.id());
      ++in_flight.n;
      in_flight.n_decoding += next->decodes;
      const bool added = in_flight_.emplace(ticket, std::move(*next)).second;
      CARAVAN_ASSERT(added, "a pipeline gives every batch its own ticket");
    } catch (const Error& error) {
      batch_failed(*next, error.what());
    }
  }
}

// Makes the state of the engine visible to status(), before the events that tell consumers of it.
void Engine::Impl::publish() {
  for (SlotStatus& slot : slot_states_) slot.processing = false;
  for (const auto& [id, sequence] : dispatcher_.sequences()) note_slot(*sequence);
  std::lock_guard lock(mutex_);
  slots_ = slot_states_;
  slot_tokens_.resize(slots_.size());
  for (auto& [slot, tokens] : std::exchange(left_tokens_, {})) slot_tokens_[slot] = std::move(tokens);
  n_active_ -= std::exchange(n_ended_, 0);
  const uint64_t requests = status_.counters.requests, refused = status_.counters.refused;
  counters_.preemptions = dispatcher_.n_preemptions();
  status_.counters = counters_;
  status_.counters.requests = requests;
  status_.counters.refused = refused;
  status_.slots_total = dispatcher_.n_slots();
  status_.slots_busy = dispatcher_.n_running();
  status_.queue_length = dispatcher_.n_waiting();
  status_.kv_usage_ratio = 0;
  status_.replica_kv_usage.resize(plan_ ? plan_->replicas.size() : 0);
  for (size_t i = 0; i < status_.replica_kv_usage.size(); ++i) {
    status_.replica_kv_usage[i] = dispatcher_.replicas().at(plan_->replicas[i].id)->kv_usage();
    status_.kv_usage_ratio = std::max(status_.kv_usage_ratio, status_.replica_kv_usage[i]);
  }
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
  dispatcher_.replicas().at(scheduled.replica)->note_times(scheduled, completion.stage_seconds);
  for (const BatchPart& part : scheduled.parts) {
    Sequence* sequence = dispatcher_.find(part);
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
    if (dispatcher_.find(part)) fail(part.sequence, RequestError::Kind::unavailable, reason);
  }
  dispatcher_.replicas().at(scheduled.replica)->recompute_all();
}

void Engine::Impl::on(const PlanReady& ready) {
  CARAVAN_ASSERT(ready.plan.block_tokens > 0 && ready.plan.max_rows > 0 && ready.plan.max_slots > 0,
                 "a usable plan has room for a row");
  CARAVAN_ASSERT(!ready.plan.replicas.empty(), "a usable plan has a replica");
  const uint32_t n_waited = plan_ ? dispatcher_.n_waiting() : 0;
  plan_ = ready.plan;
  dispatcher_.set_plan(*plan_);
  if (const uint32_t n_moved = dispatcher_.n_waiting() - n_waited; n_moved > 0)
    spdlog::info("{} requests go on under the new plan, their KV is computed again", n_moved);
  std::erase_if(in_flight_,
                [this](const auto& entry) { return !dispatcher_.replicas().contains(entry.second.replica); });
  resize_slots(dispatcher_.n_slots());
  std::vector<std::pair<uint64_t, RequestError>> too_long;
  for (const auto& [id, sequence] : dispatcher_.sequences()) {
    sequence->waits_since.reset();
    if (sequence->n_ctx == 0) sequence->n_ctx = effective_context(*plan_);
    try {
      check_fits(*plan_, sequence->n_tokens(), sequence->embedding.has_value());
    } catch (const RequestError& error) {
      too_long.emplace_back(
          id, RequestError(fmt::format("{}: the model was placed anew, with less room", error.what()), error.kind()));
    }
  }
  for (const auto& [id, error] : too_long) fail(id, error.kind(), error.what());
  std::lock_guard lock(mutex_);
  known_plan_ = plan_;
  status_.state = EngineStatus::State::ready;
  status_.reason.clear();
  status_.plan = plan_;
  status_.slots_total = dispatcher_.n_slots();
  changed_.notify_all();
}

void Engine::Impl::on(const PlanLost& lost) {
  plan_.reset();
  lost_reason_ = lost.reason;
  in_flight_.clear();
  dispatcher_.lose_plan();
  ++counters_.plans_lost;
  const Clock::time_point now = Clock::now();
  for (const auto& [id, sequence] : dispatcher_.sequences()) {
    if (!sequence->waits_since) sequence->waits_since = now;
  }
  std::lock_guard lock(mutex_);
  status_.state = EngineStatus::State::no_plan;
  status_.reason = lost.reason;
  status_.plan.reset();
  changed_.notify_all();
}

void Engine::Impl::take_result(const BatchPart& part, std::span<const stage::RowOutput> rows) {
  Sequence& sequence = *dispatcher_.find(part);
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
void Engine::Impl::report_progress(Sequence& sequence, const BatchPart& part) {
  if (!sequence.generation || !sequence.generation->report_progress || sequence.first_token) return;
  ProgressEvent event;
  event.n_prompt_tokens = sequence.n_prompt;
  event.n_cached = timings(sequence).cache_n;
  event.n_computed = std::min(sequence.n_prompt, part.first_position + part.n_rows);
  // What is computed again was reported before.
  if (event.n_computed <= std::exchange(sequence.n_reported, std::max(sequence.n_reported, event.n_computed))) return;
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
  Sampler::Choice choice;
  try {
    choice = generation.sampler.sample(row, sequence.history());
  } catch (const RequestError& error) {
    fail(sequence.id, error.kind(), error.what());
    return;
  }
  sequence.awaits_output = false;
  if (choice.kind == Sampler::Choice::Kind::all_logits_needed) {
    --sequence.n_scheduled;  // the same row again: it writes the same keys and values, and asks for more
    --sequence.n_evaluated;
    return;
  }
  note_first_token(sequence);
  if (choice.kind == Sampler::Choice::Kind::end) {
    finish(sequence, StopType::eos, {}, false);
    return;
  }
  sequence.last_token = Clock::now();
  sequence.tokens.push_back(choice.token);
  if (sequence.n_discarded > 0) sequence.full_history.push_back(choice.token);
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
  const uint32_t n_predicted = sequence.n_predicted();
  const uint32_t n_ctx = std::min(sequence.n_ctx, effective_context(*plan_));
  const bool context_full = sequence.n_tokens() >= n_ctx;
  const bool late =
      line_ended && generation.max_predict_ms > 0 &&
      milliseconds(sequence.first_token, sequence.last_token) > static_cast<double>(generation.max_predict_ms);
  const bool enough = late || result.indent_ended ||
                      (generation.n_predict >= 0 && n_predicted >= static_cast<uint32_t>(generation.n_predict));
  if (!enough && context_full && n_ctx < sequence.n_ctx) {
    fail(sequence.id, RequestError::Kind::unavailable,
         fmt::format("the request needs more than the {} tokens of context that are left since the model was placed "
                     "anew; it began with {}",
                     n_ctx, sequence.n_ctx));
    return;
  }
  if (!enough && context_full && options_.context_shift && shift_context(sequence)) return;
  if (enough || context_full) finish(sequence, StopType::limit, {}, !enough);
}

// Makes room in a full context: keeps the beginning, discards what follows it. What is left is computed again, as keys
// depend on their positions. False: there is nothing to discard.
bool Engine::Impl::shift_context(Sequence& sequence) {
  constexpr uint32_t kLeast = 4;  // tokens behind the kept ones
  const GenerateParams& params = *sequence.generation->params;
  const uint32_t n_tokens = sequence.n_tokens();
  if (n_tokens <= kLeast) return false;
  const uint32_t bos = sequence.tokens.front() == vocabulary_.bos() ? 1 : 0;
  const uint64_t wanted = params.n_keep < 0 ? sequence.n_prompt : uint64_t{bos} + static_cast<uint32_t>(params.n_keep);
  const auto n_keep = static_cast<uint32_t>(std::min<uint64_t>(wanted, n_tokens - kLeast));
  const uint32_t n_left = n_tokens - n_keep;
  const uint32_t n_discard =
      params.n_discard > 0 ? std::min(static_cast<uint32_t>(params.n_discard), n_left - 1) : n_left / 2;
  dispatcher_.discard(sequence, n_keep, n_discard);
  return true;
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
  event.truncated = truncated || sequence.n_discarded > 0;
  event.n_prompt_tokens = sequence.n_prompt;
  event.timings = timings(sequence);
  counters_.predicted_seconds += event.timings.predicted_ms / 1000;
  ++counters_.finished;
  send(sequence, std::move(event));
  end(sequence.id);
}

void Engine::Impl::fail(uint64_t id, RequestError::Kind kind, const std::string& message) {
  send(*dispatcher_.sequences().at(id), ErrorEvent{kind, message});
  ++counters_.failed;
  end(id);
}

void Engine::Impl::fail_all(RequestError::Kind kind, const std::string& message) {
  while (!dispatcher_.sequences().empty()) fail(dispatcher_.sequences().begin()->first, kind, message);
}

// Ends what has found no plan for too long.
void Engine::Impl::fail_those_that_waited() {
  if (plan_) return;
  const Clock::time_point now = Clock::now();
  const bool loading = pipeline_.plan_is_loading();
  std::vector<uint64_t> ids;
  for (const auto& [id, sequence] : dispatcher_.sequences()) {
    if (loading)
      sequence->waits_since = now;
    else if (sequence->waits_since && now - *sequence->waits_since >= options_.recovery_timeout)
      ids.push_back(id);
  }
  const auto seconds = std::chrono::duration<double>(options_.recovery_timeout).count();
  for (const uint64_t id : ids)
    fail(id, RequestError::Kind::unavailable,
         fmt::format("no usable plan came within {:g} s (--recovery-timeout): {}", seconds, lost_reason_));
}

void Engine::Impl::end(uint64_t id) {
  const Sequence& ending = *dispatcher_.sequences().at(id);
  note_slot(ending);
  const std::optional<stage::Slot> slot = ending.slot;
  const uint32_t n_computed = ending.n_scheduled;
  const std::unique_ptr<Sequence> ended = dispatcher_.remove(id);
  if (slot && ended->generation) {
    ended->tokens.resize(n_computed);
    left_tokens_.emplace_back(*slot, std::move(ended->tokens));
  }
  ++n_ended_;
}

void Engine::Impl::note_slot(const Sequence& sequence) {
  if (!sequence.slot || *sequence.slot >= slot_states_.size()) return;
  SlotStatus& state = slot_states_[*sequence.slot];
  state.processing = true;
  if (!sequence.generation) return;
  SlotStatus::Task task;
  task.id = sequence.id;
  task.n_prompt = sequence.n_prompt;
  task.n_cached = sequence.n_cached.value_or(0);
  const uint32_t n_reached =
      sequence.n_discarded > 0 ? sequence.n_prompt : std::min(sequence.n_evaluated, sequence.n_prompt);
  task.n_prompt_computed = n_reached - std::min(n_reached, task.n_cached);
  task.n_predicted = sequence.n_predicted();
  task.has_new_line = sequence.generation->has_new_line;
  task.seed = sequence.generation->sampler.seed();
  task.params = sequence.generation->params;
  state.task = std::move(task);
}

// Slots and the tokens that requests left there stay through a change of the plan, though their KV does not.
void Engine::Impl::resize_slots(uint32_t n_slots) {
  const auto n_before = static_cast<uint32_t>(slot_states_.size());
  slot_states_.resize(n_slots);
  for (uint32_t i = n_before; i < n_slots; ++i) slot_states_[i].id = i;
  std::erase_if(left_tokens_, [n_slots](const auto& left) { return left.first >= n_slots; });
  std::lock_guard lock(mutex_);
  slots_ = slot_states_;
  slot_tokens_.resize(n_slots);
}

// Queues an event for the consumer.
void Engine::Impl::send(Sequence& sequence, Event event) {
  const uint32_t slot = sequence.slot.value_or(0);
  if (auto* token = std::get_if<TokenEvent>(&event)) {
    token->slot = slot;
    if (token->text.find('\n') != std::string::npos) sequence.generation->has_new_line = true;
  }
  if (auto* progress = std::get_if<ProgressEvent>(&event)) progress->slot = slot;
  if (auto* end = std::get_if<FinalEvent>(&event)) end->slot = slot;
  outbox_.emplace_back(sequence.stream, std::move(event));
}

Timings Engine::Impl::timings(const Sequence& sequence) const {
  Timings timings;
  timings.cache_n = sequence.n_cached.value_or(0);
  timings.prompt_n = sequence.n_prompt - timings.cache_n;
  timings.prompt_ms = milliseconds(sequence.first_scheduled, sequence.first_token);
  timings.predicted_n = sequence.n_predicted();
  timings.predicted_ms = milliseconds(sequence.first_token, sequence.last_token);
  return timings;
}

Engine::Engine(Pipeline& pipeline, const vocab::Vocabulary& vocabulary, EngineOptions options)
    : impl_(std::make_unique<Impl>(pipeline, vocabulary, options)) {}

Engine::~Engine() = default;

void Engine::check_grammar(const GrammarSpec& grammar) { impl_->check_grammar(grammar); }
std::shared_ptr<TokenStream> Engine::submit(GenerateParams params) { return impl_->submit(std::move(params)); }

std::shared_ptr<TokenStream> Engine::embed(EmbedParams params) { return impl_->embed(std::move(params)); }

EngineStatus Engine::status() const { return impl_->status(); }

PipelineStatus Engine::pipeline_status() const { return impl_->pipeline_status(); }

std::vector<SlotStatus> Engine::slots() const { return impl_->slots(); }

std::vector<int32_t> Engine::slot_tokens(uint32_t slot) const { return impl_->slot_tokens(slot); }

size_t Engine::erase_slot(uint32_t slot) { return impl_->erase_slot(slot); }

bool Engine::wait_until_ready(std::chrono::milliseconds timeout) const { return impl_->wait_until_ready(timeout); }

void Engine::shutdown(std::chrono::milliseconds grace) { impl_->shutdown(grace); }

}  // namespace caravan::engine
