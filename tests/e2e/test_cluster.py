"""A model split over backend processes: the same answers as alone, and what happens when machines or clients misbehave."""

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

from harness import DEMO_MODEL, TOKEN, Backend, ClusterTest, Listener, Process, Server, Stream, clean_environment, free_port, kit_model, run

PROMPTS = ["Once upon a time there was a fox named Lily.", "Question: What is the capital of France?\nAnswer:",
           "Building a website can be done in 10 simple steps:", "Hello", "2 + 3 =", "The colour of the sky is",
           "A story about a bear named Tom.", "Once"]


class SplitModel(ClusterTest):
    def test_completion_equals_the_local_one_token_for_token(self):
        local = self.start(Server)
        expected = [local.complete(p, return_tokens=True)["tokens"] for p in PROMPTS]
        local.stop()
        backends = [self.start(Backend, threads=1), self.start(Backend, threads=2)]
        server = self.start(Server, backends)
        self.assertEqual([server.complete(p, return_tokens=True)["tokens"] for p in PROMPTS], expected)
        # Sampled answers too: the random stream depends on seed and position only.
        first = server.complete(PROMPTS[0], temperature=1.0, seed=7)["content"]
        self.assertEqual(server.complete(PROMPTS[0], temperature=1.0, seed=7)["content"], first)

    def test_logits_of_a_split_model_are_those_of_the_whole_one_bit_for_bit(self):
        backends = [self.start(Backend, threads=1), self.start(Backend, threads=2)]
        rpc = ",".join(b.address for b in backends)
        tokens = ",".join(str(3 + 17 * i % 250) for i in range(40))
        with tempfile.TemporaryDirectory() as folder:
            whole = pathlib.Path(folder) / "whole"
            self.assertEqual(run("logits", "-m", DEMO_MODEL, "--tokens", tokens, "-t", 1, "-o", whole).returncode, 0)
            expected = whole.read_bytes()
            self.assertGreater(len(expected), 1000)
            result = run("inspect", DEMO_MODEL)
            n_layer = int(next(line.split()[-1] for line in result.stdout.splitlines() if "llama.block_count" in line))
            for cut in range(1, n_layer):
                split = pathlib.Path(folder) / f"split{cut}"
                result = run("logits", "-m", DEMO_MODEL, "--tokens", tokens, "--rpc", rpc, "-ngl", 99, "-ts", f"{cut},{n_layer - cut}",
                             "-ub", 7 + cut, "-o", split, env=clean_environment(APP_RPC_TOKEN=TOKEN))
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(split.read_bytes(), expected, f"cut after layer {cut}")

    def test_eight_clients_at_once_get_what_each_would_get_alone(self):
        server = self.start(Server, [self.start(Backend), self.start(Backend)])
        expected = [server.complete(p)["content"] for p in PROMPTS]
        answers = [None] * len(PROMPTS)

        def ask(i):
            answers[i] = "".join(e["content"] for e in Stream(server, PROMPTS[i], n_predict=24).events())

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(answers, expected)

    def test_a_client_that_leaves_mid_stream_frees_its_place(self):
        server = self.start(Server, [self.start(Backend), self.start(Backend)])
        stream = Stream(server, PROMPTS[0], n_predict=400, ignore_eos=True)
        next(stream.events())
        stream.leave()
        self.wait_until(lambda: server.metric("requests_cancelled_total") == 1, message="the request was not cancelled")
        self.wait_until(lambda: server.metric("requests_processing") == 0)
        self.assertTrue(server.complete("Hello")["content"])

    def test_two_servers_and_two_models_share_a_backend(self):
        backend = self.start(Backend, mem=1024)
        first = self.start(Server, [backend])
        second = self.start(Server, [backend])
        other = self.start(Server, [backend], model=kit_model("real/stories260K.gguf"))
        answer = first.complete(PROMPTS[0])["content"]
        self.assertEqual(second.complete(PROMPTS[0])["content"], answer)
        self.assertTrue(other.complete("Once upon a time")["content"])
        first.kill()
        self.assertEqual(second.complete(PROMPTS[0])["content"], answer)


