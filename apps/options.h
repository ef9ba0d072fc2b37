// Command-line options as llama.cpp's users know them: "-ngl 99", "--n-gpu-layers 99" or "--n_gpu_layers=99",
// environment variables as a fallback, help made from the table, a suggestion for what is misspelt.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace caravan::app {

// One option: what sets it, what it says in --help, what it does.
struct Option {
  std::vector<std::string> names;  // "-c", "--ctx-size"
  // Shown in help, e.g. "N"; empty: a flag without value; "[on|off]": one of these words may follow, or nothing (set
  // then gets "").
  std::string value;
  std::string help;
  std::vector<std::string> environment;         // variables read when the option is not given, first one wins
  std::function<void(const std::string&)> set;  // throws RequestError for a bad value; flags get ""
  // Of a flag: what a variable that says "off" does; without it, nothing.
  std::function<void()> set_off = {};
  // The value is not shown by --print-config.
  bool is_secret = false;
};

// A table of options for one command.
class OptionParser {
 public:
  // usage: the line after "usage: ", e.g. "caravan server -m FILE [options]"; about: what the command does.
  OptionParser(std::string usage, std::string about);

  // Starts a section of the help.
  void section(std::string title);
  void add(Option option);
  // Flags of llama.cpp's tools that this version knows but does not support: using one is an error that says so.
  // instead: what to do then, said behind it.
  void unsupported(std::vector<std::string> names, const std::string& instead = {});
  // Flags whose effect is always on, or means nothing here: accepted. value: as in Option. environment: variables that
  // are accepted as well; must_stay_on: those that say "off" are an error.
  void accepted(std::vector<std::string> names, std::string value, std::string why,
                std::vector<std::string> environment = {}, bool must_stay_on = false);
  // A set variable whose name begins with prefix is an error unless some option reads it.
  void refuse_unread_variables(std::string prefix) { unread_prefix_ = std::move(prefix); }
  // Arguments without a dash, in order. Those that may be missing come last; help leaves out those without a name.
  void positional(std::string name, std::string help, std::function<void(const std::string&)> set);
  void optional_positional(std::string name, std::string help, std::function<void(const std::string&)> set);

  enum class Result { run, exit };
  // Reads argv[1..], and the environment for options that are not given. --help and --version print and give exit; so
  // does --print-config, after everything was checked, with a line for each option that is set and what set it.
  // Throws RequestError naming the option: unknown (with a suggestion), missing or bad value.
  Result parse(int argc, char** argv);

  std::string help() const;

 private:
  struct Row {
    Option option;
    enum class Kind { normal, unsupported, accepted } kind = Kind::normal;
    size_t section = 0;
  };
  struct Positional {
    std::string name, help;
    std::function<void(const std::string&)> set;
    bool is_optional;
  };
  // An option of the command line, its name as it was written.
  struct Given {
    const Row* row;
    std::string name, value;
  };
  const Row* find(const std::string& name) const;
  Given read_option(int argc, char** argv, int& i) const;
  [[noreturn]] void unknown(const std::string& name) const;
  void apply(const Row& row, const std::string& name, const std::string& value) const;
  // Returns what the environment gave, name: the variable.
  std::vector<Given> apply_environment(std::span<const Given> given) const;
  void apply_variable(const Row& row, const std::string& variable, const std::string& value) const;
  void check_unread_variables() const;
  void print_config(std::span<const Given> environment, std::span<const Given> given) const;

  std::string usage_, about_;
  std::vector<std::string> sections_{""};
  std::vector<Row> rows_;
  std::vector<Positional> positionals_;
  std::string unread_prefix_;
};

// Setters for Option::set. Throw RequestError saying what is accepted.
std::function<void(const std::string&)> into(std::string& target);
std::function<void(const std::string&)> into(bool& target, bool value = true);
std::function<void(const std::string&)> into(int& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(uint32_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(uint64_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(float& target);
// Separated by commas; white space around the parts and empty parts are dropped.
std::function<void(const std::string&)> into_list(std::vector<std::string>& target);

// Runs action. An error of type E that it throws becomes a RequestError that also names the option and variables behind
// it, and what they accept: where only use shows that a value is wrong.
template <typename E, typename Action>
auto blaming(std::string_view option, Action action) -> decltype(action()) {
  try {
    return action();
  } catch (const E& error) {
    throw RequestError(std::string(error.what()) + " (" + std::string(option) + ")");
  }
}

// A whole number from text within [least, most]; throws RequestError.
int64_t parse_integer(const std::string& text, int64_t least, int64_t most);
double parse_number(const std::string& text);
std::vector<std::string> split(std::string_view text, char separator);
// Replaces \n \t \r \' \" \\ and \xNN by what they stand for; other backslashes stay.
std::string unescape(const std::string& text);

// Of the candidates the one closest to name (by edits), if it is close enough to be meant.
std::optional<std::string> closest(const std::string& name, std::span<const std::string> candidates);

}  // namespace caravan::app
