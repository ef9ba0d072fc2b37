// The random stream of a request as a pure function of (seed, position), so that a request that is preempted or
// recovered draws the same numbers again. Two rounds of the SplitMix64 finaliser over a counter.
// Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
#pragma once

#include <cstdint>

namespace caravan::engine {

// SplitMix64's finaliser: a bijection of 64-bit words in which every input bit reaches every output bit.
constexpr uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Who draws: every purpose has numbers of its own at each position.
// masked: the second draw, when the grammar refused the first.
enum class RandomStream : uint64_t { token = 0, xtc = 1, masked = 2 };

// A uniform number in [0, 1) with 53 random bits.
constexpr double uniform(uint32_t seed, uint64_t position, RandomStream stream = RandomStream::token) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd
  // seed + 1 has at most 33 bits, so that every pair of seed and stream starts elsewhere.
  const uint64_t start = mix64(((static_cast<uint64_t>(stream) << 33) + seed + 1) * kGolden);
  return static_cast<double>(mix64(start + (position + 1) * kGolden) >> 11) * 0x1p-53;
}

}  // namespace caravan::engine
