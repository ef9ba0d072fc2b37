#include "vocab/vocabulary.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "vocab/charsmap.h"
#include "vocab/pre_tokenizer.h"
#include "vocab/special_tokens.h"
#include "vocab/token_table.h"
#include "vocab/tokenizer.h"
#include "vocab/utf8.h"

namespace caravan::vocab {

namespace {

constexpr uint32_t kMaxTokens = 1u << 24;            // far over any real vocabulary; bounds what a bad file can cost
constexpr size_t kMaxTextBytes = size_t{512} << 20;  // positions in a text are 32 bits wide after escaping spaces

bool contains_any(std::string_view text, std::initializer_list<std::string_view> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](std::string_view part) { return text.find(part) != std::string_view::npos; });
}

std::string lowercase_ascii(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

}  // namespace

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  size_t position = 0;
  for (size_t found; (found = text.find(from, position)) != std::string_view::npos; position = found + from.size()) {
    out += text.substr(position, found - position);
    out += to;
  }
  out += text.substr(position);
  return out;
}

// Builds a Vocabulary step by step; each step needs the ones before it. The rules follow llama.cpp's, so that a file
// means the same to both.
class Vocabulary::Loader {
 public:
  explicit Loader(const gguf::Metadata& metadata) : metadata_(metadata), vocabulary_(new Vocabulary) {}

  std::unique_ptr<const Vocabulary> load() {
    read_model();
    read_tokens();
    read_special_tokens();
    detect_special_tokens();
    correct_types();
    collect_end_of_generation();
    read_suppressed_tokens();
    read_chat_templates();
    build_tokenizer();
    build_matchers();
    return std::move(vocabulary_);
  }

 private:
  using Slot = std::optional<TokenId>;

  bool is_model(std::string_view name) const { return vocabulary_->model_name_ == name; }
  bool is_bpe() const { return pre_tokenizer_ != nullptr; }

  void read_model() {
    std::string& name = vocabulary_->model_name_;
    name = metadata_.get_string("tokenizer.ggml.model");
    if (name == "none") name = "no_vocab";
    if (name == "gpt2" || name == "gemma4") {
      pre_tokenizer_name_ =
          metadata_.find_string("tokenizer.ggml.pre").value_or(name == "gemma4" ? "gemma4" : "default");
      pre_tokenizer_ = &find_pre_tokenizer(pre_tokenizer_name_);
    } else if (name == "llama" || name == "bert" || name == "t5" || name == "rwkv" || name == "no_vocab") {
      pre_tokenizer_name_ = metadata_.find_string("tokenizer.ggml.pre").value_or("");
    } else {
      throw NotSupportedError(fmt::format(
          "{}: tokenizer.ggml.model: '{}' is not supported; known are: llama, gpt2, gemma4, bert, t5, rwkv, "
          "no_vocab",
          metadata_.source(), name));
    }
  }

  void read_tokens() {
    if (is_model("no_vocab")) {
      make_nameless_tokens();
      return;
    }
    std::vector<std::string> texts = metadata_.get_strings("tokenizer.ggml.tokens");
    if (texts.empty() || texts.size() > kMaxTokens) {
      throw FormatError(fmt::format("{}: tokenizer.ggml.tokens: expected 1 to {} tokens, found {}", metadata_.source(),
                                    kMaxTokens, texts.size()));
    }
    for (size_t i = 0; i < texts.size(); i++) {
      if (texts[i].empty()) texts[i] = fmt::format("[EMPTY_{}]", i);
    }

    std::vector<float> scores = metadata_.get_floats("tokenizer.ggml.scores");
    check_length("tokenizer.ggml.scores", scores.size(), texts.size());
    if (std::any_of(scores.begin(), scores.end(), [](float score) { return std::isnan(score); })) {
      throw FormatError(fmt::format("{}: tokenizer.ggml.scores: holds a NaN", metadata_.source()));
    }
    scores.resize(texts.size(), 0.0f);

    const std::vector<int64_t> type_numbers = metadata_.get_integers("tokenizer.ggml.token_type");
    check_length("tokenizer.ggml.token_type", type_numbers.size(), texts.size());
    std::vector<TokenType> types(texts.size(), TokenType::normal);
    for (size_t i = 0; i < type_numbers.size(); i++) {
      if (type_numbers[i] < 0 || type_numbers[i] > static_cast<int64_t>(TokenType::byte)) {
        throw FormatError(fmt::format("{}: tokenizer.ggml.token_type[{}]: expected 0 to 6, found {}",
                                      metadata_.source(), i, type_numbers[i]));
      }
      types[i] = static_cast<TokenType>(type_numbers[i]);
    }
    vocabulary_->tokens_ = std::make_unique<TokenTable>(texts, std::move(scores), std::move(types));
  }

