// caravan server (llama-server): a model over HTTP.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <ctime>
#include <exception>
#include <limits>
#include <sstream>
#include <thread>

#include "base/file.h"
#include "base/log.h"
#include "commands.h"
#include "engine/engine.h"
#include "engine/grammar.h"
#include "gguf/file_type.h"
#include "grammar_options.h"
#include "http/server.h"
#include "model_options.h"
#include "server/api.h"
#include "signals.h"

namespace caravan::app {
namespace {

struct ServerCommandOptions {
  ModelOptions model;
  bool reranking = false, context_shift = false;
  std::string tls_key_file, tls_certificate_file;
  server::ApiSettings api;
  std::string host = "127.0.0.1";
  int port = 8080;
  std::vector<std::string> aliases;
  std::string api_prefix, pooling, cors_origins = "*";
  int n_http_threads = 2;
  int timeout_s = 3600;
  int stop_grace_s = 10;
  uint32_t max_queue = 256;
};

// Adds the keys of a file to keys.
void read_api_keys(const std::string& path, std::vector<std::string>& keys) {
  std::istringstream lines(read_text_file(path));
  size_t n_read = 0;
  for (std::string line; std::getline(lines, line);) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty() || line.front() == '#') continue;
    keys.push_back(line);
    ++n_read;
  }
  if (n_read == 0) throw RequestError("'" + path + "' holds no key");
}

