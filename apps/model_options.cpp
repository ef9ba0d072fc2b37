#include "model_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "cache_options.h"
#include "cluster/remote_backend.h"
#include "models/registry.h"
#include "models/work.h"
#include "net/endpoint.h"
#include "net/tls.h"
#include "tensor/dtype.h"

namespace caravan::app {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr int kMaxThreads = 512;
constexpr uint32_t kMaxParallel = 256;
constexpr uint32_t kBlockTokens = 32;
constexpr uint16_t kDefaultPort = 50052;

constexpr const char* kNoDownloads =
    "nothing is ever downloaded. Fetch the GGUF file yourself, for example with `curl -LO "
    "https://huggingface.co/USER/REPO/resolve/main/FILE.gguf`, and give it with -m FILE";

std::vector<double> parse_shares(const std::string& text) {
  std::vector<double> shares;
  for (const std::string& part : split(text, text.find('/') != std::string::npos ? '/' : ','))
    shares.push_back(parse_number(part));
  return shares;
}

// Encoders give a vector for every row. Others have a buffer of all logits for each output row, which a large
// vocabulary makes expensive: one for each sequence, and some so that prompts whose every row is wanted go in fair
// pieces.
uint32_t max_outputs(const stage::CacheConfig& cache, const models::Hyperparameters& hp) {
  constexpr uint32_t kFairPiece = 32;
  return hp.causal ? std::min(cache.max_rows, std::max(cache.max_slots, kFairPiece)) : cache.max_rows;
}

cluster::ClusterOptions cluster_options(const ModelOptions& options, const models::Hyperparameters& hp) {
  cluster::ClusterOptions cluster;
  cluster.backends = options.rpc;
  cluster.relay = options.rpc_relay;
  cluster.rpc_wait = std::chrono::seconds(options.rpc_wait_s);
  cluster.waits_on = options.waits_on;
  cluster.cache.k_type = cache_type(options.k_type);
  cluster.cache.v_type = cache_type(options.v_type);
  cluster.cache.block_tokens = kBlockTokens;
  cluster.cache.max_slots = options.n_parallel;
  cluster.cache.max_rows = std::max(options.n_parallel, std::min(options.n_batch, options.n_ubatch));
  cluster.cache.max_outputs = max_outputs(cluster.cache, hp);
  cluster.n_ctx = options.n_ctx;
  cluster.n_gpu_layers = options.n_gpu_layers;
  cluster.tensor_split = options.tensor_split;
  cluster.goal = options.goal;
  cluster.poll = std::chrono::milliseconds(options.poll_ms);
  cluster.n_hash_threads = thread_count(options.n_threads);
  const std::filesystem::path cache =
      options.cache_dir.empty() ? default_cache_folder() : std::filesystem::path(options.cache_dir);
  if (!cache.empty()) cluster.hash_folder = cache / "hashes";
  return cluster;
}

std::optional<plan::Goal> plan_goal(const std::string& name) {
  if (name == "auto") return plan::Goal::automatic;
  if (name == "latency") return plan::Goal::latency;
  if (name == "throughput") return plan::Goal::throughput;
  if (name == "memory") return std::nullopt;
  throw RequestError("accepted: auto, latency, throughput, memory; found '" + name + "'");
}

std::string required_model(const ModelOptions& options) {
  if (options.model.empty()) {
    const bool wants_download =
        std::getenv("LLAMA_ARG_HF_REPO") != nullptr || std::getenv("LLAMA_ARG_MODEL_URL") != nullptr;
    throw RequestError(fmt::format("no model: give one with -m FILE (or LLAMA_ARG_MODEL, APP_MODEL){}{}",
                                   wants_download ? "; " : "", wants_download ? kNoDownloads : ""));
  }
  return options.model;
}

}  // namespace

tensor::DType cache_type(const std::string& name) {
  for (const tensor::DType type : {tensor::DType::f32, tensor::DType::f16, tensor::DType::q8_0}) {
    std::string lower(tensor::dtype_name(type));
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    if (lower == name) return type;
  }
  throw RequestError("KV cache type '" + name + "' is not supported; accepted: f32, f16, q8_0");
}

int thread_count(int n_threads) { return n_threads > 0 ? n_threads : usable_cpu_count(); }

