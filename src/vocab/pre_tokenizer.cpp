// The regular expressions are those of the models' own tokenizers; the groups of names follow llama.cpp's.
#include "vocab/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pcre2.h>

#include <array>

#include "base/error.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

// The passes of one family, at most six; unused ones are empty. "\s" and "\S" mean Unicode's White_Space property.
struct Splitter {
  std::array<std::string_view, 6> passes;
};

namespace {

// A pass that is code: groups of three digits counted from the right, e.g. "1234567" -> "1", "234", "567".
// As a regular expression this needs a look-ahead to the end of the digits at every place: quadratic.
constexpr std::string_view kDigitGroups = "<digit groups>";
constexpr std::string_view kDigitGroupsOfNumbers = "<digit groups of numbers>";
constexpr std::string_view kDigitGroupsOfAnyScript = "<digit groups of any script>";  // all of \p{N}

// Upper and lower case are spelled out: caseless matching would also take U+017F for s.
#define CARAVAN_CONTRACTION "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
#define CARAVAN_WORD "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
#define CARAVAN_SPACES "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define CARAVAN_TAIL " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" CARAVAN_SPACES
#define CARAVAN_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"
#define CARAVAN_CJK "[\\x{4E00}-\\x{9FA5}\\x{0800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]+"
#define CARAVAN_UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define CARAVAN_LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CARAVAN_PREFIX "[^\\r\\n\\p{L}\\p{N}]?"
#define CARAVAN_CASED_WORD(suffix)                                                                             \
  CARAVAN_PREFIX CARAVAN_UPPER "*" CARAVAN_LOWER "+" suffix "|" CARAVAN_PREFIX CARAVAN_UPPER "+" CARAVAN_LOWER \
                               "*" suffix "|"
#define CARAVAN_CASED_TAIL " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" CARAVAN_SPACES
#define CARAVAN_SUFFIX "(?:" CARAVAN_CONTRACTION ")?"
#define CARAVAN_GPT4O CARAVAN_CASED_WORD(CARAVAN_SUFFIX) "\\p{N}{1,3}|" CARAVAN_CASED_TAIL
#define CARAVAN_PUNCTUATED_WORDS                                          \
  "[!-/:-@\\[-`{-~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+" \
  "| ?[\\p{P}\\p{S}]+[\\r\\n]*|" CARAVAN_SPACES
#define CARAVAN_BLOOM " ?[^(\\s|.,!?\\x{2026}\\x{3002}\\x{FF0C}\\x{3001}\\x{0964}\\x{06D4}\\x{060C})]+"

// The letters that deepseek-llm takes for words: cased scripts, Latin to Adlam.
#define CARAVAN_DEEPSEEK_LETTERS                                                                                       \
  "A-Za-z\\x{B5}\\x{C0}-\\x{D6}\\x{D8}-\\x{F6}\\x{F8}-\\x{1BA}\\x{1BC}-\\x{1BF}\\x{1C4}-\\x{293}\\x{295}-\\x{2AF}"     \
  "\\x{370}-\\x{373}\\x{376}\\x{377}\\x{37B}-\\x{37D}\\x{37F}\\x{386}\\x{388}-\\x{38A}\\x{38C}\\x{38E}-\\x{3A1}"       \
  "\\x{3A3}-\\x{3F5}\\x{3F7}-\\x{481}\\x{48A}-\\x{52F}\\x{531}-\\x{556}\\x{10A0}-\\x{10C5}\\x{13A0}-\\x{13F5}"         \
  "\\x{13F8}-\\x{13FD}\\x{1C90}-\\x{1CBA}\\x{1CBD}-\\x{1CBF}\\x{1D00}-\\x{1D2B}\\x{1D6B}-\\x{1D77}"                    \
  "\\x{1D79}-\\x{1D9A}\\x{1E00}-\\x{1F15}\\x{1F18}-\\x{1F1D}\\x{1F20}-\\x{1F45}\\x{1F48}-\\x{1F4D}"                    \
  "\\x{1F50}-\\x{1F57}\\x{1F59}\\x{1F5B}\\x{1F5D}\\x{1F5F}-\\x{1F7D}\\x{1F80}-\\x{1FB4}\\x{1FB6}-\\x{1FBC}\\x{1FBE}"   \
  "\\x{1FC2}-\\x{1FC4}\\x{1FC6}-\\x{1FCC}\\x{1FD0}-\\x{1FD3}\\x{1FD6}-\\x{1FDB}\\x{1FE0}-\\x{1FEC}"                    \
  "\\x{1FF2}-\\x{1FF4}\\x{1FF6}-\\x{1FFC}\\x{2102}\\x{2107}\\x{210A}-\\x{2113}\\x{2115}\\x{2119}-\\x{211D}\\x{2124}"   \
  "\\x{2126}\\x{2128}\\x{212A}-\\x{212D}\\x{212F}-\\x{2134}\\x{2139}\\x{213C}-\\x{213F}\\x{2145}-\\x{2149}\\x{214E}"   \
  "\\x{2183}\\x{2184}\\x{2C00}-\\x{2C7B}\\x{2C7E}-\\x{2CE4}\\x{2CEB}-\\x{2CEE}\\x{2CF2}\\x{2CF3}\\x{A640}-\\x{A66D}"   \
  "\\x{A680}-\\x{A69B}\\x{A722}-\\x{A76F}\\x{A771}-\\x{A787}\\x{A78B}-\\x{A78E}\\x{AB70}-\\x{ABBF}\\x{FB00}-\\x{FB06}" \
  "\\x{FB13}-\\x{FB17}\\x{FF21}-\\x{FF3A}\\x{FF41}-\\x{FF5A}\\x{10400}-\\x{1044F}\\x{104B0}-\\x{104D3}"                \
  "\\x{104D8}-\\x{104FB}\\x{10C80}-\\x{10CB2}\\x{10CC0}-\\x{10CF2}\\x{118A0}-\\x{118DF}\\x{1E900}-\\x{1E943}"

constexpr Splitter kDefault = {{"[\\p{P}\\$\\+<=>\\^~\\|]+", CARAVAN_GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}};
constexpr Splitter kGpt2 = {{CARAVAN_GPT2}};
constexpr Splitter kLlama3 = {{CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}{1,3}|" CARAVAN_TAIL}};
constexpr Splitter kQwen2 = {{CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}|" CARAVAN_TAIL}};
constexpr Splitter kQwen35 = {{CARAVAN_CONTRACTION
                               "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"
                               "|" CARAVAN_SPACES}};
constexpr Splitter kStarcoder = {{"\\p{N}", CARAVAN_GPT2}};
constexpr Splitter kFalcon = {{"[\\p{P}\\$\\+<=>\\^~\\|`]+", CARAVAN_GPT2, "[0-9][0-9][0-9]"}};
// The fourth pass takes white space at the end; the look-behind and the possessive repeat keep it linear.
constexpr Splitter kDeepseekLlm = {
    {"[\\r\\n]", "\\s?[" CARAVAN_DEEPSEEK_LETTERS "]+",
     "\\s?[!-/:-~\\x{FF01}-\\x{FF0F}\\x{FF1A}-\\x{FF5E}\\x{2018}-\\x{201F}\\x{3000}-\\x{3002}]+", "(?<!\\s)\\s++\\z",
     CARAVAN_CJK, "\\p{N}+"}};
constexpr Splitter kDeepseekCoder = {{"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", CARAVAN_CJK, "\\p{N}"}};
constexpr Splitter kDeepseekV3 = {
    {"\\p{N}{1,3}", "[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{309F}\\x{30A0}-\\x{30FF}]+", CARAVAN_PUNCTUATED_WORDS}};
constexpr Splitter kTekken = {{CARAVAN_CASED_WORD("") "\\p{N}|" CARAVAN_CASED_TAIL}};
constexpr Splitter kGpt4o = {{CARAVAN_GPT4O}};
constexpr Splitter kTinyAya = {{kDigitGroups, CARAVAN_GPT4O}};
constexpr Splitter kBloom = {{CARAVAN_BLOOM}};
constexpr Splitter kViking = {{CARAVAN_BLOOM, "\\p{N}"}};
constexpr Splitter kSuperBpe = {{"\\p{N}+", kDigitGroupsOfNumbers}};
constexpr Splitter kBailing = {{CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
                                                    "|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"}};
constexpr Splitter kSeedCoder = {{CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}| ?[^\\s\\p{L}\\p{N}\\r\\n]+"
                                                      "|" CARAVAN_SPACES}};
constexpr Splitter kJais2 = {{CARAVAN_CONTRACTION
                              "|" CARAVAN_WORD "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
                              "|\\s{512}(?!\\S)|\\s{256}(?!\\S)|\\s{128}(?!\\S)|\\s{64}(?!\\S)|\\s{32}(?!\\S)"
                              "|\\s{16}(?!\\S)|\\s{8}(?!\\S)|\\s{4}(?!\\S)|\\s{1,2}(?!\\S)|\\s"}};
constexpr Splitter kMinicpm5 = {{"\\p{N}{1,3}", CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}+|" CARAVAN_TAIL}};
constexpr Splitter kLaguna = {{"[^\\n]+|\\n+", CARAVAN_CONTRACTION "|" CARAVAN_WORD "|\\p{N}|" CARAVAN_TAIL}};
// Words of this one go over single spaces. The repeats are possessive: a word can be read in one way only, and a long
// one would otherwise need a place on the stack for each letter.
constexpr Splitter kExaoneMoe = {{CARAVAN_CONTRACTION
                                  "|" CARAVAN_PREFIX "(?:\\p{L}\\p{M}*+(?: \\p{L}\\p{M}*+)*+)++"
                                  "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]?|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"}};
// The range that begins with U+8C48 is llama.cpp's; U+F900, which looks the same, may have been meant.
constexpr Splitter kAfmoe = {{kDigitGroupsOfAnyScript,
                              "[\\x{4E00}-\\x{9FFF}\\x{3400}-\\x{4DBF}\\x{8C48}-\\x{FAFF}\\x{3040}-\\x{30FF}\\x{FF65}-"
                              "\\x{FF9F}\\x{2F00}-\\x{2FDF}"
                              "\\x{0E40}-\\x{0EFF}\\x{1780}-\\x{17FF}\\x{1000}-\\x{109F}\\x{AA60}-\\x{AA7F}\\x{A9E0}-"
                              "\\x{A9FF}\\x{1100}-\\x{11FF}]+",
                              CARAVAN_PUNCTUATED_WORDS}};
constexpr Splitter kYoutu = {
    {"[\\x{AC00}-\\x{D7A3}\\x{3131}-\\x{318E}]+"
     "|[\\x{FF01}\\x{2026}\\x{201C}\\x{201D}\\x{2018}\\x{2019}\\x{2014}\\x{FF1A}\\x{FF1B}\\x{FF0C}\\x{3001}-\\x{303F}"
     "\\x{FE30}-\\x{FE4F}]+|[\\x{3105}-\\x{312F}]+|[\\x{4E00}-\\x{9FA5}\\x{3040}-\\x{30FF}]+",
     CARAVAN_CASED_WORD(CARAVAN_SUFFIX) "\\p{N}|" CARAVAN_CASED_TAIL}};
// The cased letters without Han, as what is left when everything else is taken away: PCRE2 cannot intersect classes.
// "Han" is the script property itself; PCRE2's \p{Han} also takes what several scripts share.
#define CARAVAN_NO_LETTER "\\p{N}\\p{P}\\p{S}\\p{Z}\\p{C}"
#define CARAVAN_UPPER_NOT_HAN "[^\\p{Ll}" CARAVAN_NO_LETTER "\\p{sc:Han}]"
#define CARAVAN_LOWER_NOT_HAN "[^\\p{Lu}\\p{Lt}" CARAVAN_NO_LETTER "\\p{sc:Han}]"
constexpr Splitter kKimiK2 = {{"\\p{sc:Han}+|" CARAVAN_PREFIX CARAVAN_UPPER_NOT_HAN "*" CARAVAN_LOWER_NOT_HAN
                               "+" CARAVAN_SUFFIX "|" CARAVAN_PREFIX CARAVAN_UPPER_NOT_HAN "+" CARAVAN_LOWER_NOT_HAN
                               "*" CARAVAN_SUFFIX "|\\p{N}{1,3}|" CARAVAN_TAIL}};
constexpr Splitter kChameleon = {
    {"<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\\t\\n]|    |  ", "\\p{N}", "[\\p{P}!-/:-@\\[-`{-~]", CARAVAN_GPT2}};
constexpr Splitter kNewlines = {{"[^\\n]+|\\n+"}};
constexpr Splitter kWhitespace = {{"\\S+"}};

constexpr PreTokenizerInfo kTable[] = {
    {.name = "default", .splitter = &kDefault},
    {.name = "gpt-2", .splitter = &kGpt2},
    {.name = "phi-2", .splitter = &kGpt2},
    {.name = "jina-es", .splitter = &kGpt2},
    {.name = "jina-de", .splitter = &kGpt2},
    {.name = "jina-v2-es", .splitter = &kGpt2},
    {.name = "jina-v2-de", .splitter = &kGpt2},
    {.name = "jina-v1-en", .splitter = &kGpt2, .adds_sep = true},
    {.name = "jina-v2-code", .splitter = &kGpt2, .adds_sep = true},
    {.name = "roberta-bpe", .splitter = &kGpt2, .adds_sep = true},
    {.name = "gigachat", .splitter = &kGpt2},
    {.name = "a.x-4.0", .splitter = &kGpt2},
    {.name = "mellum", .splitter = &kGpt2},
    {.name = "modern-bert", .splitter = &kGpt2},
    {.name = "exaone4", .splitter = &kGpt2},
    {.name = "mpt", .splitter = &kGpt2},
    {.name = "olmo", .splitter = &kGpt2},
    {.name = "jais", .splitter = &kGpt2},
    {.name = "trillion", .splitter = &kGpt2},
    {.name = "granite-docling", .splitter = &kGpt2},
    {.name = "llama3", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "llama-v3", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "llama-bpe", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "falcon3", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "falcon-h1", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "pixtral", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "midm-2.0", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "lfm2", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "jina-v5-nano", .splitter = &kLlama3, .ignore_merges = true, .adds_bos = true},
    {.name = "dbrx", .splitter = &kLlama3},
    {.name = "smaug-bpe", .splitter = &kLlama3},
    {.name = "glm4", .splitter = &kLlama3, .has_default_bos = false},
    {.name = "chatglm-bpe", .splitter = &kLlama3, .has_default_bos = false},
    {.name = "qwen2", .splitter = &kQwen2},
    {.name = "deepseek-r1-qwen", .splitter = &kQwen2},
    {.name = "kormo", .splitter = &kQwen2},
    {.name = "f2llmv2", .splitter = &kQwen2},
    {.name = "megrez", .splitter = &kQwen2},
    {.name = "stablelm2", .splitter = &kQwen2},
    {.name = "hunyuan", .splitter = &kQwen2},
    {.name = "solar-open", .splitter = &kQwen2},
    {.name = "grok-2", .splitter = &kQwen2},
    {.name = "qwen35", .splitter = &kQwen35},
    {.name = "starcoder", .splitter = &kStarcoder},
    {.name = "refact", .splitter = &kStarcoder},
    {.name = "command-r", .splitter = &kStarcoder},
    {.name = "smollm", .splitter = &kStarcoder},
    {.name = "codeshell", .splitter = &kStarcoder},
    {.name = "exaone", .splitter = &kStarcoder},
    {.name = "minerva-7b", .splitter = &kStarcoder},
    {.name = "mellum2", .splitter = &kStarcoder},
    {.name = "falcon", .splitter = &kFalcon},
    {.name = "deepseek-llm", .splitter = &kDeepseekLlm},
    {.name = "deepseek-coder", .splitter = &kDeepseekCoder},
    {.name = "deepseek-v3", .splitter = &kDeepseekV3},
    {.name = "hunyuan-dense", .splitter = &kDeepseekV3},
    {.name = "joyai-llm", .splitter = &kDeepseekV3},
    {.name = "tekken", .splitter = &kTekken, .ignore_merges = true, .adds_bos = true},
    {.name = "gpt-4o", .splitter = &kGpt4o},
    {.name = "llama4", .splitter = &kGpt4o},
    {.name = "kanana2", .splitter = &kGpt4o},
    {.name = "talkie", .splitter = &kGpt4o},
    {.name = "minimax-m2", .splitter = &kGpt4o},
    {.name = "granite-embed-multi-97m", .splitter = &kGpt4o, .ignore_merges = true},
    {.name = "tiny_aya", .splitter = &kTinyAya},
    {.name = "cohere2moe", .splitter = &kTinyAya},
    {.name = "bloom", .splitter = &kBloom},
    {.name = "gpt3-finnish", .splitter = &kBloom},
    {.name = "poro-chat", .splitter = &kBloom},
    {.name = "viking", .splitter = &kViking},
    {.name = "superbpe", .splitter = &kSuperBpe},
    {.name = "bailingmoe", .splitter = &kBailing},
    {.name = "bailingmoe2", .splitter = &kBailing},
    {.name = "llada-moe", .splitter = &kBailing},
    {.name = "seed-coder", .splitter = &kSeedCoder},
    {.name = "jais-2", .splitter = &kJais2},
    {.name = "minicpm5", .splitter = &kMinicpm5, .ignore_merges = true},
    {.name = "laguna", .splitter = &kLaguna},
    {.name = "exaone-moe", .splitter = &kExaoneMoe},
    {.name = "afmoe", .splitter = &kAfmoe},
    {.name = "youtu", .splitter = &kYoutu, .ignore_merges = true},
    {.name = "kimi-k2", .splitter = &kKimiK2},
    {.name = "chameleon", .splitter = &kChameleon, .adds_bos = true},
    {.name = "gemma4", .splitter = &kNewlines, .adds_bos = true, .byte_level = false},
    {.name = "granite-embed-multi-311m", .splitter = &kNewlines, .byte_level = false},
    {.name = "sarvam-moe", .splitter = &kNewlines, .byte_level = false},
    {.name = "whitespace", .splitter = &kWhitespace},
};

// Unicode's White_Space property, for the inside of a character class. PCRE2's own \s also matches U+180E.
constexpr std::string_view kWhiteSpace =
    "\\x{09}-\\x{0D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";

// Spells out \s and \S. A literal bracket must be escaped in the pattern.
std::string expand_white_space(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); i++) {
    if (pattern[i] == '\\') {
      const char escaped = pattern[++i];
      CARAVAN_ASSERT(escaped != 'S' || !in_class, "\\S has no spelling inside a character class");
      if (escaped == 's') {
        out += in_class ? std::string(kWhiteSpace) : fmt::format("[{}]", kWhiteSpace);
      } else if (escaped == 'S') {
        out += fmt::format("[^{}]", kWhiteSpace);
      } else {
        out += {'\\', escaped};
      }
      continue;
    }
    if (pattern[i] == '[') in_class = true;
    if (pattern[i] == ']') in_class = false;
    out += pattern[i];
  }
  return out;
}

struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct FreeCode {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
using Code = std::unique_ptr<pcre2_code, FreeCode>;

Code compile(std::string_view pattern) {
  const std::string expanded = expand_white_space(pattern);
  int error = 0;
  size_t offset = 0;
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expanded.data()), expanded.size(), PCRE2_UTF | PCRE2_UCP, &error,
                          &offset, nullptr));
  CARAVAN_ASSERT(code != nullptr, "the patterns of the table are valid");
  // Without executable memory this fails, and matching falls back to the interpreter.
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

}  // namespace

