#include "engine/sampling_params.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace caravan::engine {
namespace {

constexpr std::array<std::string_view, 5> kSupported = {"penalties", "top_k", "top_p", "min_p", "temperature"};
constexpr std::array<std::string_view, 4> kInert = {"dry", "top_n_sigma", "typ_p", "xtc"};

bool contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

template <typename T>
void require(bool condition, std::string_view field, std::string_view expected, const T& found) {
  if (!condition) throw RequestError(fmt::format("Field '{}': Value must be {}, found {}", field, expected, found));
}

}  // namespace

std::vector<std::string> default_sampler_order() {
  return {"penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"};
}

std::span<const std::string_view> supported_samplers() { return kSupported; }

std::span<const std::string_view> inert_samplers() { return kInert; }

void validate(const SamplingParams& params, uint32_t n_vocab) {
  require(std::isfinite(params.temperature), "temperature", "finite", params.temperature);
  require(std::isfinite(params.top_p) && params.top_p >= 0, "top_p", "a number >= 0", params.top_p);
  require(std::isfinite(params.min_p) && params.min_p <= 1, "min_p", "a number <= 1", params.min_p);
  require(params.min_keep >= 0, "min_keep", ">= 0", params.min_keep);
  require(std::isfinite(params.repeat_penalty) && params.repeat_penalty > 0, "repeat_penalty", "a number > 0",
          params.repeat_penalty);
  require(params.repeat_last_n >= -1, "repeat_last_n", ">= -1", params.repeat_last_n);
  require(std::isfinite(params.frequency_penalty), "frequency_penalty", "finite", params.frequency_penalty);
  require(std::isfinite(params.presence_penalty), "presence_penalty", "finite", params.presence_penalty);
  require(params.n_probs >= 0, "n_probs", ">= 0", params.n_probs);
  for (const LogitBias& entry : params.logit_bias) {
    require(entry.token >= 0 && static_cast<uint32_t>(entry.token) < n_vocab, "logit_bias",
            fmt::format("a token id below {}", n_vocab), entry.token);
    require(!std::isnan(entry.bias) && entry.bias != std::numeric_limits<float>::infinity(), "logit_bias",
            "a finite bias or minus infinity", entry.bias);
  }
  for (const std::string& sampler : params.samplers) {
    require(contains(kSupported, sampler) || contains(kInert, sampler), "samplers",
            fmt::format("of {} or {}", fmt::join(kSupported, ", "), fmt::join(kInert, ", ")), sampler);
  }
}

}  // namespace caravan::engine
