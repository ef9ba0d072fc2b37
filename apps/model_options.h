// Options that server, cli, embedding, logits and bench share, and the model they open: file, vocabulary, device,
// pipeline.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cluster/cluster_pipeline.h"
#include "device/cpu/cpu_device.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "engine/sampling_params.h"
#include "gguf/reader.h"
#include "net/io.h"
#include "options.h"
#include "vocab/vocabulary.h"

namespace caravan::app {

struct ModelOptions {
  std::string model;
  uint32_t n_ctx = 0;                              // -c; 0: the largest that fits
  uint32_t n_batch = 2048, n_ubatch = 512;         // rows per step: the smaller of both
  uint32_t n_parallel = 4;                         // -np
  int n_threads = 0;                               // -t; 0: all usable
  uint32_t poll_ms = stage::kDefaultPoll.count();  // --poll
  std::string k_type = "f16", v_type = "f16";      // -ctk, -ctv
  uint64_t mem_mib = 0;                            // --mem of this process's own stages; 0: what is free
  std::vector<std::string> rpc;                    // --rpc
  std::string rpc_token;
  uint32_t rpc_wait_s = 60, recovery_timeout_s = 60;
  bool waits_on = false;  // for backends, also after --rpc-wait
  double rpc_timeout_s = 5;
  bool rpc_relay = false;
  std::optional<uint32_t> n_gpu_layers;                    // -ngl
  std::vector<double> tensor_split;                        // -ts
  std::optional<plan::Goal> goal = plan::Goal::automatic;  // --plan; none: to fill memory alike
  bool wants_prediction = false;                           // speeds are measured whether the plan needs them or not
  std::string cache_dir;                                   // --cache-dir; empty: the default folder
  std::string log_level = "info";
};

// Adds the rows that read into options; environment variables are llama.cpp's (LLAMA_ARG_*) and the containers'
// (APP_*).
void add_model_options(OptionParser& parser, ModelOptions& options);
void add_sampling_options(OptionParser& parser, engine::SamplingParams& sampling);
// --rpc-token and --rpc-token-file; help: what the secret is for.
void add_token_options(OptionParser& parser, std::string& token, std::string help);
void add_poll_option(OptionParser& parser, uint32_t& poll_ms);
void add_log_options(OptionParser& parser, std::string& level);
// Flags of llama.cpp's tools that concern the model and are not supported, or mean nothing here.
void add_known_model_flags(OptionParser& parser);

// A model that was opened: checked, but not loaded; pipeline().start() does that. Members are destroyed last to first.
class OpenedModel {
 public:
  // Reads the file's header and vocabulary. Throws RequestError without -m, SystemError, FormatError,
  // NotSupportedError.
  explicit OpenedModel(const ModelOptions& options);
  ~OpenedModel();

  const gguf::Model& file() const { return file_; }
  const vocab::Vocabulary& vocabulary() const { return *vocabulary_; }
  cluster::ClusterPipeline& pipeline() { return *pipeline_; }
  const models::Hyperparameters& hyperparameters() const { return pipeline_->hyperparameters(); }
  device::cpu::CpuDevice& device() { return device_; }

 private:
  gguf::Model file_;
  std::unique_ptr<const vocab::Vocabulary> vocabulary_;
  device::cpu::CpuDevice device_;
  std::unique_ptr<net::IoThreads> io_;
  std::unique_ptr<cluster::BackendConnector> connector_;
  std::unique_ptr<cluster::ClusterPipeline> pipeline_;
};

// Loads the model and waits until the engine has its plan. Throws what loading throws, or Error when the plan was lost.
void start(OpenedModel& opened, engine::Engine& engine);

// What -ctk and -ctv name. Throws RequestError for another type.
tensor::DType cache_type(const std::string& name);

// -t as given, or every usable processor.
int thread_count(int n_threads);

// How embeddings are pooled: as --pooling says, else as the model does, else the mean (encoders) or the last token.
// Throws RequestError for an unknown name.
engine::Pooling embedding_pooling(const std::string& name, const models::Hyperparameters& hp);

}  // namespace caravan::app
