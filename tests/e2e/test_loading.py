"""Weights are sent once: caches, files on the backend's machine, broken transfers, and what happens when bytes are wrong."""

import os
import pathlib
import re
import shutil
import tempfile
import unittest

from harness import DEMO_MODEL, Backend, ClusterTest, Proxy, Server, clean_environment, free_port, run

PROMPT = "Once upon a time there was a fox named Lily."
LOADED = r"loaded in [\d.]+ s: (.+) of weights from models-dir, (.+) from the cache, (.+) from other backends, (.+) from the server"


def size_of(text):
    """The number of bytes in "1.3 MiB"."""
    number, unit = text.split()
    return float(number) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)


class Loading(ClusterTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="caravan-loading-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "home")  # not the user's
        self.addCleanup(os.environ.pop, "XDG_CACHE_HOME")

    def load(self, *backend_options, model=DEMO_MODEL, stops=True):
        """Starts a backend and a server that fills it. Returns what came from models-dir, cache and server, and an answer."""
        backend = self.start(Backend, extra=backend_options)
        server = self.start(Server, [backend], model=model)
        models, cached, _, pulled = backend.wait_for(LOADED).groups()
        answer = server.complete(PROMPT)["content"]
        self.log = backend.log
        if stops:
            self.assertEqual(server.stop(), 0)
            self.assertEqual(backend.stop(), 0)
        return (models, cached, pulled), answer

    def chunks(self, folder):
        return [p for p in (folder / "chunks").rglob("*") if p.is_file()]

    def test_a_second_start_pulls_nothing(self):
        cache = self.folder / "cache"
        (models, cached, pulled), answer = self.load("--cache-dir", cache)
        self.assertEqual((models, cached), ("0 B", "0 B"))
        self.assertNotEqual(pulled, "0 B")
        again, same = self.load("--cache-dir", cache)
        self.assertEqual(again, ("0 B", pulled, "0 B"))
        self.assertEqual(same, answer)

    def test_the_default_folder_is_the_users_cache(self):
        self.load("-c")
        self.assertTrue(self.chunks(self.folder / "home" / "caravan"))

    def test_without_a_cache_nothing_is_written(self):
        self.load()
        self.assertFalse((self.folder / "home" / "caravan" / "chunks").exists())

    def test_damaged_files_of_the_cache_are_fetched_again(self):
        cache = self.folder / "cache"
        _, answer = self.load("--cache-dir", cache)
        files = sorted(self.chunks(cache), key=lambda p: p.stat().st_size)
        largest = files[-1].read_bytes()
        files[-1].write_bytes(largest[:-1] + bytes([largest[-1] ^ 1]))
        files[0].write_bytes(b"")
        (_, cached, pulled), same = self.load("--cache-dir", cache)
        self.assertNotIn("0 B", (cached, pulled))
        self.assertEqual(same, answer)
        self.assertIn("does not hold what its name says", self.log)
        self.assertEqual(files[-1].read_bytes(), largest)
        again, _ = self.load("--cache-dir", cache)
        self.assertEqual(again[2], "0 B")

    def test_the_limit_of_the_cache_holds(self):
        cache = self.folder / "cache"
        size = os.path.getsize(DEMO_MODEL)
        _, answer = self.load("--cache-dir", cache, "--cache-limit", f"{size // 2048}K")
        self.assertLessEqual(sum(p.stat().st_size for p in self.chunks(cache)), size // 2)
        (_, cached, pulled), same = self.load("--cache-dir", cache, "--cache-limit", f"{size // 2048}K")
        self.assertNotIn("0 B", (cached, pulled))
        self.assertEqual(same, answer)

    def test_a_file_of_another_name_is_used_in_place_of_sending(self):
        models = self.folder / "models" / "below"
        models.mkdir(parents=True)
        shutil.copy(DEMO_MODEL, models / "something else.gguf")
        (models / "broken.gguf").write_bytes(b"GGUF" + os.urandom(100))
        (found, _, pulled), answer = self.load("--models-dir", self.folder / "models")
        self.assertEqual(pulled, "0 B")
        self.assertNotEqual(found, "0 B")
        # Another quantisation of the same model shares names, not bytes.
        shutil.rmtree(models)
        models.mkdir()
        self.assertEqual(run("quantize", "--allow-requantize", DEMO_MODEL, models / "other.gguf", "Q4_0", "1").returncode, 0)
        (_, _, pulled), same = self.load("--models-dir", self.folder / "models")
        self.assertNotEqual(pulled, "0 B")
        self.assertEqual(same, answer)

    def test_hashes_of_the_model_are_computed_once(self):
        hashes = self.folder / "home" / "caravan" / "hashes"
        self.load()
        records = list(hashes.iterdir())
        self.assertEqual(len(records), 1)
        before = records[0].stat().st_mtime_ns
        self.load()
        self.assertEqual(records[0].stat().st_mtime_ns, before)

    def test_a_second_start_does_not_hash_the_model_again(self):
        backend = self.start(Backend)
        for check in (self.assertRegex, self.assertNotRegex):
            server = self.start(Server, [backend])
            check(server.log, rf"hashing {re.escape(DEMO_MODEL)}")
            self.assertEqual(server.stop(), 0)

    def test_remembered_hashes_that_are_wrong_are_computed_again(self):
        model = self.folder / "model.gguf"
        shutil.copy(DEMO_MODEL, model)
        self.load(model=model)
        stat = model.stat()
        data = bytearray(model.read_bytes())
        data[-5] ^= 1
        model.write_bytes(data)
        os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        backend = self.start(Backend)
        server = self.start(Server, [backend], model=model)
        server.wait_for("the hashes that were remembered of .* are computed again")
        self.assertTrue(server.complete(PROMPT)["content"])

    def test_a_new_backend_gets_its_part_from_those_that_had_it(self):
        first, second = (self.start(Backend, extra=("--cache-dir", self.folder / name)) for name in ("first", "second"))
        server = self.start(Server, [first, second])
        answer = server.complete(PROMPT)["content"]
        before = [self.chunks(self.folder / name) for name in ("first", "second")]
        self.assertTrue(all(before))
        self.assertEqual(server.stop(), 0)
        # It takes the place of the first, which is still there but gets no layers.
        third = self.start(Backend)
        server = self.start(Server, [third, second, first], extra=("-ts", "1,1,0"))
        models, cached, given, pulled = third.wait_for(LOADED).groups()
        self.assertEqual((models, cached, pulled), ("0 B", "0 B", "0 B"))
        self.assertNotEqual(given, "0 B")
        self.assertEqual(server.complete(PROMPT)["content"], answer)
        self.assertRegex(server.get("/metrics")[1], r'llamacpp:stage_weights_bytes\{stage="0",[^}]*source="peer"\} [1-9]\d{5}')
        self.assertRegex(server.get("/metrics")[1], r'llamacpp:stage_weights_bytes\{stage="0",[^}]*source="server"\} 0')

    def test_a_backend_that_comes_late_gets_its_part_from_the_others(self):
        first = self.start(Backend, extra=("--cache-dir", self.folder / "first"))
        name = f"127.0.0.1:{free_port()}"
        server = self.start(Server, [first, name], extra=("--rpc-wait", 1))
        answer = server.complete(PROMPT)["content"]
        second = self.start(Backend, port=int(name.split(":")[1]), extra=("--cache-dir", self.folder / "second"))
        models, cached, given, pulled = second.wait_for(LOADED).groups()
        self.assertEqual((models, cached, pulled), ("0 B", "0 B", "0 B"))
        self.assertNotEqual(given, "0 B")
        self.assertEqual(server.complete(PROMPT)["content"], answer)
        self.assertEqual(server.stop(), 0)
        self.assertTrue(self.chunks(self.folder / "second"), "what came from another backend is kept, too")

    def test_damaged_chunks_of_another_backend_are_never_used(self):
        first = self.start(Backend, extra=("--cache-dir", self.folder / "first"))
        server = self.start(Server, [first])
        answer = server.complete(PROMPT)["content"]
        self.assertEqual(server.stop(), 0)
        largest = max(self.chunks(self.folder / "first"), key=lambda p: p.stat().st_size)
        data = largest.read_bytes()
        largest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        second = self.start(Backend)
        server = self.start(Server, [second, first], extra=("-ts", "1,0"))
        _, _, given, pulled = second.wait_for(LOADED).groups()
        self.assertNotIn("0 B", (given, pulled))
        self.assertIn("from other backends: expected SHA-256", second.log)
        self.assertEqual(server.complete(PROMPT)["content"], answer)

    SIZE = os.path.getsize(DEMO_MODEL)

    def half_load(self, *backend_options):
        """A backend behind a slow link, the link, and a server that has sent half of the weights and goes on sending."""
        backend = self.start(Backend, extra=backend_options)
        link = Proxy(backend.port, 1e6)
        self.addCleanup(link.stop)
        server = self.start(Server, [link.address], ready=False)
        self.wait_until(lambda: link.n_bytes > self.SIZE / 2, 60, "nothing is loaded")
        self.assertNotIn("ready: ", server.log)
        return backend, link, server

    def check_rest(self, backend, link, server, before=0):
        """What the second load pulls is what the first one lacked, also by the bytes on the wire."""
        models, cached, peers, pulled = (size_of(text) for text in backend.wait_for(LOADED).groups())
        self.assertEqual((models, peers), (0, 0))
        self.assertGreater(pulled, 0)
        self.assertLess(pulled, 0.75 * self.SIZE)
        self.assertLess(link.n_bytes - before, 0.75 * self.SIZE)
        self.assertEqual(server.complete(PROMPT)["content"], self.start(Server).complete(PROMPT)["content"])
        return cached, pulled

    def test_a_server_that_was_killed_while_it_loaded_sends_only_the_rest(self):
        backend, link, server = self.half_load()
        server.kill()
        backend.wait_for("closed the connection")
        before, link.bytes_per_s = link.n_bytes, None
        cached, _ = self.check_rest(backend, link, self.start(Server, [link.address]), before)
        self.assertEqual(cached, 0)

    def test_a_backend_that_was_killed_while_it_loaded_finds_what_came_in_its_cache(self):
        cache = self.folder / "cache"
        backend, link, server = self.half_load("--cache-dir", cache)
        self.wait_until(lambda: sum(p.stat().st_size for p in self.chunks(cache)) > 0.25 * self.SIZE, message="nothing is kept")
        backend.kill()
        server.kill()
        before, link.bytes_per_s = link.n_bytes, None
        backend = self.start(Backend, port=backend.port, extra=("--cache-dir", cache))
        cached, pulled = self.check_rest(backend, link, self.start(Server, [link.address]), before)
        self.assertGreater(cached, 0.25 * self.SIZE)
        self.assertAlmostEqual(cached + pulled, self.SIZE, delta=0.1 * self.SIZE)

    def test_a_load_over_a_link_that_was_cut_goes_on_with_the_rest(self):
        backend, link, server = self.half_load()
        before, link.bytes_per_s = link.n_bytes, None
        link.cut()
        server.wait_until_healthy()
        self.check_rest(backend, link, server, before)

    def test_bad_options_are_refused(self):
        for options, pattern in ((("--cache-dir", "/proc/nowhere"), "cache folder"), (("--models-dir", "/nowhere"), "/nowhere"),
                                 (("--cache-limit", "many"), "expected a size")):
            result = run("backend", "--port", 0, *options)
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, pattern)
        result = run("backend", "--port", 0, "--cache", env={k: v for k, v in clean_environment().items()
                                                             if k not in ("HOME", "XDG_CACHE_HOME")})
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, "say where with --cache-dir")


if __name__ == "__main__":
    unittest.main()
