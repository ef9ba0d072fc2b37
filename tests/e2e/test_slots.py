"""Slots, their files, the shift of a full context, and what carries HTTP: of real servers, also over a cluster."""

import http.client
import json
import os
import pathlib
import socket
import ssl
import tempfile

from harness import ROOT, Backend, ClusterTest, Process, Server, clean_environment, run, DEMO_MODEL

STORY = "Once upon a time there was a fox named Lily. She lived in a small house near the river."


class Slots(ClusterTest):
    def check_saved_slots(self, folder, backends):
        server = self.start(Server, backends, extra=("--slot-save-path", folder))
        first = server.complete(STORY, id_slot=1)
        self.assertEqual((first["id_slot"], first["timings"]["cache_n"]), (1, 0))
        saved = server.post("/slots/1?action=save", {"filename": "story.bin"})[1]
        self.assertGreater(saved["n_saved"], first["tokens_evaluated"])
        self.assertEqual(saved["n_written"], os.path.getsize(os.path.join(folder, "story.bin")))
        server.stop()
        # Another server goes on from the file.
        server = self.start(Server, backends, extra=("--slot-save-path", folder))
        restored = server.post("/slots/0?action=restore", {"filename": "story.bin"})[1]
        self.assertEqual(restored["n_restored"], saved["n_saved"])
        again = server.complete(STORY, id_slot=0)
        self.assertEqual(again["timings"]["prompt_n"], 1)
        self.assertEqual(again["content"], first["content"])
        self.assertGreater(server.post("/slots/0?action=erase", {})[1]["n_erased"], 0)
        self.assertEqual(server.complete(STORY)["timings"]["cache_n"], 0)
        slots = json.loads(server.get("/slots")[1])
        self.assertTrue(any(slot.get("n_prompt_tokens") for slot in slots))

    def test_a_slot_is_saved_and_restored_by_another_server(self):
        with tempfile.TemporaryDirectory() as folder:
            self.check_saved_slots(folder, [])

    def test_a_slot_is_saved_and_restored_over_a_cluster(self):
        with tempfile.TemporaryDirectory() as folder:
            self.check_saved_slots(folder, [self.start(Backend), self.start(Backend)])

    def test_a_full_context_ends_the_answer_or_shifts(self):
        server = self.start(Server, extra=("-c", "64", "-np", "1"))
        ended = server.complete(STORY, n_predict=200, ignore_eos=True)
        self.assertEqual((ended["stop_type"], ended["truncated"]), ("limit", True))
        self.assertLess(ended["tokens_predicted"], 64)
        server.stop()
        server = self.start(Server, extra=("-c", "64", "-np", "1", "--context-shift"))
        shifted = server.complete(STORY, n_predict=200, ignore_eos=True, n_keep=8)
        self.assertEqual((shifted["tokens_predicted"], shifted["stop_type"], shifted["truncated"]), (200, "limit", True))
        self.assertTrue(shifted["content"].startswith(ended["content"][:20]))


class Transports(ClusterTest):
    def test_https_with_a_certificate(self):
        data = ROOT / "tests" / "data"
        server = Process("server", "-m", DEMO_MODEL, "--host", "127.0.0.1", "--port", 0, "-t", 1, "--ssl-cert-file",
                         data / "tls_certificate.pem", "--ssl-key-file", data / "tls_key.pem", env=clean_environment())
        self.addCleanup(server.kill)
        port = int(server.wait_for(r"listening on https://127\.0\.0\.1:(\d+)").group(1))
        trust = ssl.create_default_context(cafile=str(data / "tls_certificate.pem"))

        def get(path):
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=30)
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
            connection.close()
            return response.status, response.headers, text

        self.wait_until(lambda: get("/health")[0] == 200)
        status, headers, text = get("/v1/models")
        self.assertEqual((status, headers["Server"]), (200, "llama.cpp"))
        self.assertEqual(json.loads(text)["object"], "list")

    def test_a_unix_socket(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "caravan.sock")
            server = Process("server", "-m", DEMO_MODEL, "--host", path, "-t", 1, env=clean_environment())
            self.addCleanup(lambda: server.kill() if server.alive() else None)
            server.wait_for(r"listening on .*caravan\.sock")

            def get(target):
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(path)
                    s.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                    return b"".join(iter(lambda: s.recv(65536), b"")).decode()

            self.wait_until(lambda: " 200 " in get("/health"))
            self.assertIn('"object":"list"', get("/v1/models"))
            self.assertEqual(server.stop(), 0)
            self.assertFalse(pathlib.Path(path).exists())

    def test_keys_from_a_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
            file.write("# for the editor\nfirst key\n\nsecond\r\n")
            file.flush()
            server = self.start(Server, extra=("--api-key-file", file.name))
            self.assertEqual(server.get("/props")[0], 401)
            for key in ("first key", "second"):
                self.assertEqual(server.get("/props", {"Authorization": f"Bearer {key}"})[0], 200)
            self.assertEqual(server.get("/props", {"X-Api-Key": "# for the editor"})[0], 401)

    def test_options_that_do_not_fit_are_refused(self):
        for options, word in ((("--ssl-key-file", "x"), "--ssl-cert-file"), (("--lora", "a.gguf"), "--lora"),
                              (("--api-key-file", "/no/such/file"), "/no/such/file"), (("--cache-ram", "100"), "--cache-ram"),
                              (("--reranking",), "ranking head")):
            result = run("server", "-m", DEMO_MODEL, *options)
            self.assertEqual(result.returncode, 1, result.stdout)
            self.assertIn(word, result.stdout + result.stderr)
