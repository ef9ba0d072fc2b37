#!/usr/bin/env python3
"""How well the planner foretells speeds: predicted over measured, of a model split over backends of this machine.

Usage: bench/prediction.py CARAVAN_EXECUTABLE MODEL.gguf... [--backends 2] [--repetitions 3]

Each backend has one thread and, where there are enough, a processor of its own. Both figures are those of one `caravan bench --rpc`,
with a prompt of 512 tokens; for each model new backends measure themselves."""

import argparse
import json
import os
import re
import subprocess
import sys
import time

TOKEN = "a token of the benchmark"


def start_backend(caravan, processor):
    environment = {**os.environ, "APP_RPC_TOKEN": TOKEN}
    process = subprocess.Popen(["taskset", "-c", str(processor), caravan, "backend", "--port", "0", "-t", "1", "--mem", "3000"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if found := re.search(r"backend on ([^ ,]+:\d+)", line):
            return process, found.group(1)
    raise SystemExit("the backend does not start")


def measure(caravan, model, n_backends, repetitions):
    processors = sorted(os.sched_getaffinity(0))
    backends = [start_backend(caravan, processors[i % len(processors)]) for i in range(n_backends)]
    try:
        command = [caravan, "bench", "-m", model, "--rpc", ",".join(address for _, address in backends), "-ngl", "99", "--plan", "memory",
                   "-t", "1", "-p", "512", "-n", "32", "-r", str(repetitions), "-o", "json"]
        start = time.monotonic()
        subprocess.run([caravan, "plan", *command[2:8], "--plan", "memory", "-t", "1"], check=True, stdout=subprocess.DEVNULL,
                              env={**os.environ, "APP_RPC_TOKEN": TOKEN})
        seconds = time.monotonic() - start
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "APP_RPC_TOKEN": TOKEN})
        return json.loads(run.stdout), seconds
    finally:
        for process, _ in backends:
            process.terminate()
            process.stderr.read()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("caravan")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--backends", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.backends} backends of one thread; tokens/s predicted / measured (n = {args.repetitions}, median, least, most)")
    for model in args.models:
        result, seconds = measure(args.caravan, model, args.backends, args.repetitions)
        line = os.path.basename(model).ljust(24)
        for what in ("prompt", "generation"):
            predicted = result["predicted"][f"{what}_tokens_per_s"]
            measured = result[what]["tokens_per_s"]
            line += (f" {what} {predicted:.2f} / {measured['median']:.2f} ({measured['min']:.2f} - {measured['max']:.2f})"
                     f" = {predicted / measured['median']:.2f};")
        print(f"{line} backends measured themselves, and the plan was made, in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
