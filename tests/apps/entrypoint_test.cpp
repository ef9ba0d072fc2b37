// What a container runs, as a table: environment and arguments to a command line, or to an error; and what its options
// then come to, by --print-config.
#include "entrypoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

#include "base/error.h"
#include "command_table.h"
#include "commands.h"

namespace caravan::app {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using Variables = std::map<std::string, std::string>;
using Words = std::vector<std::string>;

Environment environment_of(const Variables& variables) {
  return [&variables](const std::string& name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  };
}

std::string joined(const Launch& launch) {
  std::string text = launch.command;
  for (const std::string& argument : launch.arguments) text += " " + argument;
  return text;
}

std::string launch_text(const Variables& variables, const Words& arguments) {
  try {
    return joined(container_launch(environment_of(variables), arguments));
  } catch (const RequestError& error) {
    return std::string("error: ") + error.what();
  }
}

constexpr const char* kServer = "server --host 0.0.0.0 --model /app/share/demo.gguf --gpu-layers 99 --stop-timeout 7";

TEST(Entrypoint, ChoosesTheCommandByModeAndArguments) {
  struct Case {
    Variables variables;
    Words arguments;
    std::string expected;
  };
  const std::string server = kServer;
  const Case cases[] = {
      {{}, {}, "backend --host 0.0.0.0 --mem 1024"},
      {{{"APP_MODE", ""}}, {}, "backend --host 0.0.0.0 --mem 1024"},
      {{{"APP_MODE", "backend"}}, {"-t", "2"}, "backend --host 0.0.0.0 --mem 1024 -t 2"},
      {{{"APP_MODE", "server"}}, {}, server},
      {{{"APP_MODE", "server"}}, {"--ctx-size", "8192"}, server + " --ctx-size 8192"},
      {{{"APP_MODE", "cli"}}, {"-p", "Hi"}, "cli --model /app/share/demo.gguf --gpu-layers 99 -p Hi"},
      {{{"APP_MODE", "embedding"}}, {}, "embedding --model /app/share/demo.gguf --gpu-layers 99"},
      {{{"APP_MODE", "none"}}, {}, "none"},
      // A command or a tool's name goes before APP_MODE.
      {{{"APP_MODE", "backend"}}, {"server"}, server},
      {{}, {"llama-server", "--port", "1"}, server + " --port 1"},
      {{}, {"/app/rpc-server"}, "backend --host 0.0.0.0 --mem 1024"},
      {{}, {"ggml-rpc-server"}, "backend --host 0.0.0.0 --mem 1024"},
      {{}, {"inspect", "a.gguf"}, "inspect a.gguf"},
      // Set variables take the place of defaults; empty scalars are defaults, an empty path is none.
      {{{"APP_BIND", "10.0.0.1"}, {"APP_MEM", "64"}}, {}, "backend"},
      {{{"APP_BIND", ""}, {"APP_MEM", ""}}, {}, "backend --host 0.0.0.0 --mem 1024"},
      {{{"APP_MODE", "server"}, {"APP_MODEL", "/app/models/a.gguf"}, {"APP_GPU_LAYERS", "3"}, {"APP_BIND", "::"}},
       {},
       "server --stop-timeout 7"},
      {{{"APP_MODE", "server"}, {"APP_MODEL", ""}, {"APP_GPU_LAYERS", ""}},
       {},
       "server --host 0.0.0.0 --gpu-layers 99 --stop-timeout 7"},
      {{{"APP_MODE", "server"}, {"LLAMA_ARG_MODEL", "a"}, {"LLAMA_ARG_HOST", "b"}, {"LLAMA_ARG_N_GPU_LAYERS", "1"}},
       {},
       "server --stop-timeout 7"},
      {{{"APP_MODE", "server"}, {"LLAMA_ARG_MODEL", ""}}, {}, server},
      // Errors name the variable, what it was, what is accepted.
      {{{"APP_MODE", "sever"}}, {}, "error: APP_MODE='sever': accepted are backend, server, cli, embedding, none"},
      {{{"APP_MODE", "none"}}, {"-c", "1"}, "error: APP_MODE=none waits and takes no arguments, found '-c'"},
      {{}, {"bash"}, "error: unknown command 'bash'; `caravan --help` lists them"},
      {{}, {"entrypoint"}, "error: entrypoint cannot run itself"},
      {{{"APP_RPC_TOKEN", "secret"}, {"APP_RPC_TOKEN_FILE", "/run/secrets/token"}},
       {},
       "error: APP_RPC_TOKEN and APP_RPC_TOKEN_FILE='/run/secrets/token' are both set: give one of them"},
      {{{"APP_MODE", "server"}, {"APP_API_KEY", "k"}, {"APP_API_KEY_FILE", "/f"}},
       {},
       "error: APP_API_KEY and APP_API_KEY_FILE='/f' are both set: give one of them"},
  };
  for (const Case& c : cases) EXPECT_EQ(launch_text(c.variables, c.arguments), c.expected);
}

// Runs the container's command with --print-config, in an environment of these variables only.
class EntrypointConfig : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const std::string& name : set_) unsetenv(name.c_str());
  }

  // The lines printed, or "error: ...".
  std::string config(const Variables& variables, const Words& arguments = {}) {
    TearDown();
    set_.clear();
    for (const auto& [name, value] : variables) {
      setenv(name.c_str(), value.c_str(), 1);
      set_.push_back(name);
    }
    try {
      Launch launch = container_launch(environment_of(variables), arguments);
      launch.arguments.emplace_back("--print-config");
      std::vector<char*> argv{launch.command.data()};
      for (std::string& argument : launch.arguments) argv.push_back(argument.data());
      ::testing::internal::CaptureStdout();
      try {
        find_command(launch.command)->run(static_cast<int>(argv.size()), argv.data());
      } catch (...) {
        ::testing::internal::GetCapturedStdout();
        throw;
      }
      return ::testing::internal::GetCapturedStdout();
    } catch (const RequestError& error) {
      return std::string("error: ") + error.what();
    }
  }

  std::string backend(const std::string& name, const std::string& value) {
    return config({{"APP_MODE", "backend"}, {name, value}});
  }
  std::string server(const std::string& name, const std::string& value) {
    return config({{"APP_MODE", "server"}, {name, value}});
  }

 private:
  Words set_;
};