OptionParser make_parser(ServerCommandOptions& o) {
  OptionParser parser("caravan server -m FILE [--rpc HOST:PORT,...] [options]",
                      "Serves a GGUF model over HTTP with llama-server's API. Also runs under the name llama-server.");
  add_model_options(parser, o.model);
  o.model.waits_on = true;
  parser.add({{"--rpc-exit"},
              "",
              "end when the model has no place after --rpc-wait because backends are missing (the server waits on)",
              {},
              into(o.model.waits_on, false)});
  parser.section("HTTP");
  parser.add({{"--host"},
              "HOST",
              "address to listen on, or the path of a Unix socket, ending in .sock (127.0.0.1)",
              {"LLAMA_ARG_HOST", "APP_BIND"},
              into(o.host)});
  parser.add({{"--port"},
              "N",
              "port to listen on, 0: any free one (8080)",
              {"LLAMA_ARG_PORT", "APP_PORT"},
              into(o.port, 0, 65535)});
  parser.add({{"-a", "--alias"},
              "NAME,...",
              "names of the model in answers (the path)",
              {"LLAMA_ARG_ALIAS"},
              into_list(o.aliases)});
  Option keys{{"--api-key"},
              "KEY,...",
              "keys of which a client must send one",
              {"LLAMA_API_KEY", "APP_API_KEY"},
              into_list(o.api.api_keys)};
  keys.is_secret = true;
  parser.add(std::move(keys));
  parser.add({{"--api-key-file"},
              "FILE",
              "more such keys, one on each line; lines that begin with # are comments",
              {"LLAMA_ARG_API_KEY_FILE", "APP_API_KEY_FILE"},
              [&o](const std::string& path) { read_api_keys(path, o.api.api_keys); }});
  parser.add(
      {{"--ssl-key-file"}, "FILE", "private key (PEM) for HTTPS", {"LLAMA_ARG_SSL_KEY_FILE"}, into(o.tls_key_file)});
  parser.add({{"--ssl-cert-file"},
              "FILE",
              "certificate chain (PEM) for HTTPS",
              {"LLAMA_ARG_SSL_CERT_FILE"},
              into(o.tls_certificate_file)});
  parser.add({{"--api-prefix"}, "PATH", "put before every path", {"LLAMA_ARG_API_PREFIX"}, into(o.api_prefix)});
  parser.add({{"--ui", "--webui"}, "", "a chat page at / (there is one)", {"LLAMA_ARG_UI"}, into(o.api.web_page), [&o] {
                o.api.web_page = false;
              }});
  parser.add({{"--no-ui", "--no-webui"}, "", "no chat page at /", {}, into(o.api.web_page, false)});
  parser.add({{"--cors-origins"},
              "ORIGINS",
              "origins that browsers may call from, * for all, localhost for those of this machine (*)",
              {"LLAMA_ARG_CORS_ORIGINS"},
              into(o.cors_origins)});
  parser.add({{"--threads-http"},
              "N",
              "threads for connections (2)",
              {"LLAMA_ARG_THREADS_HTTP"},
              [&o](const std::string& value) {
                o.n_http_threads = static_cast<int>(std::max<int64_t>(2, parse_integer(value, -1, 64)));
              }});
  parser.add({{"-to", "--timeout"},
              "S",
              "seconds that a connection may be idle or a client may not read (3600)",
              {"LLAMA_ARG_TIMEOUT"},
              into(o.timeout_s, 1, 86400)});
  parser.add({{"--max-queue"},
              "N",
              "requests that may wait before more are refused (256)",
              {},
              into(o.max_queue, 1, 1000000)});
  parser.add({{"--slots"},
              "",
              "GET /slots shows what runs (it does)",
              {"LLAMA_ARG_ENDPOINT_SLOTS"},
              into(o.api.slots_endpoint),
              [&o] { o.api.slots_endpoint = false; }});
  parser.add({{"--no-slots"}, "", "it does not", {"LLAMA_ARG_NO_ENDPOINT_SLOTS"}, into(o.api.slots_endpoint, false)});
  parser.add({{"--props"}, "", "take POST /props", {"LLAMA_ARG_ENDPOINT_PROPS"}, into(o.api.props_endpoint)});
  parser.add({{"--slot-save-path"},
              "FOLDER",
              "where POST /slots/ID saves and restores the tokens of slots",
              {},
              [&o](const std::string& folder) { o.api.slot_save_path = folder; }});
  parser.add({{"--rerank", "--reranking"},
              "",
              "answer /rerank; the model must have a ranking head",
              {"LLAMA_ARG_RERANKING"},
              into(o.reranking)});
  parser.add({{"--spm-infill"}, "", "/infill puts the suffix first", {}, into(o.api.spm_infill)});
  parser.add({{"--context-shift"},
              "",
              "a full context loses older tokens and goes on, instead of ending the answer",
              {"LLAMA_ARG_CONTEXT_SHIFT"},
              into(o.context_shift),
              [&o] { o.context_shift = false; }});
  parser.add({{"--no-context-shift"}, "", "it does not", {}, into(o.context_shift, false)});
  parser.add({{"--keep"},
              "N",
              "tokens of the prompt that stay when the context shifts, -1: all (0)",
              {},
              [&o](const std::string& value) {
                o.api.n_keep = static_cast<int32_t>(parse_integer(value, -1, std::numeric_limits<int32_t>::max()));
              }});
  parser.add({{"--cache-prompt"},
              "",
              "prompts reuse what earlier ones with the same beginning computed (always, unless a request says no)",
              {"LLAMA_ARG_CACHE_PROMPT"},
              into(o.api.cache_prompt),
              [&o] { o.api.cache_prompt = false; }});
  parser.add({{"--no-cache-prompt"},
              "",
              "only requests with \"cache_prompt\": true do",
              {"LLAMA_ARG_NO_CACHE_PROMPT"},
              into(o.api.cache_prompt, false)});
  const auto only_zero = [](const std::string& value) {
    if (parse_integer(value, -1, std::numeric_limits<int32_t>::max()) != 0)
      throw RequestError("only 0 is supported: cached prompts live in the free part of the KV cache");
  };
  parser.add({{"--cache-reuse"},
              "N",
              "0: only prefixes are reused, not pieces from the middle",
              {"LLAMA_ARG_CACHE_REUSE"},
              only_zero});
  parser.add({{"-cram", "--cache-ram"},
              "MIB",
              "0: cached prompts take no memory beside the KV cache",
              {"LLAMA_ARG_CACHE_RAM"},
              only_zero});
  parser.add({{"--stop-timeout"},
              "S",
              "seconds that running requests have to finish after SIGTERM (10)",
              {},
              into(o.stop_grace_s, 0, 3600)});
  parser.section("Requests");
  parser.add({{"-n", "--predict", "--n-predict"},
              "N",
              "most tokens of an answer, -1: no limit (-1)",
              {"LLAMA_ARG_N_PREDICT"},
              into(o.api.n_predict, -2, INT32_MAX)});
  parser.add({{"--embedding", "--embeddings"},
              "",
              "only embed: generation answers 501",
              {"LLAMA_ARG_EMBEDDINGS"},
              into(o.api.embeddings_only)});
  parser.add({{"--pooling"},
              "TYPE",
              "how embeddings are made: none, mean, cls, last (the model's own)",
              {"LLAMA_ARG_POOLING"},
              into(o.pooling)});
  parser.section("Chats");
  parser.add({{"--chat-template"},
              "TEMPLATE",
              "chat template: Jinja source, or a name such as chatml (the model's own)",
              {"LLAMA_ARG_CHAT_TEMPLATE"},
              into(o.api.chat.chat_template)});
  parser.add({{"--chat-template-file"},
              "FILE",
              "the same from a file",
              {"LLAMA_ARG_CHAT_TEMPLATE_FILE"},
              [&o](const std::string& value) { o.api.chat.chat_template = read_text_file(value); }});
  parser.add(
      {{"--jinja"}, "", "render chat templates with Jinja (always)", {"LLAMA_ARG_JINJA"}, into(o.api.chat.jinja), [&o] {
         o.api.chat.jinja = false;
       }});
  parser.add({{"--no-jinja"}, "", "requests with tools answer 501", {}, into(o.api.chat.jinja, false)});
  parser.add({{"--reasoning-format"},
              "FORMAT",
              "auto, deepseek: reasoning apart from the content; none: in it (auto)",
              {"LLAMA_ARG_THINK"},
              [&o](const std::string& value) {
                if (value != "auto" && value != "deepseek" && value != "none")
                  throw RequestError("--reasoning-format: expected auto, deepseek or none, found '" + value + "'");
                o.api.chat.reasoning_format = value;
              }});
  parser.add({{"--reasoning-budget"},
              "N",
              "-1: the model may think, 0: its template is told not to let it (-1)",
              {"LLAMA_ARG_THINK_BUDGET"},
              into(o.api.chat.reasoning_budget, -1, 0)});
  add_sampling_options(parser, o.api.sampling);
  add_grammar_options(parser, o.api.grammar);
  add_log_options(parser, o.model.log_level);
  add_known_model_flags(parser);
  parser.accepted({"--metrics"}, "", "/metrics is always there", {"LLAMA_ARG_ENDPOINT_METRICS"});
  parser.accepted({"-cb", "--cont-batching"}, "", "requests are always batched together", {"LLAMA_ARG_CONT_BATCHING"},
                  true);
  parser.refuse_unread_variables("LLAMA_ARG_");
  parser.unsupported({"-nocb", "--no-cont-batching", "--path", "--models-dir", "--sleep-idle-seconds", "--tools"});
  return parser;
}

