"""What the images run: caravan entrypoint, the health check, and the token, as real processes."""

import os
import signal
import subprocess
import tempfile
import unittest

import harness
from harness import ClusterTest, Process, clean_environment, free_port, run

TOKEN = "a token for the end-to-end tests"


class Entrypoint(ClusterTest):
    def container(self, *arguments, **variables):
        environment = clean_environment(APP_BIND="127.0.0.1", **{name: str(value) for name, value in variables.items()})
        return self.start(Process, "entrypoint", *arguments, env=environment)

    def health(self, *arguments, **variables):
        return run("health", *arguments, env=clean_environment(**{name: str(value) for name, value in variables.items()}))

    def test_a_backend_and_a_server_answer_by_variables_alone(self):
        backend_port, port = free_port(), free_port()
        backend = self.container(APP_PORT=backend_port, APP_MEM=256, APP_RPC_TOKEN=TOKEN, APP_THREADS=1)
        backend.wait_for(r"backend on 127\.0\.0\.1")
        server = self.container("--parallel", "2", APP_MODE="server", APP_PORT=port, APP_RPC_TOKEN=TOKEN, APP_THREADS=1,
                                APP_MODEL=harness.DEMO_MODEL, APP_RPC_BACKENDS=f" 127.0.0.1:{backend_port} ,")
        server.port = port
        server.wait_for("listening on")
        self.wait_until(lambda: self.health(APP_PORT=port).returncode == 0, message=server.log)
        status, answer = harness.Server.post(_Requests(port), "/completion", {"prompt": "Once upon", "n_predict": 8})
        self.assertEqual(status, 200)
        self.assertEqual(answer["tokens_predicted"], 8)

        found = self.health("--backend", APP_PORT=backend_port, APP_RPC_TOKEN=TOKEN)
        self.assertEqual(found.returncode, 0, found.stderr)
        self.assertNotIn("health check", backend.log)
        self.assertNotEqual(self.health("--backend", APP_PORT=backend_port, APP_RPC_TOKEN="another token, as long").returncode, 0)
        for process in (server, backend):
            self.assertEqual(process.stop(), 0, process.log)
        self.assertNotEqual(self.health("--backend", APP_PORT=backend_port, APP_RPC_TOKEN=TOKEN).returncode, 0)

    def test_a_server_without_backends_computes_itself(self):
        port = free_port()
        server = self.container(APP_MODE="server", APP_PORT=port, APP_RPC_BACKENDS="", APP_MODEL=harness.DEMO_MODEL)
        self.wait_until(lambda: self.health(APP_PORT=port).returncode == 0, message=server.log)
        self.assertEqual(server.stop(), 0)

    def test_mode_none_waits_until_sigterm(self):
        waiting = self.container(APP_MODE="none")
        waiting.wait_for("waiting")
        self.assertTrue(waiting.alive())
        self.assertEqual(waiting.stop(), 0)

    def test_process_1_ends_with_0_on_sigterm(self):
        if os.geteuid() != 0:
            self.skipTest("a process 1 of its own needs root")
        for variables in ({"APP_MODE": "none"}, {"APP_MODE": "backend", "APP_BIND": "127.0.0.1", "APP_PORT": "0"},
                          {"APP_MODE": "server", "APP_BIND": "127.0.0.1", "APP_PORT": "0", "APP_MODEL": harness.DEMO_MODEL}):
            with self.subTest(variables["APP_MODE"]):
                process = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", harness.EXECUTABLE, "entrypoint"],
                                           env=clean_environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.addCleanup(process.stdout.close)
                self.addCleanup(process.kill)
                self.assertTrue(process.stdout.readline())
                with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as children:
                    first = int(children.read().split()[0])
                os.kill(first, signal.SIGTERM)
                self.assertEqual(process.wait(20), 0)

    def test_wrong_variables_are_named(self):
        for variables, expected in (({"APP_MODE": "backends"}, "APP_MODE='backends'"), ({"APP_PORT": "http"}, "APP_PORT='http'"),
                                    ({"APP_MODE": "server", "LLAMA_ARG_NUMA": "isolate"}, "LLAMA_ARG_NUMA='isolate'"),
                                    ({"APP_RPC_TOKEN_FILE": "/no/file"}, "APP_RPC_TOKEN_FILE='/no/file'"),
                                    ({"APP_BIND": "nowhere.invalid"}, "--host or APP_BIND: an address of this machine"),
                                    ({"APP_MODE": "server", "APP_MODEL": "/no.gguf"}, "APP_MODEL: a GGUF file that this user can read"),
                                    ({"APP_MODELS_DIR": "/no/folder"}, "APP_MODELS_DIR: a folder that this user can read"),
                                    ({"APP_CACHE_DIR": "/proc/no"}, "APP_CACHE_DIR: a folder that this user can write to")):
            result = run("entrypoint", env=clean_environment(**variables))
            self.assertEqual(result.returncode, 1)
            self.assertIn(expected, result.stderr)
            for value in variables.values():
                self.assertTrue(value in result.stderr or value == "server", result.stderr)

    def test_arguments_are_passed_on_and_tools_run(self):
        result = run("entrypoint", "--port", "1", "--print-config", env=clean_environment(APP_MODE="server", APP_RPC_BACKNDS="a"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("--port 1\n", result.stdout)
        self.assertIn("did you mean APP_RPC_BACKENDS?", result.stderr)
        result = run("entrypoint", "/app/llama-cli", "-m", harness.DEMO_MODEL, "-p", "Once upon", "-n", "4", "-no-cnv")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.startswith("Once upon"))
        self.assertIn("APP_RPC_BACKENDS", run("entrypoint", "--help").stdout)


class _Requests:
    """Enough of a Server for harness.Server's requests."""

    def __init__(self, port):
        self.port = port

    request = harness.Server.request


class Token(unittest.TestCase):
    def test_tokens_are_random_and_files_are_kept_unless_one_is_given(self):
        first, second = run("token").stdout.strip(), run("token").stdout.strip()
        self.assertRegex(first, r"^[A-Za-z0-9_-]{43}$")
        self.assertNotEqual(first, second)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "token")
            self.assertEqual(run("token", "--file", path).returncode, 0)
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            with open(path, encoding="ascii") as file:
                kept = file.read()
            self.assertEqual(run("token", "--file", path).returncode, 0)
            with open(path, encoding="ascii") as file:
                self.assertEqual(file.read(), kept)
            self.assertEqual(run("token", "--file", path, env=clean_environment(APP_RPC_TOKEN="given " * 4)).returncode, 0)
            with open(path, encoding="ascii") as file:
                self.assertEqual(file.read(), "given " * 4 + "\n")
            self.assertEqual(run("token", "--file", os.path.join(folder, "none", "token")).returncode, 1)


class Dockerfile(unittest.TestCase):
    def test_the_platforms_are_left_to_the_builder(self):
        # BuildKit before 2024 empties a platform that is declared before the first FROM.
        lines = (harness.ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("FROM "))
        self.assertIn("--platform=$BUILDPLATFORM", lines[first])
        for line in lines[:first]:
            self.assertNotRegex(line, r"^ARG (BUILD|TARGET)(PLATFORM|ARCH|OS|VARIANT)")


class ImageNames(unittest.TestCase):
    def test_latest_never_moves_backwards(self):
        script = harness.ROOT / "scripts" / "image_is_newer.sh"
        for new, current, moves in (("v1.2.3", "v1.2.2", True), ("v1.10.0", "1.9.9", True), ("v1.2.2", "v1.10.0", False),
                                    ("v2.0-rc1", "v1.0", False), ("v1.0", "", True), ("v1.0", "nightly", True)):
            result = subprocess.run([script, new, current], capture_output=True, text=True, check=False)
            self.assertEqual(result.returncode, 0 if moves else 1, f"{new} over {current}: {result.stdout}")