TEST_F(EntrypointConfig, DefaultsAreThoseOfTheTable) {
  EXPECT_EQ(config({}), "--host 0.0.0.0\n--mem 1024\n");
  EXPECT_EQ(config({{"APP_MODE", "server"}}),
            "--host 0.0.0.0\n--model /app/share/demo.gguf\n--n-gpu-layers 99\n--stop-timeout 7\n");
}

TEST_F(EntrypointConfig, EveryVariableOfABackendReachesItsOption) {
  EXPECT_EQ(
      config({{"APP_BIND", "127.0.0.1"},
              {"APP_PORT", "50053"},
              {"APP_MEM", "2048"},
              {"APP_THREADS", "2"},
              {"APP_RPC_TOKEN", "0123456789abcdef"},
              {"APP_DEVICE", "cpu"}}),
      "--host 127.0.0.1  [APP_BIND]\n--port 50053  [APP_PORT]\n--mem 2048  [APP_MEM]\n--threads 2  [APP_THREADS]\n"
      "--rpc-token (secret)  [APP_RPC_TOKEN]\n--device cpu  [APP_DEVICE]\n");
  EXPECT_THAT(
      config({{"APP_CACHE", "on"},
              {"APP_CACHE_DIR", "/app/cache"},
              {"APP_CACHE_LIMIT", "20G"},
              {"APP_MODELS_DIR", "/app/models"},
              {"APP_ADVERTISE", "a.example:50052"},
              {"APP_METRICS_PORT", "9100"}}),
      AllOf(HasSubstr("--advertise a.example:50052  [APP_ADVERTISE]\n"),
            HasSubstr("--metrics-port 9100  [APP_METRICS_PORT]\n"), HasSubstr("--cache on  [APP_CACHE]\n"),
            HasSubstr("--cache-dir /app/cache  [APP_CACHE_DIR]\n"), HasSubstr("--cache-limit 20G  [APP_CACHE_LIMIT]\n"),
            HasSubstr("--models-dir /app/models  [APP_MODELS_DIR]\n")));
  EXPECT_THAT(backend("APP_MEM", "auto"), HasSubstr("--mem auto  [APP_MEM]"));
}

