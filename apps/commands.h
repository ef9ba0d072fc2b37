// The subcommands of the one executable. Each returns the exit status; errors are thrown and printed by main().
#pragma once

namespace caravan::app {

int run_backend(int argc, char** argv);
int run_server(int argc, char** argv);
int run_cli(int argc, char** argv);
int run_embedding(int argc, char** argv);
int run_bench(int argc, char** argv);
int run_logits(int argc, char** argv);
int run_quantize(int argc, char** argv);
int run_plan(int argc, char** argv);
int run_doctor(int argc, char** argv);
int run_health(int argc, char** argv);
int run_token(int argc, char** argv);
int run_entrypoint(int argc, char** argv);

}  // namespace caravan::app
