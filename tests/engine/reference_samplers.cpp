#include "engine/reference_samplers.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

namespace caravan::engine::test {
namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

Options in_order(Options options) {
  std::sort(options.begin(), options.end(),
            [](const Option& a, const Option& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; });
  return options;
}

Options first(const Options& options, size_t n) {
  return {options.begin(), options.begin() + static_cast<ptrdiff_t>(std::min(n, options.size()))};
}

double entropy(const std::vector<double>& p) {
  double h = 0;
  for (const double x : p) h += x > 0 ? -x * std::log(x) : 0;
  return h;
}

// The length of the longest end of history[0..end) that is also the end of the whole history.
size_t common_end(const std::vector<int32_t>& history, size_t end, size_t begin) {
  size_t n = 0;
  while (end > begin + n && history[end - 1 - n] == history[history.size() - 1 - n]) ++n;
  return n;
}

// Tokens after the last one in which a breaker ends.
size_t after_breaker(const SamplingParams& p, const std::vector<std::string>& texts) {
  std::string all;
  std::vector<size_t> ends;
  for (const std::string& text : texts) ends.push_back((all += text).size());
  size_t last = 0;  // the end of the last breaker
  for (const std::string& breaker : p.dry_sequence_breakers)
    if (const size_t at = all.rfind(breaker); at != std::string::npos) last = std::max(last, at + breaker.size());
  if (last == 0) return texts.size();
  size_t token = 0;
  while (ends[token] < last) ++token;
  return texts.size() - 1 - token;
}

}  // namespace

std::vector<double> probabilities(const Options& options) {
  double max = kImpossible, total = 0;
  for (const Option& o : options) max = std::max(max, o.logit);
  std::vector<double> p;
  for (const Option& o : options) p.push_back(std::exp(o.logit - max));
  for (const double x : p) total += x;
  for (double& x : p) x /= total;
  return p;
}

Options reference_penalties(Options options, const SamplingParams& p, const std::vector<int32_t>& history) {
  const size_t back = p.repeat_last_n < 0 ? history.size() : std::min<size_t>(history.size(), p.repeat_last_n);
  for (Option& o : options) {
    const auto n = std::count(history.end() - static_cast<ptrdiff_t>(back), history.end(), o.id);
    if (n == 0) continue;
    o.logit = o.logit > 0 ? o.logit / p.repeat_penalty : o.logit * p.repeat_penalty;
    o.logit -= static_cast<double>(n) * p.frequency_penalty + p.presence_penalty;
  }
  return options;
}

Options reference_dry(Options options, const SamplingParams& p, const std::vector<int32_t>& history,
                      const std::vector<std::string>& texts) {
  if (p.dry_multiplier == 0 || p.dry_penalty_last_n == 0) return options;
  const size_t back =
      p.dry_penalty_last_n < 0 ? history.size() : std::min<size_t>(history.size(), p.dry_penalty_last_n);
  const size_t begin = history.size() - back;
  const size_t limit = std::min(back, after_breaker(p, texts));
  const auto allowed = static_cast<size_t>(p.dry_allowed_length);
  if (back <= allowed || limit < allowed) return options;
  for (Option& o : options) {
    std::optional<size_t> longest;
    for (size_t i = begin + 1; i < history.size(); ++i) {
      // o.id followed history[begin..i); does it end like the whole history?
      if (history[i] != o.id) continue;
      const size_t n = std::min(common_end(history, i, begin), limit);
      if (n >= allowed) longest = std::max(longest.value_or(0), n);
    }
    if (longest)
      o.logit -= p.dry_multiplier * std::pow(static_cast<double>(p.dry_base), static_cast<double>(*longest - allowed));
  }
  return options;
}

Options reference_top_n_sigma(Options options, const SamplingParams& p) {
  if (p.top_n_sigma <= 0) return options;
  double n = 0, sum = 0, squares = 0, max = kImpossible;
  for (const Option& o : options) {
    if (std::isinf(o.logit)) continue;
    ++n;
    sum += o.logit;
    max = std::max(max, o.logit);
  }
  if (n == 0) return options;
  for (const Option& o : options)
    if (!std::isinf(o.logit)) squares += (o.logit - sum / n) * (o.logit - sum / n);
  for (Option& o : options)
    if (o.logit < max - p.top_n_sigma * std::sqrt(squares / n)) o.logit = kImpossible;
  return options;
}

Options reference_top_k(Options options, const SamplingParams& p) {
  return p.top_k <= 0 ? options : first(in_order(std::move(options)), static_cast<size_t>(p.top_k));
}

Options reference_typical_p(Options options, const SamplingParams& p) {
  if (p.typical_p >= 1) return options;
  options = in_order(std::move(options));
  const std::vector<double> prob = probabilities(options);
  const double h = entropy(prob);
  std::multimap<double, size_t> by_distance;
  for (size_t i = 0; i < options.size(); ++i) by_distance.emplace(std::abs(-std::log(prob[i]) - h), i);
  Options kept;
  double sum = 0;
  for (const auto& [distance, i] : by_distance) {
    if (sum > p.typical_p && kept.size() >= std::max<size_t>(1, p.min_keep)) break;
    kept.push_back(options[i]);
    sum += prob[i];
  }
  return in_order(kept);
}

Options reference_top_p(Options options, const SamplingParams& p) {
  if (p.top_p >= 1) return options;
  options = in_order(std::move(options));
  const std::vector<double> prob = probabilities(options);
  size_t n = 1;
  double sum = prob[0];
  while (n < options.size() && (sum < p.top_p || n < static_cast<size_t>(p.min_keep))) sum += prob[n++];
  return first(options, n);
}

