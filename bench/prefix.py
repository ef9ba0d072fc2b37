#!/usr/bin/env python3
"""Time to the first token of a prompt that is new to a server, and of one that shares its first tokens with an earlier one.

Usage: bench/prefix.py CARAVAN_EXECUTABLE MODEL.gguf [--tokens 2000] [--repeat 5] [server options, e.g. --rpc ...]

Each pair begins with tokens that the server has not seen; both prompts end differently. Prints the median and the range of both
sides, by the client's clock and by the server's own (timings.prompt_ms), and their ratio."""

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import time


def first_token(port, tokens):
    """(seconds until the first event, the timings of the last one)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    body = {"prompt": tokens, "n_predict": 2, "stream": True, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    connection.request("POST", "/completion", json.dumps(body))
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(response.read().decode())
    first, last = None, None
    for line in response:
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - start
            last = json.loads(line[6:])
    connection.close()
    return first, last["timings"]


def summary(values):
    return f"median {statistics.median(values) * 1000:9.1f} ms, {min(values) * 1000:.1f} to {max(values) * 1000:.1f}, n = {len(values)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments, server_options = parser.parse_known_args()
    command = [arguments.caravan, "server", "-m", arguments.model, "--port", "0", "-c", str(2 * arguments.tokens + 256), *server_options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = None
        for line in server.stdout:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
            port = port or (found and int(found.group(1)))
            if port:
                break
        if not port:
            raise SystemExit("the server did not start")
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
            time.sleep(0.1)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v1/models")
        n_vocab = json.loads(connection.getresponse().read())["data"][0]["meta"]["n_vocab"]
        randomness = random.Random(1)
        sides = {"new": ([], []), "shared": ([], [])}
        for _ in range(arguments.repeat):
            prefix = [randomness.randrange(3, n_vocab) for _ in range(arguments.tokens)]
            for side in sides:
                client, timings = first_token(port, prefix + [randomness.randrange(3, n_vocab) for _ in range(4)])
                expected = 0 if side == "new" else arguments.tokens
                if timings["cache_n"] < expected or (side == "new" and timings["cache_n"] > 4):
                    raise SystemExit(f"{side}: {timings['cache_n']} tokens came from the cache")
                sides[side][0].append(client)
                sides[side][1].append(timings["prompt_ms"] / 1000)
        print(f"{arguments.tokens} shared tokens, then 4 of each prompt's own; time to the first token")
        for name, (client, engine) in sides.items():
            print(f"  {name:6}  client: {summary(client)};  server: {summary(engine)}")
        ratios = [statistics.median(sides["new"][i]) / statistics.median(sides["shared"][i]) for i in (0, 1)]
        print(f"  the second starts {ratios[0]:.0f} times sooner (client), {ratios[1]:.0f} times (server)")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
