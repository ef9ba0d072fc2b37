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
  // Flags whose effect is always on, or means nothing here: accepted. value: as in Option.
  void accepted(std::vector<std::string> names, std::string value, std::string why);
  // Arguments without a dash, in order. Those that may be missing come last; help leaves out those without a name.
  void positional(std::string name, std::string help, std::function<void(const std::string&)> set);
  void optional_positional(std::string name, std::string help, std::function<void(const std::string&)> set);

  enum class Result { run, exit };
  // Reads argv[1..], and the environment for options that are not given. --help and --version print and give exit.
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
  void apply_environment(std::span<const Given> given) const;

  std::string usage_, about_;
  std::vector<std::string> sections_{""};
  std::vector<Row> rows_;
  std::vector<Positional> positionals_;
};

// Setters for Option::set. Throw RequestError saying what is accepted.
std::function<void(const std::string&)> into(std::string& target);
std::function<void(const std::string&)> into(bool& target, bool value = true);
std::function<void(const std::string&)> into(int& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(uint32_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(uint64_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> into(float& target);
std::function<void(const std::string&)> into_list(std::vector<std::string>& target);  // separated by commas

// A whole number from text within [least, most]; throws RequestError.
int64_t parse_integer(const std::string& text, int64_t least, int64_t most);
double parse_number(const std::string& text);
std::vector<std::string> split(std::string_view text, char separator);
// Replaces \n \t \r \' \" \\ and \xNN by what they stand for; other backslashes stay.
std::string unescape(const std::string& text);

// Of the candidates the one closest to name (by edits), if it is close enough to be meant.
std::optional<std::string> closest(const std::string& name, std::span<const std::string> candidates);

}  // namespace caravan::app
