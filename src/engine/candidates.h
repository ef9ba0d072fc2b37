// Candidates for the next token: their order, their probabilities, and a draw from them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace caravan::engine {

struct Candidate {
  int32_t id = 0;
  float logit = 0;
  bool operator==(const Candidate&) const = default;
};

// The order of candidates everywhere: larger logit first, ties by lowest id.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// A NaN would break that order; it counts as impossible.
inline float usable(float logit) { return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit; }

// What is left to choose from. sorted: items are in the order of before(). No logit is NaN.
struct CandidateList {
  std::vector<Candidate> items;
  bool sorted = false;

  void sort();
  // Puts the first k (at most all) in order and drops the rest.
  void keep_first(size_t k);
  // To be called when logits changed in a way that only rounding can have disturbed the order.
  void check_order();
  // The largest logit, minus infinity when nothing is possible. items is not empty.
  float max_logit() const;
  // The softmax of the logits, in the order of items. Empty when nothing is possible.
  std::vector<double> probabilities() const;
};

// Draws from the softmax of the candidates: the index of the first item whose running sum exceeds u * total. An
// impossible candidate is never drawn unless all are: then it is the one with the lowest id.
size_t draw(const CandidateList& list, double u);

}  // namespace caravan::engine
