#!/usr/bin/env python3
"""How well a model that is split over backends keeps its machines busy: ratios to one process, each of pairs from one run.

Usage: bench/overlap.py CARAVAN_EXECUTABLE MODEL.gguf SECTION... [--pairs 2] [--netemu PATH]

Sections:
  prompt:N    prompt rate of N tokens: two backends of one thread to one process of two threads; and what is possible:
              n/(n+(S-1)c) x e(c), where c is the chunk that was chosen and e(c) the rate at chunk c over that at 512
  stages:N    prompt rate of N tokens: three and four backends of one thread to two of them
  streams     eight sequences on two backends of one thread to one process of two threads with eight, and with four
  replicas    eight sequences on two backends of one thread, each with the whole model, to the same backends with half of it each
              and to one process of two threads
  one         one sequence on two backends of one thread to one process of one thread
  link        one sequence: the second backend behind 1 Gbit/s and 0.4 ms, to loopback; needs root and --netemu, a program
              that joins two network namespaces: NS_A ADDRESS_A NS_B ADDRESS_B DELAY_MS JITTER_MS RATE_MBIT LOSS_PERCENT

Sides are measured in the order A B B A, as often as --pairs says. A figure is the median of the ratios of these pairs. Rates are
the server's own (timings), so that HTTP does not count."""

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

TOKEN = "a token of the benchmark"
RANDOM = random.Random(1)


def enter_namespace(name):
    """Sockets of this thread are made in that network namespace from now on."""
    with open(f"/var/run/netns/{name}", "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")


def round_trip_ms(near, far, address):
    """Of one byte and its answer from one namespace to the other: the median of 50."""
    listening, port, times = threading.Event(), [], []

    def answer():
        enter_namespace(far)
        with socket.create_server((address, 0)) as listener:
            port.append(listener.getsockname()[1])
            listening.set()
            connection = listener.accept()[0]
            while connection.recv(1):
                connection.send(b"x")

    def ask():
        enter_namespace(near)
        with socket.create_connection((address, port[0])) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(50):
                start = time.perf_counter()
                connection.send(b"x")
                connection.recv(1)
                times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=answer), threading.Thread(target=ask)]
    threads[0].start()
    listening.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    return statistics.median(times) * 1000


