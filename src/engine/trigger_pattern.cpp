#include "engine/trigger_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <array>

#include "base/error.h"

namespace caravan::engine {
namespace {

constexpr size_t kMaxPatternBytes = 8192;
constexpr uint32_t kMatchLimit = 2'000'000;  // steps; a search beyond is given up
constexpr uint32_t kHeapLimitKib = 16 * 1024;

std::string message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

template <auto free_function>
struct Free {
  template <typename T>
  void operator()(T* object) const {
    free_function(object);
  }
};

}  // namespace

struct TriggerPattern::Compiled {
  std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
  std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>> match;
  std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>> context;
};

TriggerPattern::TriggerPattern(const std::string& pattern, bool whole) : compiled_(std::make_unique<Compiled>()) {
  if (pattern.size() > kMaxPatternBytes)
    throw RequestError(
        fmt::format("trigger pattern: at most {} bytes are supported, found {}", kMaxPatternBytes, pattern.size()));
  int error = 0;
  PCRE2_SIZE where = 0;
  const uint32_t options =
      PCRE2_UTF | PCRE2_MATCH_INVALID_UTF | PCRE2_NEVER_BACKSLASH_C | (whole ? PCRE2_ANCHORED | PCRE2_ENDANCHORED : 0u);
  compiled_->code.reset(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options, &error, &where, nullptr));
  if (!compiled_->code)
    throw RequestError(fmt::format("trigger pattern '{}', at byte {}: {}", pattern, where, message(error)));
  pcre2_jit_compile(compiled_->code.get(), PCRE2_JIT_COMPLETE);  // without it, matching only takes longer
  compiled_->match.reset(pcre2_match_data_create_from_pattern(compiled_->code.get(), nullptr));
  compiled_->context.reset(pcre2_match_context_create(nullptr));
  if (!compiled_->match || !compiled_->context) throw ResourceError("no memory for a trigger pattern");
  pcre2_set_match_limit(compiled_->context.get(), kMatchLimit);
  pcre2_set_heap_limit(compiled_->context.get(), kHeapLimitKib);
}

TriggerPattern::~TriggerPattern() = default;
TriggerPattern::TriggerPattern(TriggerPattern&&) noexcept = default;
TriggerPattern& TriggerPattern::operator=(TriggerPattern&&) noexcept = default;

std::optional<size_t> TriggerPattern::find(std::string_view text) const {
  const int n_groups = pcre2_match(compiled_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0, 0,
                                   compiled_->match.get(), compiled_->context.get());
  if (n_groups == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (n_groups < 0) throw RequestError("trigger pattern: " + message(n_groups));
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(compiled_->match.get());
  for (int group = 1; group < n_groups; ++group) {
    const PCRE2_SIZE begin = bounds[2 * group], end = bounds[2 * group + 1];
    if (begin != PCRE2_UNSET && begin < end && end <= text.size()) return begin;
  }
  return bounds[0] <= text.size() ? std::optional<size_t>(bounds[0]) : std::nullopt;
}

}  // namespace caravan::engine