class SplitArchitectures(ClusterTest):
    """Models of each supported architecture, cut at every layer boundary between two backend processes."""

    TOKENS = "3,17,42,99,7,61,120,5,88,33,12,77,101,64,2,50,9,113,28,71,44,90,15,36"

    def every_cut(self, command, model, read):
        backends = [self.start(Backend, threads=1), self.start(Backend, threads=2)]
        environment = clean_environment(APP_RPC_TOKEN=TOKEN)
        expected = read(command, [])
        listing = run("inspect", model).stdout
        n_layer = int(next(line.split()[-1] for line in listing.splitlines() if ".block_count" in line))
        self.assertGreater(n_layer, 1)
        for cut in range(1, n_layer):
            more = ["--rpc", ",".join(b.address for b in backends), "-ngl", 99, "-ts", f"{cut},{n_layer - cut}", "-t", 1]
            self.assertEqual(read(command, more, environment), expected, f"cut after layer {cut}")

    def check_logits(self, name):
        model = kit_model(name)
        with tempfile.TemporaryDirectory() as folder:
            def read(command, more, env=None):
                path = pathlib.Path(folder) / "logits"
                chunk = 5 if more else 24
                result = run(*command, "-ub", chunk, "-o", path, *more, env=env)
                self.assertEqual(result.returncode, 0, result.stderr)
                return path.read_bytes()
            self.every_cut(["logits", "-m", model, "--tokens", self.TOKENS], model, read)

    def test_llama(self):
        self.check_logits("llama-dense.gguf")

    def test_llama_with_experts(self):
        self.check_logits("llama-moe.gguf")

    def test_gemma3(self):
        self.check_logits("gemma3-dense.gguf")

    def test_qwen3moe(self):
        self.check_logits("qwen3moe-moe.gguf")

    def test_gpt_oss(self):
        self.check_logits("gpt-oss-moe.gguf")

    def test_deepseek2(self):
        self.check_logits("deepseek2-moe.gguf")

    def test_other_decoders(self):
        for arch in ("qwen2", "qwen3", "gemma2", "phi3", "mistral3", "glm4", "command-r", "cohere2", "olmo2", "starcoder2", "falcon",
                     "gpt2", "smollm3", "granite"):
            with self.subTest(arch):
                self.check_logits(f"{arch}-dense.gguf")

    def test_quantised_llama(self):
        self.check_logits("quants/llama-Q4_K_M.gguf")

    def check_embeddings(self, name):
        model = kit_model(name)

        def read(command, more, env=None):
            result = run(*command, *more, env=env)
            self.assertEqual(result.returncode, 0, result.stderr)
            return result.stdout

        self.every_cut(["embedding", "-m", model, "-p", "a fox and a bear", "--embd-output-format", "raw"], model, read)

    def test_bert(self):
        self.check_embeddings("bert-dense.gguf")

    def test_nomic_bert(self):
        self.check_embeddings("nomic-bert-dense.gguf")