void add_token_options(OptionParser& parser, std::string& token, std::string help) {
  const auto set = [&token](const std::string& value) {
    if (value.size() < net::kMinTokenBytes && !value.empty())
      throw RequestError(
          fmt::format("the token has {} bytes, at least {} are needed; `caravan token` prints a good one", value.size(),
                      net::kMinTokenBytes));
    token = value;
  };
  Option option{{"--rpc-token"}, "TOKEN", std::move(help), {"APP_RPC_TOKEN"}, set};
  option.is_secret = true;
  parser.add(std::move(option));
  parser.add(
      {{"--rpc-token-file"}, "FILE", "file that holds it", {"APP_RPC_TOKEN_FILE"}, [set](const std::string& path) {
         std::string text =
             blaming<SystemError>("a file that this user can read", [&] { return read_text_file(path); });
         text.erase(text.find_last_not_of(" \t\r\n") + 1);
         if (text.empty()) throw RequestError("the file '" + path + "' holds no token");
         set(text);
       }});
}

void add_poll_option(OptionParser& parser, uint32_t& poll_ms) {
  parser.add({{"--poll"},
              "MS",
              "keep one core awake between tokens that follow each other within MS milliseconds; 0: let it sleep (50)",
              {},
              into(poll_ms, 0, 100)});
}

void add_model_options(OptionParser& parser, ModelOptions& o) {
  parser.section("Model and machines");
  parser.add({{"-m", "--model"},
              "FILE",
              "GGUF model; of a split one the first part",
              {"LLAMA_ARG_MODEL", "APP_MODEL"},
              into(o.model)});
  parser.add(
      {{"--rpc"},
       "HOST:PORT,...",
       "backends that hold the model, in the order of layers; a name means all its addresses; none: all runs here",
       {"LLAMA_ARG_RPC", "APP_RPC_BACKENDS"},
       [&o](const std::string& value) {
         into_list(o.rpc)(value);
         for (const std::string& name : o.rpc) net::parse_endpoint(name, kDefaultPort);  // throws for what is none
       }});
  add_token_options(parser, o.rpc_token, "secret shared with the backends: encrypts and authenticates (TLS 1.3)");
  parser.add({{"--rpc-relay"}, "", "pass activations between backends through this process", {}, into(o.rpc_relay)});
  parser.add({{"--rpc-wait"}, "S", "seconds to wait for backends at the start (60)", {}, into(o.rpc_wait_s, 0, 86400)});
  parser.add({{"--cache-dir"},
              "DIR",
              "where the hashes of models are remembered ($XDG_CACHE_HOME/caravan or ~/.cache/caravan)",
              {"APP_CACHE_DIR"},
              into(o.cache_dir)});
  parser.add({{"--rpc-timeout"},
              "S",
              "seconds of silence after which a backend counts as lost (5)",
              {},
              [&o](const std::string& value) {
                o.rpc_timeout_s = parse_number(value);
                if (!(o.rpc_timeout_s >= 0.1 && o.rpc_timeout_s <= 3600))
                  throw RequestError("expected 0.1 to 3600 seconds, found '" + value + "'");
              }});
  parser.add({{"--recovery-timeout"},
              "S",
              "seconds that requests wait for a plan after a backend was lost (60)",
              {},
              into(o.recovery_timeout_s, 0, 86400)});
  parser.add({{"-ngl", "--gpu-layers", "--n-gpu-layers"},
              "N",
              "most layers on backends, a number, auto or all (auto)",
              {"LLAMA_ARG_N_GPU_LAYERS", "APP_GPU_LAYERS"},
              [&o](const std::string& value) {
                if (value == "auto" || value == "-1") {
                  o.n_gpu_layers.reset();
                } else {
                  o.n_gpu_layers =
                      value == "all" ? UINT32_MAX : static_cast<uint32_t>(parse_integer(value, 0, INT32_MAX));
                }
              }});
  parser.add({{"-ts", "--tensor-split"},
              "A,B,...",
              "shares of the layers per backend (by free memory)",
              {"LLAMA_ARG_TENSOR_SPLIT"},
              [&o](const std::string& value) { o.tensor_split = parse_shares(value); }});
  parser.add(
      {{"--plan"},
       "GOAL",
       "what layers are placed for: the speed of one request (latency), of many (throughput), of both (auto), or "
       "the same share of each backend's memory (memory); for many, and where better also for both, a model that fits "
       "several times is held several times (auto)",
       {"APP_PLAN"},
       [&o](const std::string& value) { o.goal = plan_goal(value); }});
  parser.add({{"--mem"},
              "MIB",
              "most memory for layers held by this process (what is free)",
              {},
              into(o.mem_mib, 1, INT32_MAX)});
  parser.add({{"-t", "--threads"},
              "N",
              "threads for layers held by this process (all)",
              {"LLAMA_ARG_THREADS", "APP_THREADS"},
              [&o](const std::string& value) {
                o.n_threads = static_cast<int>(std::max<int64_t>(0, parse_integer(value, -1, kMaxThreads)));
              }});
  add_poll_option(parser, o.poll_ms);
  parser.add({{"-c", "--ctx-size"},
              "N",
              "context in tokens (0: the largest that fits, at most what the model was trained for)",
              {"LLAMA_ARG_CTX_SIZE", "APP_CTX_SIZE"},
              into(o.n_ctx, 0, INT32_MAX)});
  parser.add(
      {{"-b", "--batch-size"}, "N", "most tokens per step (2048)", {"LLAMA_ARG_BATCH"}, into(o.n_batch, 1, 65536)});
  parser.add({{"-ub", "--ubatch-size"},
              "N",
              "most tokens per step on a device (512)",
              {"LLAMA_ARG_UBATCH"},
              into(o.n_ubatch, 1, 65536)});
  parser.add({{"-ctk", "--cache-type-k"},
              "TYPE",
              "type of the K cache: f32, f16, q8_0 (f16)",
              {"LLAMA_ARG_CACHE_TYPE_K"},
              into(o.k_type)});
  parser.add({{"-ctv", "--cache-type-v"},
              "TYPE",
              "type of the V cache: f32, f16, q8_0 (f16)",
              {"LLAMA_ARG_CACHE_TYPE_V"},
              into(o.v_type)});
  parser.add({{"-np", "--parallel"},
              "N",
              "sequences computed at the same time (4)",
              {"LLAMA_ARG_N_PARALLEL", "APP_PARALLEL"},
              [&o](const std::string& value) {
                const int64_t n = parse_integer(value, -1, kMaxParallel);
                if (n == 0) throw RequestError("0 sequences cannot be served; give at least 1, or -1 for the default");
                o.n_parallel = n < 0 ? 4 : static_cast<uint32_t>(n);
              }});
}

