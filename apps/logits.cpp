#include "logits.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/file.h"
#include "cluster/cluster_pipeline.h"
#include "device/cpu/cpu_device.h"

namespace caravan::app {
namespace {

using engine::GroupLimits;

// Gives the sequence's next logical block a place. Blocks of a window are used in turn: what a row of this chunk or a
// later one sees lies within n_blocks of the newest, or the plan could not hold a sequence at all.
void append_block(stage::Batch& batch, uint32_t group, uint32_t logical_block, uint32_t n_blocks) {
  batch.kv_ops.push_back({stage::KvOp::Kind::append, group, 0, logical_block % n_blocks, 0, 0});
}

stage::VisibleRange visible_range(const GroupLimits& group, int32_t position) {
  if (group.kind == GroupLimits::Kind::full) return {0, position + 1};
  return {std::max(0, position + 1 - static_cast<int32_t>(group.window)), position + 1};
}

// Rows per batch, so that a window's blocks hold what the chunk sees and writes.
uint32_t chunk_rows(const engine::PlanSummary& plan, uint32_t max_rows) {
  uint32_t rows = std::max(1u, std::min(plan.max_rows, max_rows));
  for (const GroupLimits& group : plan.groups) {
    if (group.kind != GroupLimits::Kind::window) continue;
    // Blocks touched by window + rows tokens, at any alignment, are at most (window + rows) / block_tokens + 2.
    const uint64_t held = uint64_t{group.n_blocks} * plan.block_tokens;
    const uint64_t margin = uint64_t{group.window} + 2 * uint64_t{plan.block_tokens};
    rows = static_cast<uint32_t>(std::min<uint64_t>(rows, held > margin ? held - margin : 1));
  }
  return rows;
}

stage::Batch make_batch(const engine::PlanSummary& plan, std::span<const int32_t> tokens, size_t begin, size_t end) {
  stage::Batch batch;
  for (uint32_t group = 0; group < plan.groups.size(); ++group) {
    const GroupLimits& limits = plan.groups[group];
    if (limits.kind != GroupLimits::Kind::window || begin < limits.window) continue;
    batch.kv_ops.push_back(
        {stage::KvOp::Kind::drop_front, group, 0, 0, 0, static_cast<uint32_t>(begin + 1 - limits.window)});
  }
  for (size_t i = begin; i < end; ++i) {
    const auto position = static_cast<int32_t>(i);
    batch.outputs.push_back({batch.n_rows(), stage::OutputKind::logits, 0, {}});
    batch.tokens.push_back(tokens[i]);
    batch.positions.push_back({position, position, position, position});
    batch.slots.push_back(0);
    for (uint32_t group = 0; group < plan.groups.size(); ++group) {
      const GroupLimits& limits = plan.groups[group];
      batch.visible.push_back(visible_range(limits, position));
      if (i % plan.block_tokens != 0) continue;
      append_block(batch, group, static_cast<uint32_t>(i / plan.block_tokens), limits.n_blocks);
    }
  }
  return batch;
}

// The next event; waits as long as it takes.
engine::PipelineEvent next_event(engine::Pipeline& pipeline) {
  for (;;) {
    if (auto event = pipeline.poll(std::chrono::milliseconds(1000))) return std::move(*event);
  }
}

std::vector<int32_t> parse_tokens(const std::string& text) {
  std::vector<int32_t> tokens;
  const char* next = text.data();
  const char* const end = next + text.size();
  for (;;) {
    const auto [after, error] = std::from_chars(next, end, tokens.emplace_back());
    if (error != std::errc() || (after != end && *after != ',')) {
      throw RequestError(fmt::format("--tokens: expected numbers separated by commas, found '{}'", text));
    }
    if (after == end) return tokens;
    next = after + 1;
  }
}

tensor::DType parse_kv_type(const std::string& name) {
  if (const auto type = tensor::dtype_from_name(name)) return *type;
  throw RequestError(fmt::format("--kv-type: expected f32, f16 or q8_0, found '{}'", name));
}

}  // namespace

std::vector<stage::Batch> logits_batches(const engine::PlanSummary& plan, std::span<const int32_t> tokens,
                                         uint32_t max_rows) {
  if (tokens.size() > plan.n_ctx) {
    throw RequestError(fmt::format("{} tokens do not fit the context of {}", tokens.size(), plan.n_ctx),
                       RequestError::Kind::context_exceeded);
  }
  for (const GroupLimits& group : plan.groups) {
    if (group.kind == GroupLimits::Kind::none) throw RequestError("the model gives embeddings, not logits");
  }
  for (const int32_t token : tokens) {
    if (token < 0 || static_cast<uint32_t>(token) >= plan.n_vocab) {
      throw RequestError(fmt::format("token {}: the model's tokens are 0 to {}", token, plan.n_vocab - 1));
    }
  }
  const size_t chunk = chunk_rows(plan, max_rows);
  std::vector<stage::Batch> batches;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    batches.push_back(make_batch(plan, tokens, begin, std::min(begin + chunk, tokens.size())));
  }
  return batches;
}