class Refusals(ClusterTest):
    def test_a_wrong_or_missing_token_is_named_and_the_backend_lives(self):
        backend = self.start(Backend)
        for token, pattern in (("another token, just as long", "token"), (None, "token")):
            server = self.start(Server, [backend], token=token, ready=False, extra=("--rpc-wait", 2))
            server.wait_for(pattern)
            self.assertEqual(server.process.wait(20), 1, server.log)
        plain = self.start(Backend, token=None)
        server = self.start(Server, [plain], ready=False, extra=("--rpc-wait", 2))
        server.wait_for("does not use a token")
        self.assertEqual(server.process.wait(20), 1, server.log)
        self.assertTrue(self.start(Server, [backend]).complete("Hello")["content"])
        self.assertTrue(backend.alive() and plain.alive())

    def test_a_backend_without_a_token_that_other_machines_reach_says_so(self):
        for host, token, warns in (("0.0.0.0", None, True), ("0.0.0.0", TOKEN, False), ("127.0.0.1", None, False)):
            backend = self.start(Backend, host=host, token=token)
            self.assertEqual(backend.stop(), 0)
            warning = f"warning NO TOKEN IS SET AND {backend.address} IS REACHABLE FROM OTHER MACHINES"
            self.assertEqual(warning in backend.log, warns, backend.log)
            self.assertEqual("NO TOKEN" in backend.log, warns, backend.log)

    def test_garbage_on_the_backends_port_harms_nobody(self):
        backend = self.start(Backend, token=None)
        server = self.start(Server, [backend], token=None)
        expected = server.complete(PROMPTS[0])["content"]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\x16\x03\x01\x00\x05hello", b"", b"\xff" * 64):
            with socket.create_connection(("127.0.0.1", backend.port)) as s:
                s.sendall(garbage)
                s.settimeout(10)
                try:
                    s.shutdown(socket.SHUT_WR)
                    while s.recv(4096):
                        pass
                except OSError:
                    pass
        self.assertTrue(backend.alive())
        self.assertEqual(server.complete(PROMPTS[0])["content"], expected)

    def test_a_model_larger_than_the_caps_is_refused_with_a_table(self):
        backends = [self.start(Backend, mem=1), self.start(Backend, mem=1)]
        server = self.start(Server, backends, ready=False)
        server.wait_for("does not fit")
        self.assertEqual(server.process.wait(20), 1)
        for backend in backends:
            self.assertIn(backend.address, server.log)
            self.assertTrue(backend.alive())

    def test_missing_backends_are_named_when_the_wait_is_over(self):
        nobody = f"127.0.0.1:{free_port()}"
        server = self.start(Server, [nobody], ready=False, extra=("--rpc-wait", 1, "--rpc-exit"))
        self.assertEqual(server.process.wait(30), 1)
        self.assertIn(nobody, server.log)
        # With one that answers and holds the model, the server goes on without the other.
        server = self.start(Server, [self.start(Backend), nobody], extra=("--rpc-wait", 1))
        self.assertIn(nobody, server.log)
        self.assertTrue(server.complete("Hello")["content"])


