// Megabytes of text per second of processor time that vocabularies tokenize on one thread, and how many tokens come
// out. Usage: bench_tokenizer TEXT VOCABULARY.gguf...
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <string>
#include <vector>

#include "base/file.h"
#include "gguf/reader.h"
#include "vocab/vocabulary.h"

namespace {

using namespace caravan;

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Processor time, unlike wall time, hardly suffers from what else runs on the machine.
void measure(const std::string& path, const std::string& text) {
  constexpr int kRepeats = 5;
  const auto model = gguf::Model::open(path);
  const auto vocabulary = vocab::Vocabulary::load(model.metadata());
  std::vector<double> rates;
  size_t n_tokens = 0;
  for (int i = 0; i < kRepeats; i++) {
    const double start = thread_cpu_seconds();
    n_tokens = vocabulary->tokenize(text, vocab::AddSpecial::no, vocab::ParseSpecial::no).size();
    rates.push_back(static_cast<double>(text.size()) / 1e6 / (thread_cpu_seconds() - start));
  }
  std::sort(rates.begin(), rates.end());
  fmt::print("{:<24} {:<8} {:>8} tokens  median {:6.2f} MB/s  best {:6.2f}  worst {:6.2f}  n {}\n",
             std::filesystem::path(path).stem().string(), vocabulary->model_name(), n_tokens, rates[kRepeats / 2],
             rates.back(), rates.front(), kRepeats);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fmt::print(stderr, "usage: bench_tokenizer TEXT VOCABULARY.gguf...\n");
    return 1;
  }
  try {
    const std::string text = caravan::read_text_file(argv[1]);
    fmt::print("{}: {} bytes\n", argv[1], text.size());
    for (int i = 2; i < argc; i++) measure(argv[i], text);
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
  return 0;
}
