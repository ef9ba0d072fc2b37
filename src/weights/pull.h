// Fetching many chunks from several sources at the same time.
#pragma once

#include <chrono>
#include <functional>
#include <span>

#include "weights/source.h"

namespace caravan::weights {

// When a source that has chunks is helped with them by a later one: after before_help, when it would take seconds_left
// for the rest, as fast as it has been until then, and for as long as the later one is twice as fast.
struct PullPatience {
  std::chrono::milliseconds before_help{2000};
  double seconds_left = 3;
};

// Fetches every chunk from the first source that has it, all sources in parallel, and hands the verified bytes to
// use(), on the calling thread: the chunks of a tensor in order, tensors in any. A source that fails or delivers wrong
// bytes is logged and the next one is asked; one that is slow is
// helped, where it may be; the sources before the one that delivered get an offer() of the bytes.
//   chunks   those of one tensor together and in order
//   asking   called on the calling thread again and again while sources are asked what they have; what it throws ends
//            the pull
// A few chunks per source are held in memory. Throws SourceError when no source delivers a chunk, and what use()
// throws; a fetch that is under way is waited for.
void pull(std::span<const ChunkRef> chunks, std::span<WeightSource* const> sources,
          const std::function<void(const ChunkRef&, std::span<const std::byte>)>& use,
          const PullPatience& patience = {}, const std::function<void()>& asking = {});

}  // namespace caravan::weights