namespace {

void add_less_common_sampling_options(OptionParser& parser, engine::SamplingParams& s) {
  const auto number = [&parser](std::vector<std::string> names, const char* help, float& target) {
    parser.add({std::move(names), "N", help, {}, into(target)});
  };
  const auto integer = [&parser](const char* name, const char* help, int32_t& target, int64_t least, int64_t most) {
    parser.add({{name}, "N", help, {}, into(target, least, most)});
  };
  number({"--typical", "--typical-p"}, "keep the most typical tokens up to this probability, 1: off (1)", s.typical_p);
  number({"--top-nsigma", "--top-n-sigma"}, "drop logits so many standard deviations below the best, -1: off (-1)",
         s.top_n_sigma);
  number({"--xtc-probability"}, "how often xtc drops the most likely tokens, 0: off (0)", s.xtc_probability);
  number({"--xtc-threshold"}, "of all that are at least so likely xtc leaves the last; above 0.5: off (0.1)",
         s.xtc_threshold);
  number({"--dynatemp-range"}, "the temperature varies by this with the entropy, 0: off (0)", s.dynatemp_range);
  number({"--dynatemp-exp"}, "exponent of the entropy in that (1)", s.dynatemp_exponent);
  number({"--dry-multiplier"}, "penalise what continues a repetition, 0: off (0)", s.dry_multiplier);
  number({"--dry-base"}, "growth of that penalty with the length, >= 1 (1.75)", s.dry_base);
  integer("--dry-allowed-length", "shorter repetitions are free (2)", s.dry_allowed_length, 0, INT32_MAX);
  integer("--dry-penalty-last-n", "tokens that dry looks back on, 0: off, -1: all (64)", s.dry_penalty_last_n, -1,
          INT32_MAX);
  parser.add({{"--dry-sequence-breaker"},
              "TEXT",
              "end repetitions at TEXT instead of a newline and : \" *; may be repeated; none: nowhere",
              {},
              [&s, is_first = true](const std::string& value) mutable {
                if (std::exchange(is_first, false) || value == "none") s.dry_sequence_breakers.clear();
                if (value != "none") s.dry_sequence_breakers.push_back(unescape(value));
              }});
  integer("--mirostat", "1, 2: mirostat instead of all samplers but the temperature, 0: off (0)", s.mirostat, 0, 2);
  number({"--mirostat-ent"}, "mirostat's target, the surprise of a token in bits (5)", s.mirostat_tau);
  number({"--mirostat-lr"}, "mirostat's learning rate (0.1)", s.mirostat_eta);
  number({"--adaptive-target"}, "adaptive_p (name it in --samplers): target probability, -1: off (-1)",
         s.adaptive_target);
  number({"--adaptive-decay"}, "adaptive_p: decay of its memory, 0 to 0.99 (0.9)", s.adaptive_decay);
}

}  // namespace

