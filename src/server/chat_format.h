// The chat template of the loaded model, how it wants to be given a conversation, and how the model answers.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "chat/output_parser.h"
#include "chat/syntax.h"
#include "chat/template.h"
#include "server/api.h"
#include "server/json.h"

namespace caravan::server {

// The Jinja source that chats are rendered with: what settings name or hold, else the model's, else chatml. Throws
// RequestError for an unknown name.
std::string chat_template_source(const ChatSettings& settings, const vocab::Vocabulary& vocabulary);

// Const after construction; used by several requests at once.
class ChatFormat {
 public:
  // The template that settings name or hold, else the model's, else chatml. Throws RequestError when settings' template
  // is malformed or its name unknown; a malformed template of the model's own is kept for prepare() to tell.
  ChatFormat(const ChatSettings& settings, const vocab::Vocabulary& vocabulary);
  ~ChatFormat();

  // What a request asks to be rendered.
  struct Conversation {
    Json messages;  // OpenAI's, checked: text contents only
    Json tools;     // null: none
    bool add_generation_prompt = true;
    std::string prefill;  // put behind the prompt: the answer goes on from there
    bool prefill_is_reasoning = false;
    Json extra = Json::object();  // more variables of the template
  };
  struct Prompt {
    std::string text;             // without the BOS that tokenizing with AddSpecial::yes adds
    bool reasoning_open = false;  // the answer begins inside the reasoning
    const chat::OutputSyntax* syntax = nullptr;
  };
  // Throws RequestError with what the template raised.
  Prompt render(const Conversation& conversation) const;

  // Control tokens of the vocabulary that this syntax needs to see in the text.
  std::vector<int32_t> marks_in_vocabulary(const chat::OutputSyntax& syntax) const;

 private:
  struct Prepared;
  Json fitted(const Prepared& prepared, const Conversation& conversation) const;

  const vocab::Vocabulary& vocabulary_;
  std::string bos_, eos_;
  std::string failure_;  // why the model's template cannot be used
  std::unique_ptr<const Prepared> main_,
      with_tools_;  // with_tools_: the model's template named tool_use, if it has one
};

}  // namespace caravan::server
