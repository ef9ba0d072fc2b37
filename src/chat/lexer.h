// Template source -> tokens. Rules: Jinja2 3.1 with trim_blocks and lstrip_blocks, as chat templates expect: the line
// end after a block tag goes, and so does the white space before a block tag that begins its line; "-" and "+" beside a
// delimiter strip more or less.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace caravan::chat {

enum class TokenKind {
  data,
  block_begin,
  block_end,
  variable_begin,
  variable_end,
  name,
  string,
  integer,
  real,
  op,
  end
};

struct Token {
  TokenKind kind = TokenKind::end;
  std::string text;  // data and strings: the decoded text; otherwise as written
  uint32_t line = 0;
};

// The tokens of a template, the last of kind `end`. Comments are gone, raw blocks are data.
// Throws TemplateError ("TemplateSyntaxError") with the line.
std::vector<Token> tokenize_template(std::string_view source);

}  // namespace caravan::chat