const PreTokenizerInfo& find_pre_tokenizer(std::string_view name) {
  for (const PreTokenizerInfo& info : kTable) {
    if (info.name == name) return info;
  }
  throw NotSupportedError(
      fmt::format("pre-tokenizer '{}' is not supported; known are: {}", name, fmt::join(pre_tokenizer_names(), ", ")));
}

std::vector<std::string_view> pre_tokenizer_names() {
  std::vector<std::string_view> names;
  for (const PreTokenizerInfo& info : kTable) names.push_back(info.name);
  return names;
}

// One regular expression, or one of the passes that are code.
class PreTokenizer::Pass {
 public:
  explicit Pass(std::string_view pattern) {
    if (pattern == kDigitGroups || pattern == kDigitGroupsOfNumbers) {
      needs_boundary_ = pattern == kDigitGroups;
      code_ = compile("\\d+");
    } else if (pattern == kDigitGroupsOfAnyScript) {
      code_ = compile("\\p{N}+");
    } else {
      code_ = compile(pattern);
      return;
    }
    groups_digits_ = true;
    word_character_ = compile("\\A\\w");
  }

  // Appends the matches and gaps of piece to out.
  void split(std::string_view piece, pcre2_match_data* data, std::vector<std::string_view>& out) const {
    size_t position = 0;
    while (position < piece.size()) {
      if (!match(code_.get(), piece, position, data)) break;
      const size_t* bounds = pcre2_get_ovector_pointer(data);
      const size_t begin = bounds[0], end = bounds[1];
      CARAVAN_ASSERT(end > begin, "no pattern of the table matches the empty string");
      if (begin > position) out.push_back(piece.substr(position, begin - position));
      if (groups_digits_) {
        split_digits(piece, begin, end, data, out);
      } else {
        out.push_back(piece.substr(begin, end - begin));
      }
      position = end;
    }
    if (position < piece.size()) out.push_back(piece.substr(position));
  }

