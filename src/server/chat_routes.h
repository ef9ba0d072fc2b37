// The protocols that are served over chats.
#pragma once

#include <memory>
#include <string>

#include "http/router.h"
#include "server/api.h"
#include "server/chat_format.h"

namespace caravan::server {

// POST /v1/messages and /v1/messages/count_tokens (Anthropic).
void add_messages_routes(http::Router& router, const Api& api, const std::shared_ptr<const ChatFormat>& format,
                         const std::string& prefix);
// POST /v1/responses, /responses and /v1/responses/input_tokens (OpenAI).
void add_responses_routes(http::Router& router, const Api& api, const std::shared_ptr<const ChatFormat>& format,
                          const std::string& prefix);

}  // namespace caravan::server