TEST_F(EntrypointConfig, EveryVariableOfAServerReachesItsOption) {
  const std::string text = config({{"APP_MODE", "server"},
                                   {"APP_BIND", "127.0.0.1"},
                                   {"APP_PORT", "8081"},
                                   {"APP_RPC_BACKENDS", "backend-cuda:50052, backend-cpu:50052"},
                                   {"APP_MODEL", "/app/models/a.gguf"},
                                   {"APP_REPEAT_PENALTY", "1.1"},
                                   {"APP_GPU_LAYERS", "all"},
                                   {"APP_RPC_TOKEN", "0123456789abcdef"},
                                   {"APP_THREADS", "3"},
                                   {"APP_CTX_SIZE", "4096"},
                                   {"APP_PARALLEL", "8"},
                                   {"APP_PLAN", "latency"},
                                   {"APP_CACHE_DIR", "/app/cache"},
                                   {"APP_API_KEY", "one,two"}});
  for (const char* line :
       {"--host 127.0.0.1  [APP_BIND]", "--port 8081  [APP_PORT]",
        "--rpc backend-cuda:50052, backend-cpu:50052  [APP_RPC_BACKENDS]", "--model /app/models/a.gguf  [APP_MODEL]",
        "--repeat-penalty 1.1  [APP_REPEAT_PENALTY]", "--n-gpu-layers all  [APP_GPU_LAYERS]",
        "--rpc-token (secret)  [APP_RPC_TOKEN]", "--threads 3  [APP_THREADS]", "--ctx-size 4096  [APP_CTX_SIZE]",
        "--parallel 8  [APP_PARALLEL]", "--plan latency  [APP_PLAN]", "--cache-dir /app/cache  [APP_CACHE_DIR]",
        "--api-key (secret)  [APP_API_KEY]"})
    EXPECT_THAT(text, HasSubstr(std::string(line) + "\n"));
  EXPECT_THAT(text, AllOf(Not(HasSubstr("0123456789abcdef")), Not(HasSubstr("one,two"))));
}

TEST_F(EntrypointConfig, ArgumentsGoBeforeVariables) {
  EXPECT_EQ(config({{"APP_PORT", "1"}}, {"--port", "2", "--mem=64"}), "--host 0.0.0.0\n--port 2\n--mem 64\n");
}

TEST_F(EntrypointConfig, BadValuesNameTheVariableTheValueAndWhatIsAccepted) {
  struct Case {
    const char* mode;
    const char* variable;
    const char* value;
    const char* accepted;
  };
  const Case cases[] = {
      {"backend", "APP_PORT", "http", "from 0 to 65535"},
      {"server", "APP_PORT", "65536", "from 0 to 65535"},
      {"backend", "APP_MEM", "1GB", "a whole number"},
      {"server", "APP_REPEAT_PENALTY", "high", "a number"},
      {"server", "APP_GPU_LAYERS", "some", "a whole number"},
      {"backend", "APP_THREADS", "0", "from 1 to 512"},
      {"server", "APP_THREADS", "many", "a whole number"},
      {"server", "APP_CTX_SIZE", "-5", "a whole number from 0"},
      {"server", "APP_PARALLEL", "0", "at least 1"},
      {"backend", "APP_DEVICE", "cuda", "on the processor only: expected cpu"},
      {"server", "APP_REPEAT_PENALTY", "0", "greater than 0"},
      {"server", "APP_RPC_BACKENDS", "a:50052,b:port", "expected a port"},
      {"server", "APP_RPC_BACKENDS", "http://a:50052", "endpoint 'http://a:50052'"},
      {"server", "APP_PLAN", "fast", "auto, latency, throughput, memory"},
      {"backend", "APP_ADVERTISE", "a", "expected host:port"},
      {"backend", "APP_METRICS_PORT", "web", "from 0 to 65535"},
      {"backend", "APP_RPC_TOKEN_FILE", "/no/file", "a file that this user can read"},
      {"backend", "APP_CACHE", "yes", "accepted are on"},
      {"backend", "APP_CACHE_LIMIT", "much", "expected a size"},
      {"server", "LLAMA_ARG_JINJA", "maybe", "on, true, enabled, 1 and off, false, disabled, 0"},
      {"server", "LLAMA_ARG_CONT_BATCHING", "off", "cannot be turned off"},
      {"server", "LLAMA_ARG_FLASH_ATTN", "never", "[on|off|auto]"},
      {"server", "LLAMA_ARG_SPLIT_MODE", "row", "not supported"},
  };
  for (const Case& c : cases)
    EXPECT_THAT(
        config({{"APP_MODE", c.mode}, {c.variable, c.value}}),
        AllOf(HasSubstr("error: "), HasSubstr(std::string(c.variable) + "='" + c.value + "'"), HasSubstr(c.accepted)));
}

TEST_F(EntrypointConfig, EmptyVariablesAreDefaultsOrNone) {
  const std::string with_nothing = config({{"APP_MODE", "server"}});
  for (const char* name :
       {"APP_BIND", "APP_PORT", "APP_RPC_BACKENDS", "APP_REPEAT_PENALTY", "APP_GPU_LAYERS", "APP_RPC_TOKEN",
        "APP_RPC_TOKEN_FILE", "APP_THREADS", "APP_CTX_SIZE", "APP_PARALLEL", "APP_API_KEY", "APP_API_KEY_FILE",
        "APP_PLAN", "APP_CACHE_DIR", "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_SPLIT_MODE"})
    EXPECT_EQ(server(name, ""), with_nothing) << name;
  EXPECT_THAT(server("APP_MODEL", ""), Not(HasSubstr("--model")));
  for (const char* name : {"APP_MODE", "APP_MEM", "APP_CACHE", "APP_CACHE_LIMIT", "APP_MODELS_DIR", "APP_ADVERTISE",
                           "APP_METRICS_PORT", "APP_DEVICE"})
    EXPECT_EQ(config({{name, ""}}), config({})) << name;
}

