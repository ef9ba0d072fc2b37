#!/usr/bin/env python3
"""What the encryption of the links costs: generation over backends with a token and without, in turns.

Usage: bench/tls.py CARAVAN_EXECUTABLE MODEL.gguf [--backends 2] [--tokens 64] [--repeat 10]

Starts both clusters on loopback, one thread per backend, and asks them for the same tokens one after the other, in the order plain,
TLS, TLS, plain. Prints the median speed of each, the median of the ratios of neighbours, and the processor time per token of the
server and the backends together."""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import time

TOKEN = "a token for the measurement of TLS"


class Program:
    """A caravan process; what it says ends up in a pipe that is read until a pattern comes."""

    def __init__(self, command, token):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("APP_", "LLAMA_"))}
        if token:
            environment["APP_RPC_TOKEN"] = token
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def wait_for(self, pattern):
        log = ""
        for line in self.process.stdout:
            log += line
            found = re.search(pattern, line)
            if found:
                return found
        raise SystemExit(f"no line with '{pattern}' came; the log:\n{log}")

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Cluster:
    def __init__(self, caravan, model, n_backends, token):
        self.programs = []
        addresses = []
        for _ in range(n_backends):
            backend = Program([caravan, "backend", "--port", "0", "-t", "1"], token)
            self.programs.append(backend)
            addresses.append("127.0.0.1:" + backend.wait_for(r"backend on 127\.0\.0\.1:(\d+)").group(1))
        server = Program([caravan, "server", "-m", model, "--rpc", ",".join(addresses), "-ngl", "99", "--plan", "memory", "--port", "0", "-t", "1", "-c", "1024"], token)
        self.programs.append(server)
        self.port = int(server.wait_for(r"listening on http://127\.0\.0\.1:(\d+)").group(1))
        server.wait_for("ready: ")
        self.rates, self.cpu_ms = [], []

    def generate(self, n_tokens):
        """(tokens per second, milliseconds of processor time per token)"""
        cpu = sum(p.cpu_seconds() for p in self.programs)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = {"prompt": [1, 2, 3, 4], "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        connection.request("POST", "/completion", json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        cpu = sum(p.cpu_seconds() for p in self.programs) - cpu
        return answer["timings"]["predicted_per_second"], cpu / n_tokens * 1000

    def stop(self):
        for program in reversed(self.programs):
            program.process.terminate()
            program.process.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan")
    parser.add_argument("model")
    parser.add_argument("--backends", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=10)
    a = parser.parse_args()
    clusters = [Cluster(a.caravan, a.model, a.backends, None), Cluster(a.caravan, a.model, a.backends, TOKEN)]
    ratios = []
    try:
        for cluster in clusters:
            cluster.generate(8)
        time.sleep(1)
        for i in range(a.repeat):
            pair = {}
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                rate, cpu = clusters[which].generate(a.tokens)
                clusters[which].rates.append(rate)
                clusters[which].cpu_ms.append(cpu)
                pair[which] = rate
            ratios.append(pair[1] / pair[0])
    finally:
        for cluster in clusters:
            cluster.stop()
    for name, cluster in zip(("plain", "TLS"), clusters):
        print(f"{name:6} median {statistics.median(cluster.rates):8.2f} tokens/s, {min(cluster.rates):.2f} to {max(cluster.rates):.2f}; "
              f"{statistics.median(cluster.cpu_ms):.2f} ms of processor time per token; n = {len(cluster.rates)}")
    print(f"TLS / plain: median {statistics.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}")


if __name__ == "__main__":
    main()
