#!/usr/bin/env python3
"""Tries an image from its mounted file system: image_smoke.py ROOT CONFIG.json PLATFORM

CONFIG.json is what `buildah inspect` says of it. Each process runs as the image says, as
process 1 of its own namespace, its root file system read-only, the volumes empty, no capabilities and no way to gain any.
Needs root. Exits 1 at the first thing that is not as it should be.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

ROOT, PLATFORM = sys.argv[1], sys.argv[3]
CONFIG = json.loads(pathlib.Path(sys.argv[2]).read_text())["Docker"]["config"]
# Runs as process 1 of new namespaces, then becomes the image's entrypoint.
SETUP = """
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/app/cache"
mount -t tmpfs tmpfs "$ROOT/app/models"
mount -o remount,bind,ro "$ROOT"
unset ROOT SETUP_USER OLDPWD PWD SHLVL _
exec setpriv --no-new-privs chroot --userspec=%s "%s" "$@"
""" % (CONFIG["User"], ROOT)


def check(condition, message):
    if not condition:
        raise SystemExit(f"{PLATFORM}: {message}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Container:
    """The image's entrypoint with arguments and variables; what it prints is kept."""

    def __init__(self, *arguments, **variables):
        self.environment = {**dict(entry.split("=", 1) for entry in CONFIG["Env"]), **{k: str(v) for k, v in variables.items()}}
        command = [*CONFIG["Entrypoint"], *(arguments or CONFIG.get("Cmd") or [])]
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SETUP, "sh", *command],
            env={**self.environment, "ROOT": ROOT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self.log = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.log += line

    def wait_for(self, pattern, timeout=120):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            match = re.search(pattern, self.log)
            if match:
                return match
            check(self.process.poll() is None, f"ended with {self.process.returncode}; it printed:\n{self.log}")
            time.sleep(0.05)
        raise SystemExit(f"{PLATFORM}: no '{pattern}' within {timeout} s; it printed:\n{self.log}")

    def pid(self):
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def execute(self, *command):
        """As `docker exec`: (status, output)."""
        result = subprocess.run(
            ["nsenter", "--target", str(self.pid()), "--mount", "--pid", "chroot", f"--userspec={CONFIG['User']}", ROOT, *command],
            env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        return result.returncode, result.stdout + result.stderr

    def stop(self):
        """SIGTERM to process 1: (status, seconds)."""
        start = time.monotonic()
        os.kill(self.pid(), signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{PLATFORM}: SIGTERM is ignored; it printed:\n{self.log}") from None
        return status, time.monotonic() - start

    def kill(self):
        if self.process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # what changed its user does not end with its parent
                os.kill(self.pid(), signal.SIGKILL)
            self.process.kill()
            self.process.wait()


def ask(port, body, stream=False):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if stream:
        return response
    check(response.status == 200, f"/completion answered {response.status}")
    return json.loads(response.read())["content"]


def wait_until_healthy(container, port, timeout=300):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        check(container.process.poll() is None, f"ended with {container.process.returncode}; it printed:\n{container.log}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{PLATFORM}: not healthy within {timeout} s; it printed:\n{container.log}")


def check_confinement(container, what):
    status = pathlib.Path(f"/proc/{container.pid()}/status").read_text()
    check(re.search(r"^Uid:\s+10001\s+10001\s+10001", status, re.MULTILINE), f"{what} does not run as user 10001")
    check(re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), f"{what} has capabilities")
    check(re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE), f"{what} is not process 1")


def check_health(container, what):
    status, output = container.execute(*CONFIG["Healthcheck"]["Test"][1:])
    check(status == 0, f"the health check of the {what} says {status}: {output}")
    print(f"  health of the {what}: {output.strip()}")


def check_stop(container, what, limit=10):
    status, seconds = container.stop()
    check(status == 0, f"the {what} ended with {status} after SIGTERM; it printed:\n{container.log}")
    check(seconds < limit, f"the {what} took {seconds:.1f} s to stop")
    print(f"  SIGTERM: the {what} ended with 0 after {seconds:.2f} s")


PROMPT = {"prompt": "Once upon a time there was a fox named Lily.", "n_predict": 16, "temperature": 0}


def try_cluster(containers):
    """Two backends and a server that finds them; returns the answer."""
    token = "an image's smoke test"
    ports = [free_port(), free_port()]
    for port in ports:
        containers.append(Container(APP_BIND="127.0.0.1", APP_PORT=port, APP_RPC_TOKEN=token, APP_MEM=256, APP_THREADS=1))
    for backend in containers:
        backend.wait_for(r"backend on 127\.0\.0\.1:\d+")
        check_confinement(backend, "the backend")
        check_health(backend, "backend")
    http_port = free_port()
    server = Container(APP_MODE="server", APP_BIND="127.0.0.1", APP_PORT=http_port, APP_RPC_TOKEN=token, APP_THREADS=1,
                       APP_RPC_BACKENDS=",".join(f"127.0.0.1:{port}" for port in ports))
    containers.append(server)
    wait_until_healthy(server, http_port)
    check_confinement(server, "the server")
    check_health(server, "server")
    answer = ask(http_port, PROMPT)
    print(f"  over two backends: {PROMPT['prompt']}{answer}")

    stream = ask(http_port, {**PROMPT, "n_predict": 100000, "ignore_eos": True, "stream": True}, stream=True)
    check(stream.readline().startswith(b"data: "), "no stream began")
    check_stop(server, "server with a running stream")
    for backend in containers[:2]:
        check_stop(backend, "backend")
    return answer


def main():
    containers = []
    try:
        answer = try_cluster(containers)
        port = free_port()
        alone = Container("--parallel", "1", APP_MODE="server", APP_BIND="127.0.0.1", APP_PORT=port, APP_THREADS=1)
        containers.append(alone)
        wait_until_healthy(alone, port)
        check(ask(port, PROMPT) == answer, "a server without backends answers otherwise")
        check_stop(alone, "idle server", 10 if PLATFORM != "amd64" else 1)
        waiting = Container(APP_MODE="none")
        containers.append(waiting)
        waiting.wait_for("waiting")
        check_health(waiting, "container that waits")
        status, output = waiting.execute("/app/llama-cli", "-p", "Once upon a time", "-n", "8", "--temp", "0", "-m", "/app/share/demo.gguf")
        check(status == 0, f"llama-cli says {status}: {output}")
        check_stop(waiting, "container that waits", 10 if PLATFORM != "amd64" else 1)
        wrong = Container(APP_MODE="backend", APP_PORT="http")
        containers.append(wrong)
        check(wrong.process.wait(60) == 1, "a wrong APP_PORT is accepted")
        wrong.reader.join()
        check("APP_PORT='http'" in wrong.log, f"a wrong APP_PORT is not named: {wrong.log}")
    finally:
        for container in containers:
            container.kill()


if __name__ == "__main__":
    main()
