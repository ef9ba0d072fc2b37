#include "options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "base/error.h"

namespace caravan::app {
namespace {

constexpr size_t kHelpColumn = 36;

// Long names compare with '-' for '_'.
std::string canonical(const std::string& name) {
  std::string result = name;
  if (name.rfind("--", 0) == 0) std::replace(result.begin() + 2, result.end(), '_', '-');
  return result;
}

// Insertions, deletions, substitutions and swaps of neighbours that turn a into b (optimal string alignment distance).
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i)
    for (size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

// "-1", "-0.5" and "- a line" are values, not options.
bool looks_like_option(const std::string& text) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  return text.size() > 1 && text[0] == '-' && (text[1] == '-' || is_letter(text[1]));
}

// True when value is one of the words of "[on|off]".
bool is_choice_of(const std::string& choices, const std::string& value) {
  const auto words = split(std::string_view(choices).substr(1, choices.size() - 2), '|');
  return std::find(words.begin(), words.end(), value) != words.end();
}

}  // namespace

OptionParser::OptionParser(std::string usage, std::string about) : usage_(std::move(usage)), about_(std::move(about)) {}

void OptionParser::section(std::string title) { sections_.push_back(std::move(title)); }

void OptionParser::add(Option option) { rows_.push_back({std::move(option), Row::Kind::normal, sections_.size() - 1}); }

void OptionParser::unsupported(std::vector<std::string> names, const std::string& instead) {
  for (std::string& name : names)
    rows_.push_back({{{std::move(name)}, "", instead, {}, {}}, Row::Kind::unsupported, 0});
}

void OptionParser::accepted(std::vector<std::string> names, std::string value, std::string why,
                            std::vector<std::string> environment, bool must_stay_on) {
  Option option{std::move(names), std::move(value), std::move(why), std::move(environment), {}};
  if (must_stay_on) option.set_off = [] { throw RequestError("it cannot be turned off in this version"); };
  rows_.push_back({std::move(option), Row::Kind::accepted, sections_.size() - 1});
}

void OptionParser::positional(std::string name, std::string help, std::function<void(const std::string&)> set) {
  positionals_.push_back({std::move(name), std::move(help), std::move(set), false});
}

void OptionParser::optional_positional(std::string name, std::string help,
                                       std::function<void(const std::string&)> set) {
  positionals_.push_back({std::move(name), std::move(help), std::move(set), true});
}

const OptionParser::Row* OptionParser::find(const std::string& name) const {
  const std::string wanted = canonical(name);
  for (const Row& row : rows_)
    for (const std::string& candidate : row.option.names)
      if (candidate == wanted) return &row;
  return nullptr;
}

void OptionParser::unknown(const std::string& name) const {
  std::vector<std::string> candidates;
  for (const Row& row : rows_)
    if (row.kind != Row::Kind::unsupported)
      candidates.insert(candidates.end(), row.option.names.begin(), row.option.names.end());
  const auto suggestion = closest(canonical(name), candidates);
  throw RequestError(fmt::format("invalid argument: {}{}; --help lists all options", name,
                                 suggestion ? fmt::format(", did you mean {}?", *suggestion) : ""));
}

void OptionParser::apply(const Row& row, const std::string& name, const std::string& value) const {
  try {
    if (row.option.set) row.option.set(value);
  } catch (const RequestError& error) {
    throw RequestError(fmt::format("{}: {}", name, error.what()));
  }
}

void OptionParser::apply_variable(const Row& row, const std::string& variable, const std::string& value) const {
  const std::string name = row.option.is_secret ? variable : fmt::format("{}='{}'", variable, value);
  const std::string& expected = row.option.value;
  if (!expected.empty()) {
    if (expected.front() == '[' && !is_choice_of(expected, value))
      throw RequestError(fmt::format("{}: expected one of {}", name, expected));
    return apply(row, name, value);
  }
  if (value == "1" || value == "on" || value == "true" || value == "enabled") return apply(row, variable, "");
  if (value != "0" && value != "off" && value != "false" && value != "disabled")
    throw RequestError(fmt::format("{}: accepted are on, true, enabled, 1 and off, false, disabled, 0", name));
  if (!row.option.set_off) return;
  try {
    row.option.set_off();
  } catch (const RequestError& error) {
    throw RequestError(fmt::format("{}: {}", name, error.what()));
  }
}

