// Arbitrary bytes as an HTTP request: the target line, the JSON body, every field that the API reads, and the shapes it
// answers with. The first byte chooses what the rest is.
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "engine/engine.h"
#include "http/message.h"
#include "server/params.h"
#include "vocabulary.h"

namespace caravan {
namespace {

// A pipeline that never gets a plan: parsing needs an Api, and that an engine.
class NoPipeline : public engine::Pipeline {
 public:
  uint64_t submit(stage::Batch, uint64_t) override { return 0; }
  std::optional<engine::PipelineEvent> poll(std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    woken_.wait_for(lock, timeout);
    return std::nullopt;
  }
  void wake() override { woken_.notify_all(); }

 private:
  std::mutex mutex_;
  std::condition_variable woken_;
};

void require(bool holds, const char* what) {
  if (!holds) {
    fprintf(stderr, "%s\n", what);
    abort();
  }
}

void fuzz_target(std::string_view bytes) {
  http::Request request;
  http::parse_target(bytes, request);
  require(request.path.size() <= bytes.size(), "decoding never makes a path longer");
  for (const auto& [name, value] : request.query)
    require(name.size() + value.size() <= bytes.size(), "decoding never makes a query longer");
  require(http::percent_decode(bytes, true).size() <= bytes.size(), "decoding never makes a text longer");
}

void check_params(const server::CompletionParams& params, const server::Api& api) {
  const engine::SamplingParams& p = params.generate.sampling;
  engine::validate(p, static_cast<uint32_t>(api.vocabulary.size()));  // throws for what must have been refused
  require(params.generate.n_predict >= -1, "n_predict is checked");
  for (const std::string& word : params.generate.stop) require(!word.empty(), "empty stop strings are dropped");
  const server::Json settings = server::generation_settings(params.generate, params.stream, 1);
  require(settings.is_object() && settings.at("samplers").is_array(), "the settings are an object");
  require(server::Json::accept(server::to_text(settings)), "what is answered is JSON");
}

void fuzz_body(std::string_view bytes, const server::Api& api) {
  const server::Json body = server::parse_object(bytes);
  require(body.is_object(), "a body is an object");
  require(server::Json::accept(server::to_text(body)), "what was read can be written");
  for (const char* field : {"prompt", "content", "input"})
    if (const server::Json* value = server::find_field(body, field)) try {
        for (const server::Prompt& prompt : server::parse_prompts(*value, field, api.vocabulary))
          for (const int32_t token : prompt)
            require(token >= 0 && static_cast<uint32_t>(token) < api.vocabulary.size(), "tokens are in the vocabulary");
      } catch (const RequestError&) {  // the other fields are read all the same
      }
  check_params(server::parse_completion(body, api), api);
}

// The error response for what the request threw: always JSON with the status in it.
void check_error(std::exception_ptr error) {
  const http::Response response = server::error_response(error);
  const server::Json body = server::Json::parse(response.body);
  require(body.at("error").at("code") == response.status, "the body repeats the status");
  require(response.status >= 400 && response.status < 600 && response.status != 500, "a bad request is not our fault");
}

}  // namespace
}  // namespace caravan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace caravan;
  static const auto vocabulary = fuzz::byte_vocabulary();
  static NoPipeline pipeline;
  static engine::Engine engine(pipeline, *vocabulary);
  static const server::Api api{engine, *vocabulary, {}, {}};
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    if (data[0] == 'T') {
      fuzz_target(bytes);
    } else {
      fuzz_body(bytes, api);
    }
  } catch (const RequestError&) {
    check_error(std::current_exception());
  }
  return 0;
}