TEST_F(EntrypointConfig, VariablesOfLlamaServerSetTheirOptions) {
  for (const auto& [name, value, line] : std::vector<std::tuple<const char*, const char*, const char*>>{
           {"LLAMA_ARG_CTX_SIZE", "512", "--ctx-size 512"},
           {"LLAMA_ARG_BATCH", "256", "--batch-size 256"},
           {"LLAMA_ARG_UBATCH", "64", "--ubatch-size 64"},
           {"LLAMA_ARG_N_PREDICT", "10", "--n-predict 10"},
           {"LLAMA_ARG_CACHE_TYPE_K", "q8_0", "--cache-type-k q8_0"},
           {"LLAMA_ARG_TENSOR_SPLIT", "1,2", "--tensor-split 1,2"},
           {"LLAMA_ARG_ALIAS", "demo", "--alias demo"},
           {"LLAMA_ARG_TOP_K", "10", "--top-k 10"},
           {"LLAMA_ARG_ENDPOINT_SLOTS", "off", "--slots off"},
           {"LLAMA_ARG_UI", "0", "--webui 0"},
           {"LLAMA_ARG_FLASH_ATTN", "auto", "--flash-attn auto"},
           {"LLAMA_ARG_KV_UNIFIED", "1", "--kv-unified 1"},
           {"LLAMA_ARG_TIMEOUT", "60", "--timeout 60"}})
    EXPECT_THAT(server(name, value), HasSubstr(std::string(line) + "  [" + name + "]\n"));
}

TEST_F(EntrypointConfig, SecretsComeFromFiles) {
  const std::string path = ::testing::TempDir() + "entrypoint-token";
  std::ofstream(path) << "a token of a file\n";
  EXPECT_THAT(backend("APP_RPC_TOKEN_FILE", path), HasSubstr("--rpc-token-file " + path));
  EXPECT_THAT(server("APP_API_KEY_FILE", path), HasSubstr("--api-key-file " + path));
  std::ofstream(path) << "\n";
  EXPECT_THAT(backend("APP_RPC_TOKEN_FILE", path),
              AllOf(HasSubstr("error: APP_RPC_TOKEN_FILE='" + path + "'"), HasSubstr("no token")));
  std::remove(path.c_str());
}

TEST_F(EntrypointConfig, SecretsAreNotShownWhenTheyAreTooShort) {
  EXPECT_THAT(backend("APP_RPC_TOKEN", "secret"),
              AllOf(HasSubstr("error: APP_RPC_TOKEN: the token has 6 bytes, at least 16"), Not(HasSubstr("secret"))));
}

TEST(Entrypoint, FindsWhatRunsInACommandLine) {
  using namespace std::string_literals;
  const Variables variables{{"APP_MODE", "server"}};
  const Environment environment = environment_of(variables);
  const auto command = [&](const std::string& text) {
    const auto launch = launch_of_process(text, environment);
    return launch ? joined(*launch) : "nothing";
  };
  EXPECT_EQ(command("/app/caravan\0entrypoint\0"s), kServer);
  EXPECT_EQ(command("caravan\0entrypoint\0rpc-server\0-p\0001\0"s), "backend --host 0.0.0.0 --mem 1024 -p 1");
  EXPECT_EQ(command("/usr/libexec/qemu-binfmt/arm-binfmt-P\0/app/caravan\0/app/caravan\0entrypoint\0"s), kServer);
  for (const std::string& other : {""s, "/sbin/init\0"s, "entrypoint\0"s, "caravan\0server\0"s, "bash\0entrypoint\0"s})
    EXPECT_EQ(command(other), "nothing");
}

TEST(Entrypoint, WarnsOfMisspeltVariablesOnly) {
  const Words names{"APP_RPC_BACKEND", "APP_MODE", "APP_VERSION", "PATH", "APP_PROT"};
  EXPECT_THAT(misspelt_variables(names),
              ElementsAre("APP_RPC_BACKEND is set but never read; did you mean APP_RPC_BACKENDS?",
                          "APP_PROT is set but never read; did you mean APP_PORT?"));
  EXPECT_THAT(misspelt_variables(Words{"HOME", "APPLE"}), IsEmpty());
}

}  // namespace
}  // namespace caravan::app
