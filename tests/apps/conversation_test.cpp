#include "conversation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace caravan::app {
namespace {

using ::testing::HasSubstr;

TEST(Conversation, KeepsTheSystemPromptWhenItIsCleared) {
  Conversation conversation("Be brief.");
  conversation.add({"user", "Hello", ""});
  conversation.clear();
  EXPECT_EQ(conversation.messages(), (std::vector<Message>{{"system", "Be brief.", ""}}));
  EXPECT_TRUE(Conversation("").messages().empty());
}

TEST(Conversation, TakesBackTheLastAnswerOrQuestionOnly) {
  Conversation conversation("");
  EXPECT_FALSE(conversation.take_back_answer());
  conversation.add({"user", "Hello", ""});
  EXPECT_FALSE(conversation.take_back_answer());
  conversation.add({"assistant", "Hi", ""});
  conversation.take_back_question();
  EXPECT_EQ(conversation.messages().size(), 2u);
  EXPECT_TRUE(conversation.take_back_answer());
  conversation.take_back_question();
  EXPECT_TRUE(conversation.messages().empty());
}

TEST(Conversation, ComesBackFromItsFile) {
  Conversation conversation("S");
  conversation.add({"user", "a \"quoted\"\nline", ""});
  conversation.add({"assistant", "é", "hm"});
  EXPECT_EQ(Conversation::parse(conversation.serialise()), conversation.messages());
  EXPECT_EQ(conversation.to_json()[2]["reasoning_content"], "hm");
  EXPECT_FALSE(conversation.to_json()[1].contains("reasoning_content"));
}

TEST(Conversation, SaysWhatIsWrongWithAFile) {
  const auto error = [](const std::string& text) -> std::string {
    try {
      Conversation::parse(text);
    } catch (const RequestError& e) {
      return e.what();
    }
    return "accepted";
  };
  for (const char* text : {"", "[]", "{}", R"({"messages": 1})", "{"})
    EXPECT_THAT(error(text), HasSubstr("\"messages\""));
  EXPECT_THAT(error(R"({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]})"),
              HasSubstr("messages[1]: expected an object with a string \"content\""));
  EXPECT_THAT(error(R"({"messages": [{"role": "poet", "content": "x"}]})"), HasSubstr("'poet'"));
  EXPECT_THAT(error(R"({"messages": ["x"]})"), HasSubstr("messages[0]"));
}

}  // namespace
}  // namespace caravan::app