std::vector<OptionParser::Given> OptionParser::apply_environment(std::span<const Given> given) const {
  std::vector<Given> applied;
  for (const Row& row : rows_) {
    if (std::any_of(given.begin(), given.end(), [&](const Given& g) { return g.row == &row; })) continue;
    for (const std::string& variable : row.option.environment) {
      const char* text = std::getenv(variable.c_str());
      if (text == nullptr || *text == '\0') continue;
      apply_variable(row, variable, text);
      applied.push_back({&row, variable, text});
      break;
    }
  }
  return applied;
}

void OptionParser::check_unread_variables() const {
  if (unread_prefix_.empty()) return;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (!text.starts_with(unread_prefix_) || equals == std::string_view::npos || equals + 1 == text.size()) continue;
    const std::string name(text.substr(0, equals));
    const bool is_read = std::any_of(rows_.begin(), rows_.end(), [&](const Row& row) {
      const auto& variables = row.option.environment;
      return std::find(variables.begin(), variables.end(), name) != variables.end();
    });
    if (!is_read)
      throw RequestError(
          fmt::format("{}='{}' is not supported by this version: no option reads it; --help lists those "
                      "that are read",
                      name, text.substr(equals + 1)));
  }
}

void OptionParser::print_config(std::span<const Given> environment, std::span<const Given> given) const {
  const auto line = [](const Given& g, const std::string& source) {
    const Option& option = g.row->option;
    fmt::print("{}{}{}{}\n", option.names.back(), option.value.empty() && g.value.empty() ? "" : " ",
               option.is_secret ? "(secret)" : g.value, source);
  };
  for (const Given& g : environment) line(g, fmt::format("  [{}]", g.name));
  for (size_t i = 0; i < given.size(); ++i)
    if (std::none_of(given.begin() + static_cast<ptrdiff_t>(i) + 1, given.end(),
                     [&](const Given& later) { return later.row == given[i].row; }))
      line(given[i], "");
}

// Reads the option at argv[i] and its value; i ends at the last argument used.
OptionParser::Given OptionParser::read_option(int argc, char** argv, int& i) const {
  const std::string argument = argv[i];
  const size_t equals = argument.rfind("--", 0) == 0 ? argument.find('=') : std::string::npos;
  const std::string name = argument.substr(0, equals);
  const Row* row = find(name);
  if (row == nullptr) unknown(name);
  if (row->kind == Row::Kind::unsupported) {
    const std::string& instead = row->option.help;
    throw RequestError(
        fmt::format("{} is not supported by this version{}{}", name, instead.empty() ? "" : ": ", instead));
  }
  const std::string& expected = row->option.value;
  const bool optional = !expected.empty() && expected.front() == '[';
  if (equals != std::string::npos) {
    const std::string value = argument.substr(equals + 1);
    if (expected.empty()) throw RequestError(fmt::format("{} takes no value", name));
    if (optional && !is_choice_of(expected, value))
      throw RequestError(fmt::format("{}: expected one of {}, found '{}'", name, expected, value));
    return {row, name, value};
  }
  if (expected.empty()) return {row, name, ""};
  // A value may begin with a dash, but the name of another option is none.
  const bool follows = i + 1 < argc && (optional ? is_choice_of(expected, argv[i + 1]) : find(argv[i + 1]) == nullptr);
  if (!follows && !optional) throw RequestError(fmt::format("{}: a value {} is missing", name, expected));
  return {row, name, follows ? argv[++i] : ""};
}

OptionParser::Result OptionParser::parse(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "-h" || argument == "--help" || argument == "--usage") {
      std::fputs(help().c_str(), stdout);
      return Result::exit;
    }
    if (argument == "--version") {
      fmt::print(stderr, "version: {}\nbuilt with {}\n", CARAVAN_VERSION, __VERSION__);
      return Result::exit;
    }
  }
  std::vector<Given> given;
  std::vector<std::string> plain;  // arguments that are no options
  bool prints_config = false;
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--print-config") {
      prints_config = true;
    } else if (looks_like_option(argv[i])) {
      given.push_back(read_option(argc, argv, i));
    } else {
      plain.emplace_back(argv[i]);
    }
  }
  if (plain.size() > positionals_.size())
    throw RequestError(fmt::format("unexpected argument '{}'", plain[positionals_.size()]));
  if (plain.size() < positionals_.size() && !positionals_[plain.size()].is_optional) {
    const Positional& missing = positionals_[plain.size()];
    throw RequestError(fmt::format("missing argument {}: {}", missing.name, missing.help));
  }
  check_unread_variables();
  const std::vector<Given> from_environment = apply_environment(given);
  for (const Given& g : given) apply(*g.row, g.name, g.value);
  for (size_t i = 0; i < plain.size(); ++i) positionals_[i].set(plain[i]);
  if (prints_config) print_config(from_environment, given);
  return prints_config ? Result::exit : Result::run;
}

