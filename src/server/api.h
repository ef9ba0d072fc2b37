// What the HTTP API serves: the engine, the vocabulary, facts about the model, and the settings from the command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/request.h"
#include "http/router.h"
#include "http/server.h"
#include "server/ranking_head.h"
#include "vocab/vocabulary.h"

namespace caravan::server {

// Facts about the loaded model, for /props and /v1/models.
struct ModelFacts {
  std::string path;
  std::vector<std::string> aliases;  // --alias; the first in sorted order is the model's id
  std::string architecture;
  std::string file_type;  // "Q4_K - Medium"
  uint64_t n_params = 0, size_bytes = 0;
  uint32_t n_ctx_train = 0, n_embd = 0, n_vocab = 0;
  bool causal = true;                               // false: an encoder, which embeds but does not generate
  engine::Pooling pooling = engine::Pooling::mean;  // for embeddings
  int64_t created = 0;                              // seconds since 1970, when the server started
  std::optional<RankingHead> ranking_head;          // unset: /rerank answers 501

  // The name under which clients see the model: the alias, else the path.
  const std::string& id() const { return aliases.empty() ? path : aliases.front(); }
};

// How chats are rendered and read.
struct ChatSettings {
  std::string chat_template;              // --chat-template: Jinja source or a name; empty: the model's
  bool jinja = true;                      // --no-jinja: requests with tools answer 501
  std::string reasoning_format = "auto";  // none, auto or deepseek; requests may choose another
  int32_t reasoning_budget = -1;          // 0: templates are told not to let the model think
};

// What the command line sets.
struct ApiSettings {
  std::vector<std::string> api_keys;           // empty: nothing is checked
  engine::SamplingParams sampling;             // defaults of requests
  std::optional<engine::GrammarSpec> grammar;  // the same
  int32_t n_predict = -1;                      // default and upper limit of requests; negative: none
  bool cache_prompt = true;                    // default of requests
  int32_t n_keep = 0;           // default of requests: tokens that stay when the context shifts, -1: the prompt
  bool slots_endpoint = true;   // GET /slots
  bool props_endpoint = false;  // POST /props
  std::optional<std::string> slot_save_path;  // the folder of saved slots; unset: POST /slots answers 501
  uint32_t n_batch = 2048;                    // -b: what /infill makes its prompts fit
  bool spm_infill = false;                    // /infill puts the suffix first
  bool embeddings_only = false;               // --embeddings: generation answers 501
  ChatSettings chat;
  bool web_page = true;  // --no-ui: no chat page at /
};

// References that the handlers use; all outlive the HTTP server.
struct Api {
  engine::Engine& engine;
  const vocab::Vocabulary& vocabulary;
  ModelFacts model;
  ApiSettings settings;
};

// Adds every endpoint of docs/http-api.md under prefix ("" or "/something"). api must outlive router.
void add_routes(http::Router& router, const Api& api, const std::string& prefix = "");

// The check before every handler: 503 while the model loads, then 401 for a missing or wrong key. prefix as in
// add_routes().
std::function<std::optional<http::Response>(const http::Request&)> make_guard(const Api& api,
                                                                              const std::string& prefix = "");

// The JSON error body and status for what a handler threw.
http::Response error_response(std::exception_ptr error);

// The groups of endpoints, one file each.
void add_completion_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_openai_completion_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_chat_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_embedding_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_tokenizer_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_slot_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_infill_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_rerank_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_administration_routes(http::Router& router, const Api& api, const std::string& prefix);
void add_introspection_routes(http::Router& router, const Api& api, const std::string& prefix);

// The chat page: the files of web/ under prefix, index.html also at prefix + "/".
void add_web_routes(http::Router& router, const std::string& prefix);
// "/" and the paths of these files, without a prefix: they are served while the model loads and to clients without a
// key.
std::vector<std::string> web_paths();

}  // namespace caravan::server