  void make_nameless_tokens() {
    size_t n = 0;
    if (metadata_.contains("tokenizer.ggml.tokens")) {
      n = metadata_.get_strings("tokenizer.ggml.tokens").size();
    } else {
      n = metadata_.get_u32(metadata_.get_string("general.architecture") + ".vocab_size");
    }
    if (n > kMaxTokens) {
      throw FormatError(
          fmt::format("{}: vocabulary: expected at most {} tokens, found {}", metadata_.source(), kMaxTokens, n));
    }
    std::vector<std::string> texts;
    texts.reserve(n);
    for (size_t i = 0; i < n; i++) texts.push_back(fmt::format("[{}]", i));
    vocabulary_->tokens_ =
        std::make_unique<TokenTable>(texts, std::vector<float>(n), std::vector<TokenType>(n, TokenType::normal));
  }

  // Arrays that go with the tokens are absent (empty) or as long as these.
  void check_length(std::string_view key, size_t found, size_t expected) const {
    if (found != 0 && found != expected) {
      throw FormatError(
          fmt::format("{}: {}: expected {} values, one per token, found {}", metadata_.source(), key, expected, found));
    }
  }

  bool is_valid(int64_t id) const { return id >= 0 && static_cast<uint64_t>(id) < vocabulary_->tokens_->size(); }

  // Ids outside the vocabulary are ignored: many files hold -1 for "none".
  void read_id(std::string_view name, Slot& slot) const {
    const auto id = metadata_.find_u32(fmt::format("tokenizer.ggml.{}_token_id", name));
    if (id && is_valid(*id)) slot = static_cast<TokenId>(*id);
  }

  void set_default(Slot& slot, TokenId id) const {
    if (is_valid(id)) slot = id;
  }

  void read_special_tokens() {
    SpecialTokens& s = vocabulary_->special_;
    bool adds_bos = false, adds_eos = false, adds_sep = false;
    if (is_model("llama")) {
      set_default(s.bos, 1);
      set_default(s.eos, 2);
      set_default(s.unknown, 0);
      adds_bos = true;
    } else if (is_model("bert")) {
      set_default(s.bos, 101);
      set_default(s.unknown, 100);
      set_default(s.sep, 102);
      set_default(s.pad, 0);
      set_default(s.mask, 103);
      adds_bos = adds_sep = true;
    } else if (is_model("t5")) {
      set_default(s.eos, 1);
      set_default(s.unknown, 2);
      set_default(s.pad, 0);
      adds_eos = true;
    } else if (is_model("gpt2")) {
      if (pre_tokenizer_->has_default_bos) set_default(s.bos, 11);
      set_default(s.eos, 11);
    }
    if (is_bpe()) {
      adds_bos = pre_tokenizer_->adds_bos;
      adds_sep = pre_tokenizer_->adds_sep;
    }
    read_id("bos", s.bos);
    read_id("eos", s.eos);
    read_id("eot", s.eot);
    read_id("eom", s.eom);
    read_id("unknown", s.unknown);
    read_id("seperator", s.sep);  // GGUF's spelling
    read_id("padding", s.pad);
    read_id("mask", s.mask);
    read_id("cls", s.cls);
    read_id("prefix", s.fim_pre);  // the three old names
    read_id("suffix", s.fim_suf);
    read_id("middle", s.fim_mid);
    read_id("fim_pre", s.fim_pre);
    read_id("fim_suf", s.fim_suf);
    read_id("fim_mid", s.fim_mid);
    read_id("fim_pad", s.fim_pad);
    read_id("fim_rep", s.fim_rep);
    read_id("fim_sep", s.fim_sep);
    if (is_model("bert")) {
      // The token in front is called BOS in some files and CLS in others.
      if (s.cls && !metadata_.contains("tokenizer.ggml.bos_token_id")) s.bos = s.cls;
      if (!s.cls) s.cls = s.bos;
    }
    vocabulary_->adds_bos_ = metadata_.get_bool("tokenizer.ggml.add_bos_token", adds_bos);
    vocabulary_->adds_eos_ = metadata_.get_bool("tokenizer.ggml.add_eos_token", adds_eos);
    vocabulary_->adds_sep_ = metadata_.get_bool("tokenizer.ggml.add_sep_token", adds_sep);
    if (is_model("gemma4")) vocabulary_->adds_bos_ = true;
    if (is_model("bert")) vocabulary_->adds_bos_ = vocabulary_->adds_sep_ = true;
  }