server::ModelFacts model_facts(const OpenedModel& opened, const models::Hyperparameters& hp,
                               const ServerCommandOptions& o) {
  server::ModelFacts facts;
  facts.path = o.model.model;
  facts.aliases = o.aliases;
  std::sort(facts.aliases.begin(), facts.aliases.end());
  facts.architecture = hp.architecture;
  facts.file_type = gguf::file_type_description(opened.file().metadata());
  for (const auto& tensor : opened.file().tensors())
    facts.n_params += static_cast<uint64_t>(tensor::n_elements(tensor.ne));
  facts.size_bytes = opened.file().weight_bytes();
  facts.n_ctx_train = hp.n_ctx_train;
  facts.n_embd = hp.n_embd;
  facts.n_vocab = hp.n_vocab;
  facts.causal = hp.causal;
  facts.pooling = embedding_pooling(o.pooling, hp);
  facts.created = std::time(nullptr);
  if (o.reranking || hp.pooling == models::Pooling::rank)
    facts.ranking_head = server::RankingHead::load(opened.file(), hp.n_embd);
  if (o.reranking && !facts.ranking_head)
    throw RequestError("--reranking: the model '" + o.model.model + "' has no ranking head (tensors cls.*)");
  return facts;
}

bool is_unix_socket(const std::string& host) { return host.ends_with(".sock"); }

