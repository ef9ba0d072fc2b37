// `caravan logits`: the logits of every token of one sequence, for comparing with other programs.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/pipeline.h"

namespace caravan::app {

// The batches that compute all logits of one sequence in slot 0, in chunks that fit the plan and have at most max_rows
// rows: positions 0, 1, ... with every row's logits wanted. Throws RequestError when the plan's context or vocabulary
// is too small for the tokens.
std::vector<stage::Batch> logits_batches(const engine::PlanSummary& plan, std::span<const int32_t> tokens,
                                         uint32_t max_rows);

// Computes them through a started pipeline, whose first plan has not been polled yet; on_row gets n_vocab logits per
// token, in order. Throws Error with the reason when a plan or ticket is lost.
//   max_rows: at most what the pipeline was told to give outputs for (CacheConfig::max_outputs)
void compute_logits(engine::Pipeline& pipeline, std::span<const int32_t> tokens, uint32_t max_rows,
                    const std::function<void(std::span<const float>)>& on_row);

// The subcommand: -m MODEL --tokens 1,2,3 -o FILE; writes n_tokens x n_vocab little-endian f32.
int run_logits(int argc, char** argv);

}  // namespace caravan::app