std::string OptionParser::help() const {
  std::string text = fmt::format("usage: {}\n\n{}\n", usage_, about_);
  for (const Positional& p : positionals_)
    if (!p.name.empty()) text += fmt::format("\n  {:<{}} {}\n", p.name, kHelpColumn - 3, p.help);
  for (size_t s = 0; s < sections_.size(); ++s) {
    bool titled = false;
    for (const Row& row : rows_) {
      if (row.section != s || row.kind == Row::Kind::unsupported) continue;
      if (!titled) text += fmt::format("\n{}\n", sections_[s].empty() ? "Options:" : sections_[s] + ":");
      titled = true;
      std::string left = fmt::format("  {} {}", fmt::join(row.option.names, ", "), row.option.value);
      if (left.size() >= kHelpColumn - 1) left += "\n" + std::string(kHelpColumn, ' ');
      text += fmt::format("{:<{}}{}", left, kHelpColumn, row.option.help);
      if (!row.option.environment.empty()) text += fmt::format(" [{}]", fmt::join(row.option.environment, ", "));
      text += '\n';
    }
  }
  text += '\n';
  for (const auto& [name, effect] : {std::pair{"-h, --help", "print this and exit"},
                                     {"--version", "print the version and exit"},
                                     {"--print-config", "print what options and variables come to, and exit"}})
    text += fmt::format("  {:<{}}{}\n", name, kHelpColumn - 2, effect);
  return text;
}

std::function<void(const std::string&)> into(std::string& target) {
  return [&target](const std::string& value) { target = value; };
}

std::function<void(const std::string&)> into(bool& target, bool value) {
  return [&target, value](const std::string&) { target = value; };
}

std::function<void(const std::string&)> into(int& target, int64_t least, int64_t most) {
  return [&target, least, most](const std::string& value) {
    target = static_cast<int>(parse_integer(value, least, most));
  };
}

std::function<void(const std::string&)> into(uint32_t& target, int64_t least, int64_t most) {
  return [&target, least, most](const std::string& value) {
    target = static_cast<uint32_t>(parse_integer(value, least, most));
  };
}

std::function<void(const std::string&)> into(uint64_t& target, int64_t least, int64_t most) {
  return [&target, least, most](const std::string& value) {
    target = static_cast<uint64_t>(parse_integer(value, least, most));
  };
}

std::function<void(const std::string&)> into(float& target) {
  return [&target](const std::string& value) {
    const double number = parse_number(value);
    if (std::abs(number) > std::numeric_limits<float>::max())
      throw RequestError(fmt::format("expected a number of single precision, found '{}'", value));
    target = static_cast<float>(number);
  };
}

std::function<void(const std::string&)> into_list(std::vector<std::string>& target) {
  return [&target](const std::string& value) {
    target = split(value, ',');
    for (std::string& part : target) {
      part.erase(0, part.find_first_not_of(" \t\r\n"));
      part.erase(part.find_last_not_of(" \t\r\n") + 1);
    }
    std::erase(target, "");
  };
}

int64_t parse_integer(const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size() || value < least || value > most)
    throw RequestError(fmt::format("expected a whole number from {} to {}, found '{}'", least, most, text));
  return value;
}

double parse_number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value))
    throw RequestError(fmt::format("expected a number, found '{}'", text));
  return value;
}

std::string unescape(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      result += text[i];
      continue;
    }
    const char c = text[++i];
    switch (c) {
      case 'n':
        result += '\n';
        break;
      case 't':
        result += '\t';
        break;
      case 'r':
        result += '\r';
        break;
      case '\'':
      case '"':
      case '\\':
        result += c;
        break;
      case 'x':
        if (i + 2 < text.size() && std::isxdigit(static_cast<unsigned char>(text[i + 1])) &&
            std::isxdigit(static_cast<unsigned char>(text[i + 2]))) {
          result += static_cast<char>(std::stoi(text.substr(i + 1, 2), nullptr, 16));
          i += 2;
          break;
        }
        [[fallthrough]];
      default:
        result += '\\';
        result += c;
    }
  }
  return result;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (true) {
    const size_t end = text.find(separator);
    parts.emplace_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

std::optional<std::string> closest(const std::string& name, std::span<const std::string> candidates) {
  std::optional<std::string> best;
  size_t best_distance = std::max<size_t>(2, name.size() / 3) + 1;  // about one mistake in three characters
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(name, candidate);
    // At least one character besides the first dash must agree.
    if (distance < best_distance && distance + 1 < name.size()) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace caravan::app
