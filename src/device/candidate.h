// A token that sampling may choose.
#pragma once

#include <cstdint>

namespace caravan::device {

struct Candidate {
  int32_t id;
  float logit;
};

}  // namespace caravan::device
