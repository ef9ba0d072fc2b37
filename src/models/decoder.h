// The decoder that most architectures are. What differs between them is data: the DecoderForm, and the numbers in
// Hyperparameters. An architecture's own file reads its keys, names its form, and uses the functions below for the rest
// (docs/adding-a-model.md).
#pragma once

#include "models/arch.h"

namespace caravan::models {

// Reads the keys that all decoders share (hyperparameters.h: read_common) and puts the form into the result.
// Throws FormatError naming the key; NotSupportedError naming what this decoder does not compute: experts without
// FeedForward::gated_or_experts, attention that is not causal, ALiBi, clamped queries and keys, prediction layers.
Hyperparameters read_decoder(const gguf::Metadata& metadata, const DecoderForm& form);

// Reads the keys of sliding-window layers: attention.sliding_window (0: there are no such layers) and
// attention.sliding_window_pattern: a number n, every n-th layer having full attention, or an array that says for each
// layer whether it has a window. Window layers get the rotary embedding of the others, with rope.freq_base_swa as its
// base where the file has that.
//   default_window: 0: the key is required
void read_windows(const gguf::Metadata& metadata, uint32_t default_window, uint32_t default_period,
                  Hyperparameters& hp);

// The functions of an Arch.
std::vector<TensorDecl> decoder_tensors(const Hyperparameters& hp);
// Group 0: layers with full attention; group 1, in models with windows: the sliding-window layers.
std::vector<CacheGroup> decoder_cache_groups(const Hyperparameters& hp);
void build_decoder(graph::Builder& b, const Hyperparameters& hp, const Slice& slice);

}  // namespace caravan::models
