"""Backends that are killed, stopped and restarted at random while streams run, and what the streams got: for test_chaos.py and bench/chaos.py."""

import dataclasses
import random
import re
import signal
import statistics
import threading
import time

from harness import DEMO_MODEL, Backend, Server, Stream, free_port

PROMPTS = ["Once upon a time there was a fox named Lily.", "Question: What is the capital of France?\nAnswer:",
           "Building a website can be done in 10 simple steps:", "Hello", "2 + 3 =", "The colour of the sky is",
           "A story about a bear named Tom.", "Once"]
RPC_TIMEOUT = 1  # seconds


def request(i):
    """The fields of the i-th request: greedy, sampled, constrained and with probabilities in turn."""
    fields = {"prompt": PROMPTS[i % len(PROMPTS)], "n_predict": 60 + 23 * i % 90, "ignore_eos": True, "seed": i, "return_tokens": True,
              "cache_prompt": i % 5 != 0, "temperature": 0.0 if i % 2 == 0 else 0.9}
    if i % 4 == 3:
        fields["n_probs"] = 2
    if i % 8 == 5:
        fields.update(grammar='root ::= [a-z .,]*', ignore_eos=False)
    return fields


@dataclasses.dataclass
class Result:
    kills: dict
    streams: int
    tokens: int
    wrong: list  # of streams: what differs
    aborts: list
    not_alive: list  # answers of /livez other than 200
    lives: int  # times that it was asked
    recoveries: list  # seconds, as the server logged them
    longest_gap: float  # seconds between two pieces of one stream
    seconds: float
    recomputed: int

    def __str__(self):
        kills = ", ".join(f"{n} {name}" for name, n in self.kills.items())
        times = f"median {statistics.median(self.recoveries):.2f} s, max {max(self.recoveries):.2f} s" if self.recoveries else "none"
        return (f"{sum(self.kills.values())} strikes ({kills}) in {self.seconds:.1f} s under {self.streams} streams with {self.tokens} tokens\n"
                f"recoveries: {len(self.recoveries)}, {times}; longest pause of a stream {self.longest_gap:.2f} s; "
                f"{self.recomputed} tokens computed again\n"
                f"streams with wrong or lost tokens: {len(self.wrong)}, aborts: {len(self.aborts)}; "
                f"/livez was not 200 {len(self.not_alive)} of {self.lives} times")


def read(stream):
    """What an answer consists of, its error if there was one, and the longest time between two events."""
    content, tokens, chosen, error, gap, last = "", [], [], None, 0.0, None
    for event in stream.events():
        now = time.monotonic()
        gap, last = max(gap, now - last if last else 0.0), now
        if "error" in event:
            error = event["error"]
            break
        content += event.get("content", "")
        tokens += event.get("tokens", [])
        chosen += [p["logprob"] for p in event.get("completion_probabilities", [])]
        if event.get("stop"):
            return (content, tokens, chosen, event["tokens_predicted"]), None, gap
    return (content, tokens, chosen, None), error or "the stream ended early", gap


class Chaos:
    """n_kills: times that a backend is sent SIGKILL; beside them some are stopped (SIGSTOP) for a while, and some told to leave (SIGTERM)."""

    def __init__(self, n_kills, n_backends=3, n_streams=8, n_requests=16, seed=1, model=DEMO_MODEL, extra=(), pause=0.5):
        self.random = random.Random(seed)
        self.n_kills, self.n_streams, self.n_requests, self.pause = n_kills, n_streams, n_requests, pause
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.ports = [free_port() for _ in range(n_backends)]
        self.backends = [self._backend(port) for port in self.ports]
        self.restarts = []
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        self.server = Server(addresses, model=model, extra=("-c", 2048, "-np", n_streams, "--rpc-timeout", RPC_TIMEOUT, "--mem", 1, *extra))
        self.wrong, self.aborts, self.gaps, self.n_tokens, self.n_answers = [], [], [], 0, 0
        self.not_alive, self.n_lives = [], 0

    @staticmethod
    def _backend(port):
        return Backend(port=port, mem=256)

    def run(self):
        expected = [read(Stream(self.server, **request(i)))[0] for i in range(self.n_requests)]
        assert all(answer[3] for answer in expected), f"the undisturbed answers are not complete: {expected}"
        clients = [threading.Thread(target=self._client, args=(i, expected)) for i in range(self.n_streams)]
        clients.append(threading.Thread(target=self._watch_life))
        start = time.monotonic()
        for client in clients:
            client.start()
        kills = {"SIGKILL": 0}
        while kills["SIGKILL"] < self.n_kills:
            time.sleep(self.random.uniform(0, self.pause))
            name = self._strike()
            kills[name] = kills.get(name, 0) + 1
        for restart in self.restarts:
            restart.join()
        self.over.set()
        for client in clients:
            client.join()
        recoveries = [float(t) for t in re.findall(r"recovered in ([0-9.]+) s", self.server.log)]
        return Result(kills, self.n_answers, self.n_tokens, self.wrong, self.aborts, self.not_alive, self.n_lives, recoveries, max(self.gaps, default=0.0),
                      time.monotonic() - start, int(self.server.metric("tokens_recomputed_total")))

    def _client(self, first, expected):
        i = first
        while not self.over.is_set():
            number = i % self.n_requests
            i += self.n_streams + 1
            try:
                answer, error, gap = read(Stream(self.server, **request(number)))
            except OSError as failure:
                answer, error, gap = None, repr(failure), 0.0
            with self.lock:
                self.gaps.append(gap)
                self.n_answers += 1
                self.n_tokens += len(answer[1]) if answer else 0
                if error:
                    self.aborts.append(f"request {number}: {error}")
                elif answer != expected[number]:
                    self.wrong.append(f"request {number}: expected {expected[number]}, found {answer}")
            if error and not self.server.alive():
                return

    def _watch_life(self):
        while not self.over.wait(0.05):
            try:
                status, _, text = self.server.request("GET", "/livez", timeout=10)
            except OSError as failure:
                status, text = 0, repr(failure)
            self.n_lives += 1
            if status != 200:
                self.not_alive.append(f"/livez: {status} {text}")
            if not self.server.alive():
                return

    def _strike(self):
        """Hits a backend that runs; returns how."""
        with self.lock:
            alive = [i for i, backend in enumerate(self.backends) if backend]
        while not alive:
            time.sleep(0.01)
            with self.lock:
                alive = [i for i, backend in enumerate(self.backends) if backend]
        i = self.random.choice(alive)
        how = self.random.choices(["SIGKILL", "SIGSTOP", "SIGTERM"], [6, 2, 2])[0]
        delay = self.random.uniform(0, 0.6) if how != "SIGSTOP" else self.random.uniform(0.1, 2 * RPC_TIMEOUT)
        with self.lock:
            backend, self.backends[i] = self.backends[i], None
        if how == "SIGKILL":
            backend.kill()
        else:
            backend.process.send_signal(getattr(signal, how))
        thread = threading.Thread(target=self._restart, args=(i, backend, how, delay))
        thread.start()
        self.restarts.append(thread)
        return how

    def _restart(self, i, backend, how, delay):
        if how == "SIGTERM":
            backend.process.wait(30)
        time.sleep(delay)
        if how == "SIGSTOP":
            backend.process.send_signal(signal.SIGCONT)
        else:
            backend = self._backend(self.ports[i])
        with self.lock:
            self.backends[i] = backend

    def stop(self):
        self.over.set()
        for process in [self.server, *self.backends]:
            if process and process.alive():
                process.kill()