 private:
  // A match at or after position. Piece is valid UTF-8, so PCRE2 need not check it again.
  static bool match(const pcre2_code* code, std::string_view piece, size_t position, pcre2_match_data* data) {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(piece.data());
    int result = pcre2_match(code, subject, piece.size(), position, PCRE2_NO_UTF_CHECK, data, nullptr);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its state on the heap
      result = pcre2_match(code, subject, piece.size(), position, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, nullptr);
    }
    if (result == PCRE2_ERROR_NOMATCH) return false;
    if (result < 0) throw RequestError(fmt::format("the text cannot be split into words (PCRE2 error {})", result));
    return true;
  }

  void split_digits(std::string_view piece, size_t begin, size_t end, pcre2_match_data* data,
                    std::vector<std::string_view>& out) const {
    // Digits that a word continues, as in "1234x", are no number.
    if (needs_boundary_ && end < piece.size() && match(word_character_.get(), piece.substr(end), 0, data)) {
      out.push_back(piece.substr(begin, end - begin));
      return;
    }
    std::vector<size_t> cuts;  // the beginning of each digit
    for (size_t i = begin; i < end; i += decode_utf8(piece, i).length) cuts.push_back(i);
    const size_t n = cuts.size();
    cuts.push_back(end);
    for (size_t from = 0; from < n;) {
      const size_t to = from + (from == 0 && n % 3 != 0 ? n % 3 : 3);
      out.push_back(piece.substr(cuts[from], cuts[to] - cuts[from]));
      from = to;
    }
  }

  Code code_, word_character_;
  bool groups_digits_ = false, needs_boundary_ = false;
};

PreTokenizer::PreTokenizer(const Splitter& splitter) {
  for (const std::string_view pattern : splitter.passes) {
    if (!pattern.empty()) passes_.push_back(std::make_unique<const Pass>(pattern));
  }
}

PreTokenizer::~PreTokenizer() = default;

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> pieces, next;
  if (text.empty()) return pieces;
  const std::unique_ptr<pcre2_match_data, FreeMatchData> data(pcre2_match_data_create(1, nullptr));
  if (!data) throw std::bad_alloc();
  pieces.push_back(text);
  for (const auto& pass : passes_) {
    next.clear();
    next.reserve(pieces.size() + text.size() / 4);
    for (const std::string_view piece : pieces) pass->split(piece, data.get(), next);
    pieces.swap(next);
  }
  return pieces;
}

}  // namespace caravan::vocab