void compute_logits(engine::Pipeline& pipeline, std::span<const int32_t> tokens, uint32_t max_rows,
                    const std::function<void(std::span<const float>)>& on_row) {
  const engine::PipelineEvent first = next_event(pipeline);
  const auto* ready = std::get_if<engine::PlanReady>(&first);
  if (ready == nullptr) throw Error("there is no plan to compute with");
  for (stage::Batch& batch : logits_batches(ready->plan, tokens, max_rows)) {
    pipeline.submit(std::move(batch));
    engine::PipelineEvent event = next_event(pipeline);
    if (const auto* failed = std::get_if<engine::TicketFailed>(&event)) throw Error(failed->reason);
    if (const auto* lost = std::get_if<engine::PlanLost>(&event)) throw Error(lost->reason);
    if (std::holds_alternative<engine::PlanReady>(event)) throw Error("the plan changed while logits were computed");
    for (const stage::RowOutput& row : std::get<engine::Completion>(event).rows) on_row(row.values);
  }
}

int run_logits(int argc, char** argv) {
  std::string model_path, token_list, output_path, kv_type = "f32";
  int n_threads = usable_cpu_count();
  CLI::App command("Writes the logits of every token of a sequence: n_tokens x n_vocab little-endian f32.",
                   "caravan logits");
  command.add_option("-m,--model", model_path, "GGUF file")->required();
  command.add_option("--tokens", token_list, "token ids, separated by commas")->required();
  command.add_option("-o,--output", output_path, "file to write")->required();
  command.add_option("-t,--threads", n_threads, "threads")->check(CLI::Range(1, 1024))->capture_default_str();
  command.add_option("--kv-type", kv_type, "type of the KV cache: f32, f16, q8_0")->capture_default_str();
  try {
    command.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return command.exit(error) == 0 ? 0 : 1;
  }

  const std::vector<int32_t> tokens = parse_tokens(token_list);
  constexpr uint32_t kRowsPerBatch = 64;
  cluster::ClusterOptions options;
  options.cache.k_type = options.cache.v_type = parse_kv_type(kv_type);
  options.cache.max_rows = options.cache.max_outputs = kRowsPerBatch;
  options.n_ctx = static_cast<uint32_t>(tokens.size());
  const gguf::Model model = gguf::Model::open(model_path);
  device::cpu::CpuDevice device(n_threads, select_isa(), 0);
  options.local_memory = device.info().memory_free;
  cluster::ClusterPipeline pipeline(model, device, nullptr, options);
  pipeline.start();
  std::vector<float> values;
  compute_logits(pipeline, tokens, kRowsPerBatch,
                 [&](std::span<const float> row) { values.insert(values.end(), row.begin(), row.end()); });
  write_file_atomically(output_path, std::as_bytes(std::span(values)));
  return 0;
}

}  // namespace caravan::app
