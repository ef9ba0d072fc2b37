#include "engine/sampling_params.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "engine/sampler_table.h"

namespace caravan::engine {
namespace {

constexpr size_t kMaxBreakers = 256;                // every token is searched for each
constexpr std::string_view kInOrder = "edskypmxt";  // the default order
constexpr float kLongestMemory = 0.99f;

constexpr std::pair<std::string_view, std::string_view> kOtherNames[] = {
    {"nucleus", "top_p"}, {"typical", "typ_p"},    {"typical_p", "typ_p"},
    {"typ", "typ_p"},     {"temp", "temperature"}, {"top_nsigma", "top_n_sigma"}};

const SamplerRow* find_sampler(std::string_view name) {
  for (const SamplerRow& row : sampler_table())
    if (row.name == name) return &row;
  return nullptr;
}

std::string known_names() {
  std::vector<std::string_view> names;
  for (const SamplerRow& row : sampler_table()) names.push_back(row.name);
  return fmt::format("one of {}", fmt::join(names, ", "));
}

template <typename T>
void require(bool condition, std::string_view field, std::string_view expected, const T& found) {
  if (!condition) throw RequestError(fmt::format("Field '{}': Value must be {}, found {}", field, expected, found));
}

void require_finite(std::string_view field, float value) { require(std::isfinite(value), field, "finite", value); }

void validate_dry(const SamplingParams& params) {
  require_finite("dry_multiplier", params.dry_multiplier);
  require(std::isfinite(params.dry_base) && params.dry_base >= 1, "dry_base", "a number >= 1", params.dry_base);
  require(params.dry_allowed_length >= 0, "dry_allowed_length", ">= 0", params.dry_allowed_length);
  require(params.dry_penalty_last_n >= -1, "dry_penalty_last_n", ">= -1", params.dry_penalty_last_n);
  require(params.dry_sequence_breakers.size() <= kMaxBreakers, "dry_sequence_breakers",
          fmt::format("a list of at most {} strings", kMaxBreakers), params.dry_sequence_breakers.size());
}

void validate_feedback(const SamplingParams& params) {
  require(params.mirostat >= 0 && params.mirostat <= 2, "mirostat", "0, 1 or 2", params.mirostat);
  require_finite("mirostat_tau", params.mirostat_tau);
  require_finite("mirostat_eta", params.mirostat_eta);
  require(std::isfinite(params.adaptive_target) && params.adaptive_target <= 1, "adaptive_target", "a number <= 1",
          params.adaptive_target);
  require(params.adaptive_decay >= 0 && params.adaptive_decay <= kLongestMemory, "adaptive_decay",
          fmt::format("in [0, {}]", kLongestMemory), params.adaptive_decay);
  const bool listed = std::find(params.samplers.begin(), params.samplers.end(), "adaptive_p") != params.samplers.end();
  require(params.adaptive_target < 0 || listed, "adaptive_target", "negative unless 'samplers' lists adaptive_p",
          params.adaptive_target);
}

}  // namespace

std::vector<std::string> default_sampler_order() { return sampler_names(kInOrder); }

std::vector<std::string> sampler_names(std::string_view characters) {
  std::vector<std::string> names;
  for (const char c : characters) {
    const auto rows = sampler_table();
    const auto row = std::find_if(rows.begin(), rows.end(), [c](const SamplerRow& r) { return r.character == c; });
    if (row == rows.end())
      throw RequestError(fmt::format("Field 'samplers': '{}' is not one of the characters {}a", c, kInOrder));
    names.emplace_back(row->name);
  }
  return names;
}

std::string sampler_name(std::string_view text) {
  std::string name(text);
  std::replace(name.begin(), name.end(), '-', '_');
  for (const auto& [other, meant] : kOtherNames)
    if (name == other) return std::string(meant);
  return find_sampler(name) ? name : std::string(text);
}

void validate(const SamplingParams& params, uint32_t n_vocab) {
  require_finite("temperature", params.temperature);
  require_finite("dynatemp_range", params.dynatemp_range);
  require_finite("dynatemp_exponent", params.dynatemp_exponent);
  require(std::isfinite(params.top_p) && params.top_p >= 0, "top_p", "a number >= 0", params.top_p);
  require(std::isfinite(params.min_p) && params.min_p <= 1, "min_p", "a number <= 1", params.min_p);
  require_finite("top_n_sigma", params.top_n_sigma);
  require_finite("typical_p", params.typical_p);
  require_finite("xtc_probability", params.xtc_probability);
  require_finite("xtc_threshold", params.xtc_threshold);
  require(params.min_keep >= 0, "min_keep", ">= 0", params.min_keep);
  require(std::isfinite(params.repeat_penalty) && params.repeat_penalty > 0, "repeat_penalty", "a number > 0",
          params.repeat_penalty);
  require(params.repeat_last_n >= -1, "repeat_last_n", ">= -1", params.repeat_last_n);
  require_finite("frequency_penalty", params.frequency_penalty);
  require_finite("presence_penalty", params.presence_penalty);
  validate_dry(params);
  validate_feedback(params);
  require(params.n_probs >= 0, "n_probs", ">= 0", params.n_probs);
  for (const LogitBias& entry : params.logit_bias) {
    require(entry.token >= 0 && static_cast<uint32_t>(entry.token) < n_vocab, "logit_bias",
            fmt::format("a token id below {}", n_vocab), entry.token);
    require(!std::isnan(entry.bias) && entry.bias != std::numeric_limits<float>::infinity(), "logit_bias",
            "a finite bias or minus infinity", entry.bias);
  }
  for (const std::string& sampler : params.samplers)
    require(find_sampler(sampler) != nullptr, "samplers", known_names(), sampler);
}

}  // namespace caravan::engine