void add_sampling_options(OptionParser& parser, engine::SamplingParams& s) {
  parser.section("Sampling (requests may override)");
  parser.add({{"--temp", "--temperature"}, "N", "temperature, 0: greedy (0.8)", {}, into(s.temperature)});
  parser.add({{"--top-k"},
              "N",
              "keep the K most likely tokens, 0: off (40)",
              {"LLAMA_ARG_TOP_K"},
              into(s.top_k, 0, INT32_MAX)});
  parser.add(
      {{"--top-p"}, "N", "keep the most likely tokens up to this probability, 1: off (0.95)", {}, into(s.top_p)});
  parser.add({{"--min-p"},
              "N",
              "drop tokens below this part of the best one's probability, 0: off (0.05)",
              {},
              into(s.min_p)});
  parser.add({{"--repeat-penalty"},
              "N",
              "penalise repeated tokens, 1: off (1.0)",
              {"APP_REPEAT_PENALTY"},
              [&s](const std::string& value) {
                into(s.repeat_penalty)(value);
                if (!(s.repeat_penalty > 0))
                  throw RequestError("expected a number greater than 0, found '" + value + "'");
              }});
  parser.add({{"--repeat-last-n"},
              "N",
              "tokens that penalties look back on, 0: off, -1: all (64)",
              {},
              into(s.repeat_last_n, -1, INT32_MAX)});
  parser.add({{"--presence-penalty"}, "N", "penalise tokens that occurred, 0: off (0)", {}, into(s.presence_penalty)});
  parser.add({{"--frequency-penalty"},
              "N",
              "penalise tokens by how often they occurred, 0: off (0)",
              {},
              into(s.frequency_penalty)});
  parser.add({{"-s", "--seed"}, "N", "random seed, -1: a new one each time (-1)", {}, [&s](const std::string& value) {
                const int64_t seed = parse_integer(value, -1, UINT32_MAX);
                s.seed.reset();
                if (seed >= 0 && seed != UINT32_MAX) s.seed = static_cast<uint32_t>(seed);
              }});
  parser.add({{"--ignore-eos"}, "", "never end by an end-of-generation token", {}, into(s.ignore_eos)});
  parser.add({{"-l", "--logit-bias"},
              "ID(+|-)BIAS",
              "add BIAS to the logit of token ID; may be repeated",
              {},
              [&s](const std::string& value) {
                const size_t sign = value.find_first_of("+-");
                if (sign == std::string::npos)
                  throw RequestError("expected TOKEN+BIAS or TOKEN-BIAS, found '" + value + "'");
                s.logit_bias.push_back({static_cast<int32_t>(parse_integer(value.substr(0, sign), 0, INT32_MAX)),
                                        static_cast<float>(parse_number(value.substr(sign)))});
              }});
  parser.add({{"--samplers"}, "A;B;...", "samplers in the order of use", {}, [&s](const std::string& value) {
                s.samplers = split(value, ';');
                for (std::string& name : s.samplers) name = engine::sampler_name(name);
              }});
  parser.add({{"--sampler-seq", "--sampling-seq"},
              "CHARACTERS",
              "the same, by one character each (edskypmxt)",
              {},
              [&s](const std::string& value) { s.samplers = engine::sampler_names(value); }});
  add_less_common_sampling_options(parser, s);
}

void add_log_options(OptionParser& parser, std::string& level) {
  parser.section("Logging");
  parser.add(
      {{"--log-level"}, "LEVEL", "trace, debug, info, warn, error or off (info)", {"CARAVAN_LOG_LEVEL"}, into(level)});
  parser.add({{"-v", "--verbose"}, "", "the same as --log-level debug", {}, [&level](const std::string&) {
                level = "debug";
              }});
  parser.add(
      {{"--log-disable"}, "", "the same as --log-level off", {}, [&level](const std::string&) { level = "off"; }});
}

