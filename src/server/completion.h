// The native answer to prompts, for the endpoints that differ only in how a prompt is made.
#pragma once

#include <vector>

#include "http/exchange.h"
#include "server/api.h"
#include "server/params.h"

namespace caravan::server {

// Generates and answers in llama-server's native form, as JSON or as server-sent events. params and api outlive the
// coroutine. Throws RequestError.
net::awaitable<void> complete(http::Exchange& exchange, const Api& api, const CompletionParams& params,
                              std::vector<Prompt> prompts);

}  // namespace caravan::server