class Process:
    def __init__(self, caravan, *arguments, namespace=None):
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        environment = {**os.environ, "APP_RPC_TOKEN": TOKEN}
        self.process = subprocess.Popen([*inside, caravan, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        text=True, env=environment)
        self.namespace = namespace
        self.lines = []
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()

    def wait_for(self, pattern, timeout=60):
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                for line in self.lines:
                    found = re.search(pattern, line)
                    if found:
                        return found
                if self.process.poll() is not None or not self.changed.wait(deadline - time.monotonic()):
                    raise SystemExit(f"'{pattern}' did not come:\n" + "".join(self.lines))

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Backend(Process):
    def __init__(self, caravan, namespace=None, address="127.0.0.1"):
        super().__init__(caravan, "backend", "--host", address, "--port", 0, "-t", 1, "--mem", 3000, namespace=namespace)
        port = self.wait_for(r"backend on [^:]+:(\d+)").group(1)
        self.address = f"{address}:{port}"


class Server(Process):
    """A side: a server with its backends, if any."""

    def __init__(self, caravan, model, threads, backends=(), n_parallel=1, n_ctx=2560, extra=(), namespace=None):
        rpc = ["--rpc", ",".join(b.address for b in backends), "-ngl", 99, "--plan", "memory"] if backends else []
        super().__init__(caravan, "server", "-m", model, "--host", "127.0.0.1", "--port", 0, "-t", threads, "-c", n_ctx, "-np",
                         n_parallel, "--log-level", "debug", *rpc, *extra, namespace=namespace)
        self.backends = backends
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)").group(1))
        while self.in_namespace(lambda: self.request("GET", "/health"))[0] != 200:
            time.sleep(0.1)
        self.n_vocab = json.loads(self.in_namespace(lambda: self.request("GET", "/v1/models"))[1])["data"][0]["meta"]["n_vocab"]
        self.complete(64, 16)  # learns what batches cost

    def in_namespace(self, function):
        result = []

        def work():
            if self.namespace:
                enter_namespace(self.namespace)
            result.append(function())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return result[0]

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, body and json.dumps(body))
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    def complete(self, n_prompt, n_predict):
        """The timings of one request with random tokens."""
        prompt = [RANDOM.randrange(3, self.n_vocab) for _ in range(n_prompt)]
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        status, text = self.in_namespace(lambda: self.request("POST", "/completion", body))
        if status != 200:
            raise SystemExit(text.decode())
        return json.loads(text)["timings"]

    def prompt_rate(self, n):
        return n / self.complete(n, 1)["prompt_ms"] * 1000

    def generation_rate(self, n_streams, n_predict):
        timings = [None] * n_streams

        def ask(i):
            timings[i] = self.complete(8, n_predict)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(n_streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum((t["predicted_n"] - 1) / t["predicted_ms"] * 1000 for t in timings)

    def chunk(self):
        """Rows per batch that were chosen last."""
        return int(re.findall(r"of prompts wait: (\d+) rows a batch", "".join(self.lines))[-1])

    def close(self):
        self.stop()
        for backend in self.backends:
            backend.stop()


def compare(name, a, b, pairs):
    """Measures A B B A; prints and returns the median of the ratios B / A."""
    ratios, rates_a, rates_b = [], [], []
    for _ in range(pairs):
        a1, b1, b2, a2 = a(), b(), b(), a()
        ratios += [b1 / a1, b2 / a2]
        rates_a += [a1, a2]
        rates_b += [b1, b2]
    ratio = statistics.median(ratios)
    print(f"{name}: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}); "
          f"{statistics.median(rates_b):.2f} to {statistics.median(rates_a):.2f} tokens/s", flush=True)
    return ratio


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments

    @contextlib.contextmanager
    def side(self, threads, n_backends=0, **more):
        backends = [Backend(self.arguments.caravan) for _ in range(n_backends)]
        server = Server(self.arguments.caravan, self.arguments.model, threads, backends, **more)
        try:
            yield server
        finally:
            server.close()

    def prompt(self, n):
        with self.side(2) as whole, self.side(1, 2) as split:
            ratio = compare(f"prompt of {n} on 2 x 1 thread / 1 x 2 threads", lambda: whole.prompt_rate(n), lambda: split.prompt_rate(n),
                            self.arguments.pairs)
            chunk = split.chunk()
        m = min(n, 512)
        with self.side(1) as large, self.side(1, extra=("-ub", chunk)) as small:
            efficiency = compare(f"  e({chunk}): prompt of {m} in batches of {chunk} / of up to 512, 1 thread", lambda: large.prompt_rate(m),
                                 lambda: small.prompt_rate(m), 1)
        bound = n / (n + chunk) * efficiency
        print(f"  possible with chunks of {chunk}: {bound:.3f}; reached of it: {ratio / bound:.3f}", flush=True)

    def stages(self, n):
        with self.side(1, 2) as two:
            for more in (3, 4):
                with self.side(1, more) as split:
                    compare(f"prompt of {n} on {more} stages / 2 stages", lambda: two.prompt_rate(n), lambda: split.prompt_rate(n),
                            self.arguments.pairs)

    def streams(self, n_predict=40):
        with self.side(2, n_parallel=8) as whole, self.side(1, 2, n_parallel=8) as split:
            for n in (4, 8):
                compare(f"8 streams on 2 x 1 thread / {n} streams on 1 x 2 threads", lambda n=n: whole.generation_rate(n, n_predict),
                        lambda: split.generation_rate(8, n_predict), self.arguments.pairs)

    def replicas(self, n_predict=40):
        throughput = ("--plan", "throughput")
        with self.side(2, n_parallel=8) as whole, self.side(1, 2, n_parallel=8) as split, \
                self.side(1, 2, n_parallel=8, extra=throughput) as replicated:
            stages = json.loads(replicated.request("GET", "/props")[1])["plan"]["stages"]
            if [stage["replica"] for stage in stages] != [0, 1]:
                raise SystemExit(f"the plan is not two replicas: {stages}")
            for name, side in (("2 stages on 2 x 1 thread", split), ("1 x 2 threads", whole)):
                compare(f"8 streams as 2 replicas on 2 x 1 thread / {name}", lambda side=side: side.generation_rate(8, n_predict),
                        lambda: replicated.generation_rate(8, n_predict), self.arguments.pairs)

    def one(self, n_predict=64):
        with self.side(1) as whole, self.side(1, 2) as split:
            compare("1 stream on 2 x 1 thread / 1 x 1 thread", lambda: whole.generation_rate(1, n_predict),
                    lambda: split.generation_rate(1, n_predict), self.arguments.pairs)

    def link(self, n_predict=64):
        if not self.arguments.netemu:
            raise SystemExit("link: needs --netemu")
        near, far = f"caravan-near-{os.getpid()}", f"caravan-far-{os.getpid()}"
        emulator, sides = None, []
        try:
            for name in (near, far):
                subprocess.run(["ip", "netns", "add", name], check=True)
                subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
            emulator = subprocess.Popen([self.arguments.netemu, near, "10.88.0.1/24", far, "10.88.0.2/24", "0.13", "0", "1000", "0"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(1)
            print(f"link: round trip {round_trip_ms(near, far, '10.88.0.2'):.2f} ms", flush=True)
            caravan, model = self.arguments.caravan, self.arguments.model
            first = Backend(caravan, namespace=near, address="10.88.0.1")
            second = Backend(caravan, namespace=far, address="10.88.0.2")
            sides.append(Server(caravan, model, 1, [first, second], namespace=near))
            sides.append(Server(caravan, model, 1, [Backend(caravan), Backend(caravan)]))
            compare("1 stream with 1 Gbit/s and 0.4 ms between the backends / loopback", lambda: sides[1].generation_rate(1, n_predict),
                    lambda: sides[0].generation_rate(1, n_predict), self.arguments.pairs)
        finally:
            for server in sides:
                server.close()
            if emulator:
                emulator.terminate()
                emulator.wait()
            for name in (near, far):
                subprocess.run(["ip", "netns", "del", name], check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan")
    parser.add_argument("model")
    parser.add_argument("sections", nargs="+")
    parser.add_argument("--pairs", type=int, default=2, help="times A B B A is measured")
    parser.add_argument("--netemu", help="program that joins two network namespaces")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    bench = Bench(arguments)
    for section in arguments.sections:
        name, _, number = section.partition(":")
        if name not in ("prompt", "stages", "streams", "replicas", "one", "link"):
            raise SystemExit(f"there is no section '{section}'")
        getattr(bench, name)(*([int(number)] if number else []))


if __name__ == "__main__":
    main()