void add_known_model_flags(OptionParser& parser) {
  parser.section("Accepted for compatibility");
  parser.accepted({"-fa", "--flash-attn"}, "[on|off|auto]", "attention is always computed without an n x n buffer",
                  {"LLAMA_ARG_FLASH_ATTN"});
  parser.accepted({"-tb", "--threads-batch"}, "N", "prompts and generation use the threads of -t");
  parser.accepted({"--mmap"}, "", "weights are always repacked into memory of their own", {"LLAMA_ARG_MMAP"});
  parser.accepted({"--no-mmap"}, "", "weights are always repacked into memory of their own", {"LLAMA_ARG_NO_MMAP"});
  parser.accepted({"--no-warmup"}, "", "there is no warm-up");
  parser.accepted({"--offline"}, "", "nothing is ever downloaded", {"LLAMA_ARG_OFFLINE"});
  parser.accepted({"-kvu", "--kv-unified"}, "", "sequences always share one KV cache", {"LLAMA_ARG_KV_UNIFIED"}, true);
  parser.unsupported({"-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token", "-mu", "--model-url"},
                     kNoDownloads);
  parser.unsupported({"-sm",
                      "--split-mode",
                      "-mg",
                      "--main-gpu",
                      "-dev",
                      "--device",
                      "--mlock",
                      "--numa",
                      "-ot",
                      "--override-tensor",
                      "-cmoe",
                      "--cpu-moe",
                      "-ncmoe",
                      "--n-cpu-moe",
                      "-nkvo",
                      "--no-kv-offload",
                      "--lora",
                      "--lora-scaled",
                      "--override-kv",
                      "--rope-scaling",
                      "--rope-scale",
                      "--rope-freq-base",
                      "--rope-freq-scale",
                      "--yarn-orig-ctx",
                      "--yarn-ext-factor",
                      "--yarn-attn-factor",
                      "--yarn-beta-slow",
                      "--yarn-beta-fast",
                      "--context-shift",
                      "-md",
                      "--model-draft",
                      "--spec-type",
                      "--mmproj",
                      "--control-vector"});
}

namespace {

// What a file of an unknown architecture lacks is its architecture's support, whatever its vocabulary looks like.
gguf::Model open_supported_model(const ModelOptions& options) {
  const std::string path = required_model(options);
  gguf::Model file = blaming<SystemError>("-m, LLAMA_ARG_MODEL or APP_MODEL: a GGUF file that this user can read",
                                          [&] { return gguf::Model::open(path); });
  models::find_arch(file.metadata());
  return file;
}

}  // namespace

OpenedModel::OpenedModel(const ModelOptions& options)
    : file_(open_supported_model(options)),
      vocabulary_(vocab::Vocabulary::load(file_.metadata())),
      device_(thread_count(options.n_threads), select_isa(), options.mem_mib * kMiB) {
  const models::Hyperparameters hp =
      models::find_arch(file_.metadata()).read(models::hyperparameter_metadata(file_.metadata()));
  cluster::ClusterOptions cluster = cluster_options(options, hp);
  // Beside backends, this machine takes layers only as far as the user or a lack of memory there demands it.
  cluster.local_memory = device_.info().memory_free;
  if (!options.rpc.empty()) {
    io_ = std::make_unique<net::IoThreads>(2);
    const std::chrono::duration<double> timeout(options.rpc_timeout_s);
    cluster::RemoteOptions remote{options.rpc_token, std::chrono::duration_cast<std::chrono::milliseconds>(timeout)};
    if (options.wants_prediction || (options.goal && options.tensor_split.empty()))
      remote.questions = stage::speed_questions(file_, models::hyperparameter_metadata(file_.metadata(), cluster.n_ctx),
                                                cluster.cache);
    connector_ = cluster::make_remote_connector(*io_, std::move(remote));
  }
  pipeline_ = std::make_unique<cluster::ClusterPipeline>(file_, device_, connector_.get(), std::move(cluster));
}

OpenedModel::~OpenedModel() = default;

void start(OpenedModel& opened, engine::Engine& engine) {
  opened.pipeline().start();
  if (!engine.wait_until_ready(std::chrono::seconds(10))) throw Error("no plan: " + engine.status().reason);
}

engine::Pooling embedding_pooling(const std::string& name, const models::Hyperparameters& hp) {
  if (name == "none") return engine::Pooling::none;
  if (name == "mean") return engine::Pooling::mean;
  if (name == "cls") return engine::Pooling::cls;
  if (name == "last") return engine::Pooling::last;
  if (!name.empty()) throw RequestError("--pooling '" + name + "' is not supported; accepted: none, mean, cls, last");
  switch (hp.pooling) {
    case models::Pooling::mean:
      return engine::Pooling::mean;
    case models::Pooling::cls:
      return engine::Pooling::cls;
    case models::Pooling::last:
      return engine::Pooling::last;
    default:
      return hp.causal ? engine::Pooling::last : engine::Pooling::mean;
  }
}

}  // namespace caravan::app