  // Sets slot, unless it is known, to the first of these texts that is a token.
  void detect(Slot& slot, std::initializer_list<std::string_view> texts) const {
    for (const std::string_view text : texts) {
      if (!slot) slot = vocabulary_->find(text);
    }
  }

  void detect_special_tokens() {
    if (is_model("no_vocab") || is_model("bert")) return;  // "[PAD]" of bert has nothing to do with filling in
    SpecialTokens& s = vocabulary_->special_;
    detect(s.eot, {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
                   "_<EOT>", "<｜end▁of▁sentence｜>", "<end_of_utterance>"});
    detect(s.eom, {"<|eom_id|>"});
    detect(s.fim_pre, {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                       "<|code_prefix|>", "<|prefix|>"});
    detect(s.fim_suf, {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                       "<|code_suffix|>", "<|suffix|>"});
    detect(s.fim_mid, {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                       "<|code_middle|>", "<|middle|>"});
    detect(s.fim_pad, {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"});
    detect(s.fim_rep, {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"});
    detect(s.fim_sep, {"<|file_sep|>"});
  }

  static constexpr std::string_view kEndTexts[] = {"<|eot_id|>",
                                                   "<|im_end|>",
                                                   "<|end|>",
                                                   "<|return|>",
                                                   "<|call|>",
                                                   "<|flush|>",
                                                   "<|calls|>",
                                                   "<end_of_turn>",
                                                   "<|endoftext|>",
                                                   "</s>",
                                                   "<|eom_id|>",
                                                   "<EOT>",
                                                   "_<EOT>",
                                                   "[EOT]",
                                                   "[EOS]",
                                                   "<|end_of_text|>",
                                                   "<end_of_utterance>",
                                                   "<eos>",
                                                   "<turn|>",
                                                   "<|tool_response>",
                                                   "<｜end▁of▁sentence｜>",
                                                   "[e~["};

  // Files often call control tokens normal or user-defined; what acts as one is made one.
  void correct_types() {
    if (is_model("no_vocab")) return;
    TokenTable& tokens = *vocabulary_->tokens_;
    const auto set_type = [&](Slot token, TokenType type) {
      if (token) tokens.set_type(*token, type);
    };
    const SpecialTokens& s = vocabulary_->special_;
    for (const Slot& token : {s.eot, s.eom, s.fim_pre, s.fim_suf, s.fim_mid, s.fim_pad, s.fim_rep, s.fim_sep}) {
      set_type(token, TokenType::control);
    }
    for (const std::string_view text : kEndTexts) set_type(tokens.find(text), TokenType::control);
    // The channel markers of gpt-oss are part of its answer and have to be rendered.
    for (const std::string_view text : {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}) {
      set_type(tokens.find(text), TokenType::user_defined);
    }
  }

  void collect_end_of_generation() {
    const SpecialTokens& s = vocabulary_->special_;
    std::vector<TokenId>& ends = vocabulary_->end_of_generation_;
    for (const Slot& token : {s.eos, s.eot, s.eom, s.fim_pad, s.fim_rep, s.fim_sep}) {
      if (token) ends.push_back(*token);
    }
    if (is_model("no_vocab")) {
      sort_unique(ends);
      return;
    }
    TokenTable& tokens = *vocabulary_->tokens_;
    for (const std::string_view text : kEndTexts) {
      if (const auto token = tokens.find(text)) ends.push_back(*token);
    }
    const auto has = [&](std::string_view text) { return tokens.find(text).has_value(); };
    const bool ends_by_return = has("<|return|>") && has("<|call|>");
    const bool ends_by_flush = (has("<|calls|>") || has("<|call|>")) && has("<|flush|>");
    if (const auto end = tokens.find("<|end|>"); end && (ends_by_return || ends_by_flush)) {
      // There "<|end|>" ends one message of an answer, not the answer.
      std::erase(ends, *end);
      tokens.set_type(*end, TokenType::user_defined);
    }
    if (has("<|tool_response>")) {
      if (const auto end = tokens.find("</s>")) std::erase(ends, *end);
    }
    sort_unique(ends);
  }

  void read_suppressed_tokens() {
    for (const int64_t id : metadata_.get_integers("tokenizer.ggml.suppress_tokens")) {
      if (is_valid(id)) vocabulary_->suppressed_.push_back(static_cast<TokenId>(id));
    }
    sort_unique(vocabulary_->suppressed_);
  }

  static void sort_unique(std::vector<TokenId>& tokens) {
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  }

  void read_chat_templates() {
    static constexpr std::string_view kKey = "tokenizer.chat_template";
    for (const auto& [key, value] : metadata_.entries()) {
      const std::string_view rest = std::string_view(key).substr(std::min(key.size(), kKey.size()));
      if (!key.starts_with(kKey) || (!rest.empty() && rest[0] != '.')) continue;
      const std::string name(rest.substr(rest.empty() ? 0 : 1));
      vocabulary_->chat_templates_.emplace_back(name, metadata_.get_string(key));
    }
  }

  void build_tokenizer() {
    const TokenTable& tokens = *vocabulary_->tokens_;
    const auto unknown = vocabulary_->special_.unknown;
    auto& tokenizer = vocabulary_->tokenizer_;
    if (is_model("llama")) {
      tokenizer = make_spm_tokenizer(tokens, metadata_.get_bool("tokenizer.ggml.add_space_prefix", true), unknown);
    } else if (is_model("bert")) {
      WordPieceOptions options;
      options.lowercase = metadata_.get_bool("tokenizer.ggml.normalizer.lowercase", true);
      options.strip_accents = metadata_.get_bool("tokenizer.ggml.normalizer.strip_accents", options.lowercase);
      tokenizer = make_wordpiece_tokenizer(tokens, options, unknown);
    } else if (is_model("t5")) {
      const UnigramOptions options{metadata_.get_bool("tokenizer.ggml.add_space_prefix", false),
                                   metadata_.get_bool("tokenizer.ggml.remove_extra_whitespaces", false)};
      tokenizer = make_unigram_tokenizer(tokens, read_charsmap(), options, unknown);
    } else if (is_model("rwkv")) {
      tokenizer = make_rwkv_tokenizer(tokens, unknown);
    } else if (is_bpe()) {
      const BpeOptions options{pre_tokenizer_->byte_level, pre_tokenizer_->ignore_merges};
      tokenizer =
          make_bpe_tokenizer(tokens, metadata_.get_strings("tokenizer.ggml.merges"),
                             std::make_unique<PreTokenizer>(*pre_tokenizer_->splitter), options, metadata_.source());
    }
  }

  Charsmap read_charsmap() const {
    static constexpr std::string_view kKey = "tokenizer.ggml.precompiled_charsmap";
    const std::vector<int64_t> numbers = metadata_.get_integers(kKey);
    if (numbers.empty()) return {};
    const std::string source = fmt::format("{}: {}", metadata_.source(), kKey);
    std::vector<uint8_t> bytes;
    for (const int64_t number : numbers) {  // of i8 or u8
      if (number < INT8_MIN || number > UINT8_MAX) {
        throw FormatError(fmt::format("{}: expected bytes, found {}", source, number));
      }
      bytes.push_back(static_cast<uint8_t>(number));
    }
    return Charsmap(bytes, source);
  }

  // White space that special tokens swallow; GGUF has no key for it, so it depends on the model's name.
  void set_strip_rules(std::vector<SpecialToken>& specials) const {
    const std::string name = lowercase_ascii(metadata_.find_string("general.name").value_or(""));
    const std::string architecture = metadata_.find_string("general.architecture").value_or("");
    const bool is_phi3 = contains_any(name, {"phi-3", "phi3"});
    const bool strips_mask = pre_tokenizer_name_.starts_with("jina-v2-") || architecture == "nomic-bert-moe";
    for (SpecialToken& special : specials) {
      const std::string& text = special.text;
      if (is_phi3) special.strip_right = text != "<unk>" && text != "<s>" && text != "<|endoftext|>";
      if (strips_mask && text == "<mask>") special.strip_left = true;
      if (pre_tokenizer_name_ == "modern-bert" && text == "[MASK]") special.strip_left = true;
    }
  }

  void build_matchers() {
    if (is_model("no_vocab")) return;
    std::vector<SpecialToken> all, user_defined;
    for (size_t i = 0; i < vocabulary_->size(); i++) {
      const auto id = static_cast<TokenId>(i);
      const TokenType type = vocabulary_->tokens_->type(id);
      if (type == TokenType::control || type == TokenType::unknown || type == TokenType::user_defined) {
        all.push_back({id, std::string(vocabulary_->tokens_->text(id))});
      }
    }
    set_strip_rules(all);
    std::copy_if(all.begin(), all.end(), std::back_inserter(user_defined), [&](const SpecialToken& special) {
      return vocabulary_->tokens_->type(special.id) == TokenType::user_defined;
    });
    vocabulary_->matchers_[static_cast<size_t>(ParseSpecial::no)] =
        std::make_unique<SpecialTokenMatcher>(std::move(user_defined));
    vocabulary_->matchers_[static_cast<size_t>(ParseSpecial::yes)] =
        std::make_unique<SpecialTokenMatcher>(std::move(all));
  }

  const gguf::Metadata& metadata_;
  std::unique_ptr<Vocabulary> vocabulary_;
  std::string pre_tokenizer_name_;
  const PreTokenizerInfo* pre_tokenizer_ = nullptr;
};

Vocabulary::Vocabulary() = default;
Vocabulary::~Vocabulary() = default;

std::unique_ptr<const Vocabulary> Vocabulary::load(const gguf::Metadata& metadata) { return Loader(metadata).load(); }

bool Vocabulary::has_text() const { return tokenizer_ != nullptr; }

size_t Vocabulary::size() const { return tokens_->size(); }

void Vocabulary::check(TokenId token) const {
  if (token < 0 || static_cast<size_t>(token) >= size()) {
    throw RequestError(fmt::format("token {} is not in the vocabulary (0 to {})", token, size() - 1));
  }
}

std::vector<TokenId> Vocabulary::tokenize(std::string_view text, AddSpecial add_special,
                                          ParseSpecial parse_special) const {
  if (!tokenizer_) throw RequestError("this model has no vocabulary: give token ids instead of text");
  if (text.size() > kMaxTextBytes) {
    throw RequestError(fmt::format("the text has {} bytes; at most {} can be tokenized", text.size(), kMaxTextBytes));
  }
  std::vector<TokenId> out;
  out.reserve(text.size() / 4 + 2);
  if (add_special == AddSpecial::yes && adds_bos_ && special_.bos) out.push_back(*special_.bos);
  PrefixSpace prefix = PrefixSpace::yes;
  for (const Fragment& fragment : matchers_[static_cast<size_t>(parse_special)]->split(text)) {
    if (fragment.token >= 0) {
      out.push_back(fragment.token);
      prefix = PrefixSpace::yes;
    } else {
      tokenizer_->tokenize(fragment.text, prefix, out);
      prefix = PrefixSpace::no;
    }
  }
  if (add_special == AddSpecial::yes && model_name_ == "bert") {
    if (special_.sep) out.push_back(*special_.sep);
  } else if (add_special == AddSpecial::yes && adds_eos_ && special_.eos) {
    out.push_back(*special_.eos);
  }
  return out;
}

std::string_view Vocabulary::text(TokenId token) const {
  check(token);
  return tokens_->text(token);
}

TokenType Vocabulary::type(TokenId token) const {
  check(token);
  return tokens_->type(token);
}

std::optional<TokenId> Vocabulary::find(std::string_view text) const { return tokens_->find(text); }

std::string Vocabulary::piece(TokenId token, RenderSpecial render) const {
  check(token);
  const std::string_view text = tokens_->text(token);
  if (!tokenizer_) return std::string(text);
  switch (tokens_->type(token)) {
    case TokenType::control:
    case TokenType::unknown:
      return render == RenderSpecial::yes ? std::string(text) : std::string();
    case TokenType::user_defined:
      return std::string(text);
    case TokenType::normal:
      return tokenizer_->decode(text);
    case TokenType::byte: {
      const auto byte = parse_byte_token(text);
      return byte ? std::string(1, static_cast<char>(*byte)) : tokenizer_->decode(text);
    }
    case TokenType::undefined:
    case TokenType::unused:
      break;
  }
  return {};
}

std::string Vocabulary::detokenize(std::span<const TokenId> tokens, RenderSpecial render) const {
  std::string out;
  for (const TokenId token : tokens) out += piece(token, render);
  return out;
}

bool Vocabulary::is_end_of_generation(TokenId token) const {
  return std::binary_search(end_of_generation_.begin(), end_of_generation_.end(), token);
}

std::optional<std::string> Vocabulary::chat_template(std::string_view name) const {
  for (const auto& [template_name, text] : chat_templates_) {
    if (template_name == name) return text;
  }
  return std::nullopt;
}

std::string IncrementalDetokenizer::push(TokenId token) {
  const std::string bytes = held_back_ + vocabulary_->piece(token, render_);
  held_back_.clear();
  std::string out;
  for (size_t i = 0; i < bytes.size();) {
    const Utf8Char c = decode_utf8(bytes, i);
    if (c.state == Utf8Char::State::incomplete) {
      held_back_ = bytes.substr(i);
      break;
    }
    if (c.state == Utf8Char::State::valid) {
      out.append(bytes, i, c.length);
    } else {
      append_utf8(out, kReplacementCharacter);
    }
    i += c.length;
  }
  return out;
}

std::string IncrementalDetokenizer::finish() {
  std::string out = replace_invalid_utf8(held_back_);
  held_back_.clear();
  return out;
}

}  // namespace caravan::vocab
