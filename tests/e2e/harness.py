"""Starts real caravan processes on loopback for the end-to-end tests, and speaks HTTP to them."""

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXECUTABLE = os.environ.get("CARAVAN_EXECUTABLE", str(ROOT / "build" / "release" / "apps" / "caravan"))
DEMO_MODEL = str(ROOT / "models" / "demo.gguf")
TOKEN = "a token for the end-to-end tests"


def kit_model(name):
    """The path of a model in the conformance kit; skips the test where the kit is absent."""
    folder = pathlib.Path(os.environ.get("CARAVAN_KIT_DIR", ROOT.parent / "shared" / "kit"))
    path = folder / "models" / name
    if not path.exists():
        if os.environ.get("CARAVAN_KIT") == "required":
            raise AssertionError("CARAVAN_KIT=required, but the kit is absent")
        raise unittest.SkipTest("the conformance kit is absent")
    return str(path)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def clean_environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("APP_", "LLAMA_"))}
    return {**env, **more}


def run(*arguments, timeout=60, env=None, prefix=()):
    """Runs caravan to its end; returns the CompletedProcess with text output. prefix: a command that becomes it."""
    return subprocess.run([*prefix, EXECUTABLE, *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=timeout,
                          env=env or clean_environment(), check=False)


class Process:
    """A running caravan whose log is kept. prefix: a command that becomes it."""

    def __init__(self, *arguments, env=None, prefix=()):
        self.lines = []
        self.process = subprocess.Popen([*prefix, EXECUTABLE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, errors="replace", env=env or clean_environment())
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.lines.append(None)
            self.changed.notify_all()

    @property
    def log(self):
        return "".join(line for line in self.lines if line)

    def wait_for(self, pattern, timeout=30):
        """The match of a log line; fails with the log when it does not come."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                for line in self.lines:
                    match = line and re.search(pattern, line)
                    if match:
                        return match
                ended = bool(self.lines) and self.lines[-1] is None
                left = deadline - time.monotonic()
                if ended or left <= 0:
                    raise AssertionError(f"no line with '{pattern}' came; the log:\n{self.log}")
                self.changed.wait(left)

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, timeout=20):
        """SIGTERM; returns the exit status."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"did not stop within {timeout} s; the log:\n{self.log}") from None
        return self.process.returncode


class Backend(Process):
    def __init__(self, port=0, token=TOKEN, mem=512, threads=1, extra=(), host="127.0.0.1", prefix=()):
        environment = clean_environment(**({"APP_RPC_TOKEN": token} if token else {}))
        super().__init__("backend", "--host", host, "--port", port, "--mem", mem, "-t", threads, *extra, env=environment, prefix=prefix)
        self.port = int(self.wait_for(rf"backend on {re.escape(host)}:(\d+)").group(1))
        self.address = f"{host}:{self.port}"


class Server(Process):
    def __init__(self, backends=(), model=DEMO_MODEL, token=TOKEN, extra=(), ready=True, prefix=()):
        environment = clean_environment(**({"APP_RPC_TOKEN": token} if token else {}))
        rpc = ["--rpc", ",".join(b if isinstance(b, str) else b.address for b in backends), "-ngl", "99", "--plan", "memory"] if backends else []
        super().__init__("server", "-m", model, "--host", "127.0.0.1", "--port", 0, "-t", 1, *rpc, *extra, env=environment, prefix=prefix)
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)").group(1))
        if ready:
            self.wait_until_healthy()

    def wait_until_healthy(self, timeout=60):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.alive():
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass  # it has ended
            time.sleep(0.05)
        raise AssertionError(f"the server did not become healthy; the log:\n{self.log}")

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, text)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        result = response.status, response.headers, response.read().decode("utf-8", "replace")
        connection.close()
        return result

    def get(self, path, headers=None):
        status, _, text = self.request("GET", path, headers=headers)
        return status, text

    def post(self, path, body, headers=None):
        status, _, text = self.request("POST", path, body, headers)
        return status, json.loads(text)

    def complete(self, prompt, n_predict=24, **fields):
        status, answer = self.post("/completion", {"prompt": prompt, "n_predict": n_predict, "temperature": 0, **fields})
        assert status == 200, answer
        return answer

    def metric(self, name):
        text = self.get("/metrics")[1]
        return float(re.search(rf"^llamacpp:{name} (\S+)$", text, re.MULTILINE).group(1))


class Stream:
    """A streamed completion, read event by event."""

    def __init__(self, server, prompt, **fields):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"prompt": prompt, "stream": True, "temperature": 0, **fields})
        self.connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()

    def events(self):
        for line in self.response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def leave(self):
        self.connection.sock and self.connection.sock.close()
        self.response.close()
        self.connection.close()


class Listener(threading.Thread):
    """Reads a streamed completion while the test does something else."""

    def __init__(self, server, prompt, **fields):
        super().__init__(daemon=True)
        self.stream = Stream(server, prompt, return_tokens=True, **fields)
        self.tokens, self.times, self.error, self.left = [], [], None, False
        self.start()

    def run(self):
        for event in self.stream.events():
            if "error" in event:
                self.error = event["error"]
            self.times += [time.monotonic()] * len(event.get("tokens", []))
            self.tokens += event.get("tokens", [])
            if self.left:
                break
        self.stream.leave()

    def gap(self, since):
        """The longest time without a token since then, up to now or to the end of the stream."""
        times = [since, *(t for t in self.times if t > since)] + ([time.monotonic()] if self.is_alive() else [])
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)

    def leave(self):
        """Hangs up after the next token; returns all that came."""
        self.left = True
        self.join(60)
        return self.tokens


class Proxy:
    """Passes connections on to a port, which may be set later, at most so many bytes per second in each direction; bytes_per_s may be
    changed, None: no limit."""

    def __init__(self, port=None, bytes_per_s=None):
        self.target, self.bytes_per_s = port, bytes_per_s
        self.n_bytes = 0  # to the port
        self.ends = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self.ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source, sink):
        try:
            while data := source.recv(16384):
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
                self.n_bytes += len(data) if sink.getpeername()[1] == self.target else 0
        except OSError:
            pass
        self._end(source, sink)

    @staticmethod
    def _end(*sockets):
        for end in sockets:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self):
        """Ends the connections there are; others may come."""
        ends, self.ends = self.ends, []
        self._end(*ends)

    def stop(self):
        self._end(self.listener)
        self.listener.close()
        self.cut()


class ClusterTest(unittest.TestCase):
    """Stops every process that a test started, and shows their logs when it failed."""

    def start(self, kind, *arguments, **fields):
        process = kind(*arguments, **fields)
        self.addCleanup(lambda: process.kill() if process.alive() else None)
        return process

    def wait_until(self, condition, timeout=20, message="it did not happen"):
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                self.fail(message)
            time.sleep(0.02)


def split_temporary(name):
    """A path for a file that the test writes."""
    return os.path.join(tempfile.mkdtemp(prefix="caravan-e2e-"), name)