class Failures(ClusterTest):
    def test_a_backend_started_late_is_waited_for(self):
        port = free_port()
        first = self.start(Backend)
        server = self.start(Server, [first, f"127.0.0.1:{port}"], ready=False)
        server.wait_for("waiting up to 60 s")
        status, text = server.get("/health")
        self.assertEqual((status, "Loading model" in text), (503, True))
        self.assertEqual(server.post("/completion", {"prompt": "x"})[0], 503)
        self.start(Backend, port=port)
        server.wait_until_healthy()
        self.assertTrue(server.complete("Hello")["content"])

    def test_a_server_that_nobody_answers_lives_and_waits_on(self):
        port = free_port()
        names = [f"127.0.0.1:{port}", "nobody.invalid:50052"]
        server = self.start(Server, names, ready=False, extra=("--rpc-wait", 0))
        server.wait_for(r"waiting on for 127\.0\.0\.1:\d+, nobody\.invalid:50052")
        for wanted in ("no backend answered within 0 s", "does not resolve", f"caravan doctor --rpc {','.join(names)}", "--rpc-exit"):
            self.assertIn(wanted, server.log)
        self.assertEqual(server.get("/livez")[0], 200)
        status, text = server.get("/health")
        self.assertEqual((status, "Loading model" in text), (503, True))
        self.start(Backend, port=port)
        server.wait_until_healthy()
        self.assertTrue(server.complete("Hello")["content"])
        idle = self.start(Server, names[1:], ready=False, extra=("--rpc-wait", 0))
        idle.wait_for("waiting on")
        self.assertEqual(idle.stop(), 0, idle.log)

    def test_a_name_that_resolves_late_is_found_at_the_start_and_while_running(self):
        with tempfile.NamedTemporaryFile("w", prefix="caravan-hosts-") as hosts:
            print("127.0.0.1 localhost", file=hosts, flush=True)
            prefix = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts.name]
            if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
                self.skipTest("a file /etc/hosts of its own needs root")
            first, second = self.start(Backend), self.start(Backend)
            names = [f"first.caravan.invalid:{first.port}", f"second.caravan.invalid:{second.port}"]
            server = self.start(Server, names, ready=False, extra=("--rpc-wait", 0), prefix=prefix)
            server.wait_for("waiting on for " + ", ".join(names))
            print("127.0.0.1 first.caravan.invalid", file=hosts, flush=True)
            server.wait_until_healthy()
            self.assertIn("1 device(s)", server.log)
            print("127.0.0.1 second.caravan.invalid", file=hosts, flush=True)
            server.wait_for(r"on 2 device\(s\)")
            self.assertTrue(server.complete("Hello")["content"])

    FIELDS = {"n_predict": 900, "ignore_eos": True, "temperature": 0.8, "seed": 11, "return_tokens": True}

    def expected_and_stream(self, server):
        """What a request gets undisturbed, and the same request running: its events after the first."""
        status, answer = server.post("/completion", {"prompt": PROMPTS[0], **self.FIELDS})
        self.assertEqual((status, len(answer["tokens"])), (200, 900))
        events = Stream(server, PROMPTS[0], **self.FIELDS).events()
        first = next(events)
        return answer["content"], first["content"], events

    def rest_of(self, events):
        text = ""
        for event in events:
            self.assertNotIn("error", event)
            text += event["content"]
            if event["stop"]:
                self.assertEqual(event["tokens_predicted"], 900)
                return text
        self.fail("the stream ended early")

    def test_a_stream_goes_on_exactly_on_what_is_left_after_a_kill(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.start(Server, backends, extra=("-c", 1024))
        expected, first, events = self.expected_and_stream(server)
        backends[1].kill()
        self.assertEqual(first + self.rest_of(events), expected)
        self.assertIn(backends[1].address, server.log)
        self.assertEqual(server.metric("plans_lost_total"), 1)
        self.assertGreater(server.metric("tokens_recomputed_total"), 0)
        # The one that returns is taken in again, without a loss.
        backends[1] = self.start(Backend, port=backends[1].port)
        server.wait_for(rf"{backends[1].address} has come")
        self.wait_until(lambda: server.log.count("on 2 device(s)") == 2, message="the returned backend got no layers")
        self.assertEqual(server.complete(PROMPTS[0], **self.FIELDS)["content"], expected)
        self.assertEqual(server.metric("plans_lost_total"), 1)

    # A stream that a test leaves when it has seen enough; what came is compared with an answer of that length.
    LONG = {"n_predict": 30000, "ignore_eos": True, "temperature": 0.8, "seed": 11}
    ROOM = ("-c", 32768, "-np", 1)

    def check_and_leave(self, server, stream, prompt=PROMPTS[0]):
        """Waits for another hundred tokens; all must be those of an undisturbed answer."""
        n = len(stream.tokens)
        self.wait_until(lambda: len(stream.tokens) >= n + 100 or not stream.is_alive(), 60, "the stream does not go on")
        tokens = stream.leave()
        self.assertIsNone(stream.error)
        self.assertGreaterEqual(len(tokens), n + 100, "the stream ended before the test did")
        answer = server.complete(prompt, **{**self.LONG, "n_predict": len(tokens)}, return_tokens=True)
        self.assertEqual(tokens, answer["tokens"])

    def test_a_killed_backend_is_noticed_by_its_closed_connection(self):
        backends = [self.start(Backend) for _ in range(3)]
        # Missed heartbeats would tell after five seconds (a neighbour) or thirty (the server).
        server = self.start(Server, backends, extra=(*self.ROOM, "--rpc-timeout", 30))
        stream = Listener(server, PROMPTS[0], **self.LONG)
        took = []
        for n, backend in enumerate(backends[:2], 1):
            self.wait_until(lambda n=n: len(stream.tokens) >= 20 * n, message="the stream does not go on")
            backend.kill()
            start = time.monotonic()
            self.wait_until(lambda n=n: server.log.count("the plan is lost") == n, message="the loss was not noticed")
            took.append(time.monotonic() - start)
            self.wait_until(lambda n=n: server.log.count("recovered in") == n, message="no new plan")
        self.assertEqual(server.metric("plans_lost_total"), 2)
        self.assertLess(min(took), 1)
        self.assertLess(max(took), 10)  # a busy machine's allowance
        self.check_and_leave(server, stream)

    def test_a_backend_that_comes_late_is_taken_in_while_a_stream_goes_on(self):
        late = f"127.0.0.1:{free_port()}"
        server = self.start(Server, [self.start(Backend), late], extra=(*self.ROOM, "--rpc-wait", 1))
        self.assertIn("on 1 device(s)", server.log)
        stream = Listener(server, PROMPTS[0], **self.LONG)
        self.wait_until(lambda: len(stream.tokens) >= 20)
        self.start(Backend, port=int(late.split(":")[1]))
        server.wait_for(rf"{late} has come")
        server.wait_for(r"on 2 device\(s\)")
        self.check_and_leave(server, stream)
        for lost in ("plans_lost_total", "replicas_lost_total"):
            self.assertEqual(server.metric(lost), 0, server.log)
        self.assertGreater(server.metric("tokens_recomputed_total"), 0, "the stream ended before the plan changed")

    def test_a_plan_for_speed_is_made_again_on_what_is_left_after_a_kill(self):
        # The context's cache takes 60 MiB: two backends hold it, and one of the three may go.
        backends = {b.address: b for b in (self.start(Backend, mem=48) for _ in range(3))}
        server = self.start(Server, list(backends.values()), extra=("-c", 24576, "-np", 1, "--mem", 1, "--plan", "auto"))
        used = re.findall(r"^(127\.0\.0\.1:\d+) +\d+-\d+ +(?:server|direct)", server.log, re.MULTILINE)
        self.assertGreater(len(used), 1, server.log)
        self.assertIn("predicted: ", server.log)
        expected, first, events = self.expected_and_stream(server)
        backends[used[-1]].kill()
        self.assertEqual(first + self.rest_of(events), expected)
        self.assertEqual(server.metric("plans_lost_total"), 1)
        self.assertGreaterEqual(server.log.count("predicted: "), 2, server.log)
        # Now both that are left are needed: requests wait while one of them is gone.
        expected, first, events = self.expected_and_stream(server)
        other = backends[used[0]]
        other.kill()
        self.wait_until(lambda: server.get("/health")[0] == 503)
        self.start(Backend, mem=48, port=other.port)
        self.assertEqual(first + self.rest_of(events), expected)

    def test_requests_wait_for_a_backend_that_returns(self):
        backend = self.start(Backend)
        server = self.start(Server, [backend], extra=("-c", 1024, "--mem", 1))
        expected, first, events = self.expected_and_stream(server)
        backend.kill()
        self.wait_until(lambda: server.get("/health")[0] == 503, message="the server did not say that it has no plan")
        self.assertIn(backend.address, server.get("/health")[1])
        self.assertEqual(server.get("/livez")[0], 200)
        late = []
        client = threading.Thread(target=lambda: late.append(server.complete(PROMPTS[0], **self.FIELDS)["content"]))
        client.start()
        self.wait_until(lambda: server.metric("requests_deferred") == 2)
        self.start(Backend, port=backend.port)
        self.assertEqual(first + self.rest_of(events), expected)
        client.join()
        self.assertEqual(late, [expected])
        self.assertEqual(server.get("/health")[0], 200)

    def test_what_finds_no_plan_in_time_gets_an_error_that_says_why(self):
        backend = self.start(Backend)
        server = self.start(Server, [backend], extra=("-c", 1024, "--mem", 1, "--recovery-timeout", 1))
        _, _, events = self.expected_and_stream(server)
        backend.kill()
        last = list(events)[-1]
        self.assertEqual(last["error"]["code"], 503)
        self.assertIn(backend.address, last["error"]["message"])
        status, answer = server.post("/completion", {"prompt": "x"})
        self.assertEqual(status, 503)
        self.assertIn("--recovery-timeout", answer["error"]["message"])
        self.assertEqual(server.get("/livez")[0], 200)
        self.start(Backend, port=backend.port)
        server.wait_until_healthy()
        self.assertTrue(server.complete("Hello")["content"])

    def test_a_stopped_backend_that_wakes_after_the_new_plan_changes_nothing(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.start(Server, backends, extra=("-c", 1024, "--rpc-timeout", 0.5))
        expected, first, events = self.expected_and_stream(server)
        backends[0].process.send_signal(signal.SIGSTOP)
        try:
            self.assertEqual(first + self.rest_of(events), expected)
            self.assertIn("missed heartbeats", server.log)
        finally:
            backends[0].process.send_signal(signal.SIGCONT)
        server.wait_for(rf"{backends[0].address} has come")
        self.assertEqual(server.complete(PROMPTS[0], **self.FIELDS)["content"], expected)
        self.assertEqual(server.metric("plans_lost_total"), 1)
        self.assertTrue(backends[0].alive())


    def test_a_server_that_was_killed_finds_its_weights_warm(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.start(Server, backends)
        expected = server.complete(PROMPTS[0])["content"]
        server.kill()
        server = self.start(Server, backends)
        self.assertEqual(server.complete(PROMPTS[0])["content"], expected)
        for backend in backends:
            self.assertEqual(len(re.findall(r"loaded: shares", backend.log)), 1, backend.log)

    def test_a_server_goes_on_without_a_name_that_does_not_resolve(self):
        backend = self.start(Backend)
        server = self.start(Server, [f"localhost:{backend.port}", "nobody.invalid:50052"], extra=("--rpc-wait", 1))
        self.assertIn("nobody.invalid", server.log)
        self.assertTrue(server.complete("Hello")["content"])

    def test_two_servers_that_lose_a_backend_both_go_on(self):
        backends = [self.start(Backend, mem=64), self.start(Backend, mem=64)]
        servers = [self.start(Server, backends, extra=("-c", 1024, "--mem", 1)) for _ in range(2)]
        running = [self.expected_and_stream(server) for server in servers]
        backends[0].kill()
        for expected, first, events in running:
            self.assertEqual(first + self.rest_of(events), expected)

    def test_streams_on_stages_that_are_left_go_on_while_another_server_loses_its_plan(self):
        shared, killed = self.start(Backend, mem=1024), self.start(Backend)
        # Nobody would miss heartbeats: what waits for the dead one waits for long.
        patient = (*self.ROOM, "--rpc-timeout", 30, "--mem", 1)
        loses = self.start(Server, [shared, killed], extra=patient)
        others = [self.start(Server, [shared], extra=patient),
                  self.start(Server, [shared], model=kit_model("llama-dense.gguf"), extra=patient)]
        prompts = [PROMPTS[0], list(range(3, 20))]
        streams = [Listener(server, prompt, **self.LONG) for server, prompt in zip(others, prompts)]
        hit = Listener(loses, PROMPTS[0], **self.LONG)
        for stream in (*streams, hit):
            self.wait_until(lambda stream=stream: len(stream.tokens) >= 20)
        struck = time.monotonic()
        killed.kill()
        loses.wait_for("recovered in")
        gaps = [stream.gap(struck) for stream in streams]
        self.assertLess(max(gaps), 5, "a stream paused that had nothing to do with the loss")
        for server, stream, prompt in zip(others, streams, prompts):
            self.check_and_leave(server, stream, prompt)
            self.assertEqual(server.metric("plans_lost_total"), 0)
            self.assertEqual(server.metric("tokens_recomputed_total"), 0)
        self.check_and_leave(loses, hit)
        self.assertEqual(loses.metric("plans_lost_total"), 1)


class SlowPrompt:
    """For a ClusterTest: a prompt that takes a second or so, and something that happens meanwhile."""

    PROMPT = [3 + (17 * i + i * i) % 500 for i in range(1500)]
    FIELDS = {"n_predict": 16, "ignore_eos": True, "temperature": 1.0, "seed": 5, "cache_prompt": False, "return_tokens": True}

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="caravan-prompt-")
        cls.addClassCleanup(folder.cleanup)
        cls.model = str(pathlib.Path(folder.name) / "slow.gguf")
        result = run("synth", "--shape", "tinyllama-1.1b", "--layers", 2, "--vocab", 512, "--type", "Q4_0", "-o", cls.model)
        assert result.returncode == 0, result.stderr

    def serve(self, backends, *extra):
        return self.start(Server, backends, model=self.model, extra=("-c", 2048, "-np", 1, "-ub", 32, "--mem", 1, *extra))

    def check(self, server, strike):
        """The answer when strike() comes early in the prompt must be the undisturbed one."""
        expected = server.complete(self.PROMPT, **self.FIELDS)["tokens"]
        self.assertEqual(len(expected), 16)
        self.assertEqual(server.metric("plans_lost_total"), 0)
        tokens, progress, struck = [], [], False
        for event in Stream(server, self.PROMPT, return_progress=True, **self.FIELDS).events():
            self.assertNotIn("error", event)
            tokens += event.get("tokens", [])
            if "prompt_progress" in event:
                progress.append(event["prompt_progress"]["processed"])
            if not struck:
                struck = True
                self.assertEqual(tokens, [])
                self.assertLess(progress[-1], len(self.PROMPT) / 2)
                strike()
                server.wait_for("the plan is lost", timeout=60)
        self.assertEqual(tokens, expected)
        self.assertEqual(progress[-1], len(self.PROMPT))
        self.assertEqual(server.metric("plans_lost_total"), 1)


class FailuresDuringThePrompt(SlowPrompt, ClusterTest):
    def test_a_killed_backend(self):
        backends = [self.start(Backend), self.start(Backend)]
        self.check(self.serve(backends), backends[1].kill)

    def test_a_stopped_backend_that_wakes_later(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.serve(backends, "--rpc-timeout", 1)
        self.check(server, lambda: backends[0].process.send_signal(signal.SIGSTOP))
        self.assertIn("missed heartbeats", server.log)
        backends[0].process.send_signal(signal.SIGCONT)
        server.wait_for(rf"{backends[0].address} has come")

    def test_a_backend_that_is_started_again(self):
        backend = self.start(Backend)

        def restart():
            backend.kill()
            self.start(Backend, port=backend.port)

        self.check(self.serve([backend]), restart)


class Leaving(ClusterTest):
    LONG, ROOM, check_and_leave = Failures.LONG, Failures.ROOM, Failures.check_and_leave

    def test_a_backend_on_sigterm_hands_over_while_streams_go_on(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.start(Server, backends, extra=("-c", 1024))
        fields = {"n_predict": 900, "ignore_eos": True, "temperature": 0}
        expected = server.complete(PROMPTS[0], **fields)["content"]
        events = Stream(server, PROMPTS[0], **fields).events()
        first = next(events)["content"]
        self.assertEqual(backends[0].stop(timeout=8), 0, backends[0].log)
        rest = list(events)
        self.assertEqual(first + "".join(event["content"] for event in rest), expected)
        self.assertTrue(rest[-1]["stop"])
        self.assertEqual(server.metric("plans_lost_total"), 0, server.log)
        self.assertIn("is about to leave", server.log)

    def test_a_backend_whose_layers_fit_nowhere_else_stops_after_the_drain_timeout(self):
        backend = self.start(Backend, extra=("--drain-timeout", 1))
        server = self.start(Server, [backend], extra=(*self.ROOM, "--mem", 1))
        stream = Listener(server, PROMPTS[0], **self.LONG)
        self.wait_until(lambda: len(stream.tokens) >= 20)
        start = time.monotonic()
        self.assertEqual(backend.stop(), 0, backend.log)
        took = time.monotonic() - start
        self.assertGreater(took, 0.9, "it did not wait for its layers to go elsewhere")
        self.assertLess(took, 6)  # the default would be eight
        self.wait_until(lambda: server.get("/health")[0] == 503)
        self.assertEqual(server.get("/livez")[0], 200)
        # What was on it goes on when it is back.
        self.start(Backend, port=backend.port)
        server.wait_for("recovered in")
        self.check_and_leave(server, stream)

    def test_an_idle_backend_leaves_at_once(self):
        backend = self.start(Backend)
        start = time.monotonic()
        self.assertEqual(backend.stop(), 0, backend.log)
        self.assertLess(time.monotonic() - start, 5)  # within a second, but for a busy machine


class Stopping(ClusterTest):
    def test_sigterm_lets_running_requests_finish(self):
        server = self.start(Server, [self.start(Backend), self.start(Backend)])
        stream = Stream(server, PROMPTS[0], n_predict=100, ignore_eos=True)
        events = stream.events()
        next(events)
        status = []
        stopper = threading.Thread(target=lambda: status.append(server.stop()))
        stopper.start()
        last = list(events)[-1]
        self.assertTrue(last.get("stop"), last)
        self.assertEqual(last["tokens_predicted"], 100)
        stopper.join()
        self.assertEqual(status, [0], server.log)

    def test_a_backend_stops_on_sigterm_with_status_0(self):
        backend = self.start(Backend)
        self.start(Server, [backend])
        self.assertEqual(backend.stop(), 0, backend.log)

    def test_a_server_stops_on_sigterm_while_a_backend_does_not_answer(self):
        backend = self.start(Backend)
        late = free_port()
        server = self.start(Server, [backend, f"127.0.0.1:{late}"], extra=["--rpc-wait", "0"])
        with socket.create_server(("127.0.0.1", late)) as silent:
            connection, _ = silent.accept()
            start = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - start, 4)  # a handshake may take five
            connection.close()

    def test_a_server_that_is_loading_stops_on_sigterm(self):
        server = self.start(Server, [f"127.0.0.1:{free_port()}"], ready=False)
        server.wait_for("waiting up to")
        start = time.monotonic()
        self.assertEqual(server.stop(), 0, server.log)
        self.assertLess(time.monotonic() - start, 5)


class Containers(ClusterTest):
    def test_app_mode_and_its_variables_start_backend_and_server(self):
        port, http_port = free_port(), free_port()
        backend = self.start(Process, env=clean_environment(APP_MODE="backend", APP_BIND="127.0.0.1", APP_PORT=str(port), APP_MEM="256"))
        backend.wait_for(f"backend on 127.0.0.1:{port}")
        server = self.start(Process, env=clean_environment(
            APP_MODE="server", APP_BIND="127.0.0.1", APP_PORT=str(http_port), APP_MODEL=DEMO_MODEL, APP_REPEAT_PENALTY="1.1",
            APP_GPU_LAYERS="99", APP_RPC_BACKENDS=f"127.0.0.1:{port}"))
        server.wait_for("listening on")
        self.wait_until(lambda: run("health", "--port", http_port).returncode == 0)


if __name__ == "__main__":
    unittest.main()