std::shared_ptr<const net::TlsCertificate> open_certificate(const ServerCommandOptions& o) {
  if (o.tls_certificate_file.empty() || o.tls_key_file.empty())
    throw RequestError("HTTPS needs both --ssl-cert-file and --ssl-key-file");
  if (is_unix_socket(o.host)) throw RequestError("a Unix socket takes no --ssl-cert-file: it speaks no TLS");
  return std::make_shared<const net::TlsCertificate>(o.tls_certificate_file, o.tls_key_file);
}

// Starts to listen; returns where, for the log.
std::string listen(http::Server& http, const ServerCommandOptions& o) {
  if (is_unix_socket(o.host)) {
    http.listen_unix(o.host);
    return o.host;
  }
  blaming<Error>(
      "--host, LLAMA_ARG_HOST or APP_BIND: an address of this machine, 0.0.0.0 for all; --port, LLAMA_ARG_PORT or "
      "APP_PORT: a port that nobody has",
      [&] { http.listen({o.host, static_cast<uint16_t>(o.port)}); });
  return (o.tls_certificate_file.empty() ? "http://" : "https://") + o.host + ":" + std::to_string(http.port());
}

}  // namespace

int run_server(int argc, char** argv) {
  ServerCommandOptions options;
  OptionParser parser = make_parser(options);
  if (parser.parse(argc, argv) == OptionParser::Result::exit) return 0;
  configure_logging(parse_log_level(options.model.log_level));
  const sigset_t signals = block_stop_signals();

  options.api.n_batch = options.model.n_batch;
  OpenedModel opened(options.model);
  engine::validate(options.api.sampling, opened.hyperparameters().n_vocab);
  if (options.api.grammar) engine::GrammarCompiler(opened.vocabulary()).compile(*options.api.grammar);
  engine::EngineOptions engine_options;
  engine_options.max_queue = options.max_queue;
  engine_options.context_shift = options.context_shift;
  engine_options.recovery_timeout = std::chrono::seconds(options.model.recovery_timeout_s);
  engine::Engine engine(opened.pipeline(), opened.vocabulary(), engine_options);
  const server::Api api{engine, opened.vocabulary(), model_facts(opened, opened.hyperparameters(), options),
                        options.api};

  http::Router router;
  server::add_routes(router, api, options.api_prefix);
  http::ServerOptions http_options;
  http_options.guard = server::make_guard(api, options.api_prefix);
  http_options.error_response = server::error_response;
  http_options.cors_origins = options.cors_origins;
  if (!options.tls_certificate_file.empty() || !options.tls_key_file.empty())
    http_options.certificate = open_certificate(options);
  http_options.idle_timeout = http_options.write_timeout = std::chrono::seconds(options.timeout_s);
  net::IoThreads io(options.n_http_threads);
  http::Server http(io, router, http_options);
  spdlog::info("listening on {}, loading {}", listen(http, options), options.model.model);

  // Loading runs beside, so that /health answers and SIGTERM is heard meanwhile.
  std::exception_ptr failure;
  std::thread loader([&] {
    try {
      opened.pipeline().start();
    } catch (...) {
      failure = std::current_exception();
      kill(getpid(), SIGUSR1);
    }
  });
  const int signal = wait_for_stop_signal(signals);
  if (signal == SIGUSR1) {
    loader.join();
    http.stop(std::chrono::milliseconds(0));
    std::rethrow_exception(failure);
  }
  exit_on_next_signal(signals);
  if (engine.status().state == engine::EngineStatus::State::loading) {
    spdlog::info("stopped while loading");
    std::_Exit(0);  // nothing is served yet, and loading cannot be interrupted in between
  }
  spdlog::info("stopping: running requests have {} s to finish", options.stop_grace_s);
  loader.join();
  engine.shutdown(std::chrono::seconds(options.stop_grace_s));
  http.stop(std::chrono::seconds(2));
  spdlog::info("stopped");
  return 0;
}

}  // namespace caravan::app
