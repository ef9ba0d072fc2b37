// Pre-tokenizers: how a BPE vocabulary wants a text cut into words before it merges inside each of them. A table of
// the names in tokenizer.ggml.pre with their regular expressions (compiled by PCRE2, JIT where the system allows it).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::vocab {

struct Splitter;

// A row of the table: what tokenizer.ggml.pre implies.
struct PreTokenizerInfo {
  std::string_view name;
  const Splitter* splitter;
  bool ignore_merges = false;  // a word that is a token is not merged from parts
  bool adds_bos = false;       // unless the metadata says otherwise
  bool adds_sep = false;
  bool has_default_bos = true;  // false: no BOS unless the metadata names one
  bool byte_level = true;       // false: plain UTF-8 with U+2581 for spaces
};

// The row of this name ("default" is the one for files that name none). Throws NotSupportedError, listing all names.
const PreTokenizerInfo& find_pre_tokenizer(std::string_view name);

// Every name in the table.
std::vector<std::string_view> pre_tokenizer_names();

// Compiled regular expressions. Immutable, used by several threads at once.
class PreTokenizer {
 public:
  explicit PreTokenizer(const Splitter& splitter);
  ~PreTokenizer();
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;

  // The words of text, none empty, whose concatenation is text. text must be valid UTF-8.
  // Each pass splits every piece of the one before into matches and the gaps between them; a piece is matched as if
  // nothing stood around it.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  class Pass;
  std::vector<std::unique_ptr<const Pass>> passes_;
};

}  // namespace caravan::vocab
