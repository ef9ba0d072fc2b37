#!/usr/bin/env python3
"""Speed of generation under a lazy grammar whose trigger never comes, against none.

Usage: bench/lazy_grammar.py CARAVAN_EXECUTABLE MODEL.gguf [--tokens 256] [--repeat 10] [server options]

Both sides answer the same chat, in the order A B B A: with tools that the model may call, and without the grammar that holds it to them
(the same rendered prompt as a plain completion). Prints the median of the ratios of their tokens per second, by the server's clock."""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import time


def post(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise SystemExit(text)
    return json.loads(text)


def tools(n):
    parameters = {"type": "object", "required": ["path"], "properties": {
        "path": {"type": "string"}, "line": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}}}
    return [{"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}} for i in range(n)]


def start(command):
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in server.stdout:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        if found:
            return server, int(found.group(1))
    raise SystemExit("the server did not start")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=10)
    arguments, server_options = parser.parse_known_args()
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{# <tool_call> #}"
    server, port = start([arguments.caravan, "server", "-m", arguments.model, "--port", "0", "--chat-template", template,
                          *server_options])
    try:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
            time.sleep(0.05)
        common = {"temperature": 0, "max_tokens": arguments.tokens, "ignore_eos": True}
        chat = {**common, "messages": [{"role": "user", "content": "Once upon a time"}], "tools": tools(20)}
        prompt = post(port, "/apply-template", chat)["prompt"]

        def with_grammar():
            return post(port, "/v1/chat/completions", chat)["timings"]["predicted_per_second"]

        def without():
            return post(port, "/completion", {**common, "prompt": prompt})["timings"]["predicted_per_second"]

        with_grammar(), without()
        ratios, speeds = [], []
        for _ in range(arguments.repeat):
            a, b, c, d = with_grammar(), without(), without(), with_grammar()
            ratios.append((a + d) / (b + c))
            speeds.append((b + c) / 2)
        print(f"without: median {statistics.median(speeds):.1f} tokens/s; with / without: median {statistics.median(ratios):.4f}, "
              f"{min(ratios):.4f} to {max(ratios):.4f}, n = {len(ratios)} x ABBA of {arguments.tokens} tokens")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