Options reference_min_p(Options options, const SamplingParams& p) {
  if (p.min_p <= 0) return options;
  double max = kImpossible;
  for (const Option& o : options) max = std::max(max, o.logit);
  Options kept;
  for (const Option& o : options)
    if (std::exp(o.logit - max) >= p.min_p) kept.push_back(o);
  if (kept.size() >= static_cast<size_t>(p.min_keep)) return kept;
  return first(in_order(std::move(options)), static_cast<size_t>(p.min_keep));
}

Options reference_xtc(Options options, const SamplingParams& p, double chance) {
  if (p.xtc_threshold > 0.5f || chance >= p.xtc_probability) return options;
  options = in_order(std::move(options));
  const std::vector<double> prob = probabilities(options);
  const auto n = static_cast<size_t>(
      std::count_if(prob.begin(), prob.end(), [&](double x) { return x >= static_cast<double>(p.xtc_threshold); }));
  if (n < 2 || options.size() - (n - 1) < static_cast<size_t>(p.min_keep)) return options;
  return {options.begin() + static_cast<ptrdiff_t>(n - 1), options.end()};
}

Options reference_temperature(Options options, const SamplingParams& p) {
  double t = p.temperature;
  if (p.dynatemp_range > 0) {
    if (options.size() < 2) return options;
    options = in_order(std::move(options));
    const double least = std::max(0.0, t - p.dynatemp_range), most = t + p.dynatemp_range;
    const double part = entropy(probabilities(options)) / std::log(static_cast<double>(options.size()));
    t = least + (most - least) * std::pow(part, static_cast<double>(p.dynatemp_exponent));
  }
  if (t <= 0) return first(in_order(std::move(options)), 1);
  for (Option& o : options) o.logit /= t;
  return options;
}

Options reference_sampler(const std::string& name, Options options, const SamplingParams& p,
                          const std::vector<int32_t>& history, const std::vector<std::string>& texts, double chance) {
  if (name == "penalties") return reference_penalties(std::move(options), p, history);
  if (name == "dry") return reference_dry(std::move(options), p, history, texts);
  if (name == "top_n_sigma") return reference_top_n_sigma(std::move(options), p);
  if (name == "top_k") return reference_top_k(std::move(options), p);
  if (name == "typ_p") return reference_typical_p(std::move(options), p);
  if (name == "top_p") return reference_top_p(std::move(options), p);
  if (name == "min_p") return reference_min_p(std::move(options), p);
  if (name == "xtc") return reference_xtc(std::move(options), p, chance);
  if (name == "temperature") return reference_temperature(std::move(options), p);
  return options;
}

int32_t reference_draw(const Options& options, double u) {
  const std::vector<double> p = probabilities(options);
  double sum = 0;
  for (size_t i = 0; i < options.size(); ++i)
    if ((sum += p[i]) > u) return options[i].id;
  return options.back().id;
}

int32_t reference_mirostat(Options options, const SamplingParams& p, uint32_t n_vocab, double u, double& mu) {
  options = in_order(std::move(options));
  std::vector<double> prob = probabilities(options);
  size_t n = 1;
  if (p.mirostat == 1) {
    double tb = 0, tt = 0;
    for (size_t i = 1; i < std::min<size_t>(100, prob.size()); ++i) {
      const double t = std::log((static_cast<double>(i) + 1) / static_cast<double>(i));
      tb += t * std::log(prob[i - 1] / prob[i]);
      tt += t * t;
    }
    const double s = tb / tt, e = s - 1;
    const double k = std::pow(e * std::pow(2, mu) / (1 - std::pow(n_vocab, -e)), 1 / s);
    n = std::clamp<size_t>(static_cast<size_t>(std::clamp(k, 1.0, 1e9)), 1, prob.size());
  } else {
    while (n < prob.size() && -std::log2(prob[n]) <= mu) ++n;
  }
  options = first(options, n);
  prob = probabilities(options);
  const int32_t id = reference_draw(options, u);
  for (size_t i = 0; i < options.size(); ++i)
    if (options[i].id == id) mu -= p.mirostat_eta * (-std::log2(prob[i]) - p.mirostat_tau);
  return id;
}

int32_t reference_adaptive(Options options, const SamplingParams& p, double u, std::vector<double>& drawn) {
  const std::vector<double> prob = probabilities(options);
  // The average of earlier draws, each step back weighing decay times less, after endless ones that met the target.
  double weight = 1, sum = 0, total = 0;
  for (auto past = drawn.rbegin(); past != drawn.rend(); ++past, weight *= p.adaptive_decay) {
    sum += weight * *past;
    total += weight;
  }
  sum += weight * p.adaptive_target / (1.0 - p.adaptive_decay);
  total += weight / (1.0 - p.adaptive_decay);
  const double aim = std::clamp(2.0 * p.adaptive_target - sum / total, 0.0, 1.0);
  for (size_t i = 0; i < options.size(); ++i) {
    const double d = std::abs(prob[i] - aim) / 0.3;
    options[i].logit = 5 - 10 * d * d / (1 + d);
  }
  const int32_t id = reference_draw(options, u);
  for (size_t i = 0; i < options.size(); ++i)
    if (options[i].id == id) drawn.push_back(prob[i]);
  return id;
}

}  // namespace caravan::engine::test
