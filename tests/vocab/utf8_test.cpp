#include "vocab/utf8.h"

#include <gtest/gtest.h>

namespace caravan::vocab {
namespace {

using State = Utf8Char::State;

TEST(Utf8, DecodesWhatItEncodes) {
  for (char32_t c = 0; c < 0x110000; c++) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    append_utf8(text, c);
    const Utf8Char decoded = decode_utf8(text, 0);
    ASSERT_TRUE(decoded.state == State::valid && decoded.code_point == c && decoded.length == text.size())
        << static_cast<uint32_t>(c);
    for (size_t n = 1; n < text.size(); n++) {
      ASSERT_EQ(decode_utf8(text.substr(0, n), 0).state, State::incomplete) << static_cast<uint32_t>(c);
    }
  }
}

TEST(Utf8, RejectsOverlongFormsSurrogatesAndLargeValues) {
  for (const char* text : {"\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
                           "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\x80", "\xFF", "\xE4x", "\xF0\x9F\x98x"}) {
    EXPECT_EQ(decode_utf8(text, 0).state, State::invalid) << std::hex << static_cast<int>(text[0]);
    EXPECT_FALSE(is_valid_utf8(text));
  }
}

TEST(Utf8, ReplacesEachSequenceThatCannotBeACharacter) {
  EXPECT_EQ(replace_invalid_utf8("plain é 中 😀"), "plain é 中 😀");
  EXPECT_EQ(replace_invalid_utf8("a\xFF\xFE"
                                 "b"),
            "a\uFFFD\uFFFDb");
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98\xE4\xB8\xAD"), "\uFFFD中");
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("123456789\xC3"), "123456789\uFFFD");
}

}  // namespace
}  // namespace caravan::vocab
