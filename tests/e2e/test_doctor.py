"""`caravan doctor` finds what is wrong with backends and the network, `caravan plan` shows what would be placed where."""

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import unittest

from harness import DEMO_MODEL, TOKEN, Backend, ClusterTest, SlowLink, clean_environment, run
from test_hostile import frame, message


def serve_other_version():
    """A backend of another protocol version: returns its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(frame(2, message(f1=9, f2=0, f3=b"9.0.0", f4=b"newer", f5=bytes(16), f6=message(f1=b"CPU"))))
        connection.recv(65536)
        connection.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return "127.0.0.1:%d" % listener.getsockname()[1]


class DoctorTest(ClusterTest):
    def doctor(self, addresses, *more, token=TOKEN):
        environment = clean_environment(**({"APP_RPC_TOKEN": token} if token else {}))
        result = run("doctor", "--rpc", ",".join(addresses), *more, env=environment)
        return result.returncode, result.stdout + result.stderr

    def test_healthy_backends_have_no_problem(self):
        backends = [self.start(Backend) for _ in range(2)]
        status, text = self.doctor([b.address for b in backends], "-m", DEMO_MODEL)
        self.assertEqual(status, 0, text)
        self.assertIn("all is well", text)
        self.assertIn("2 of 2 ways between them are direct", text)
        self.assertIn("fits", text)

    def test_slow_link(self):
        link = SlowLink(self.start(Backend).port, 2e6)
        status, text = self.doctor([link.address])
        link.stop()
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*the link is slow: .*1 GiB of weights takes \d+ s\. Use a wired")

    def test_wrong_token(self):
        status, text = self.doctor([self.start(Backend).address], token="another secret of sufficient length")
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*token.*Give the same --rpc-token")

    def test_other_version(self):
        status, text = self.doctor([serve_other_version()], token="")
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*speaks protocol 9\.0 \(caravan 9\.0\.0\).*Update the older side")

    def test_full_disk(self):
        folder = tempfile.mkdtemp(prefix="caravan-full-")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False).returncode == 0
        try:
            if not mounted:
                self.skipTest("a small disk can be mounted by root only")
            backend = self.start(Backend, extra=("--cache-dir", folder))
            status, text = self.doctor([backend.address])
            backend.stop()
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)
            os.rmdir(folder)
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*the disk of .* is full: .* Free space there")

    def test_missing_memory(self):
        status, text = self.doctor([self.start(Backend, mem=1).address], "-m", DEMO_MODEL, "-ngl", 99)
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*little memory: .* Raise its --mem")
        self.assertRegex(text, r"PROBLEM .*the model does not fit")

    def test_nobody_there(self):
        status, text = self.doctor(["127.0.0.1:1"])
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*refused.*Is `caravan backend` running")


class PlanTest(ClusterTest):
    def plan(self, backends, *more):
        result = run("plan", "-m", DEMO_MODEL, "--rpc", ",".join(b.address for b in backends), "-ngl", 99, *more,
                     env=clean_environment(APP_RPC_TOKEN=TOKEN))
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_table_and_json(self):
        backends = [self.start(Backend) for _ in range(2)]
        text = self.plan(backends, "--plan", "memory")
        for backend in backends:
            self.assertIn(backend.address, text)
        self.assertRegex(text, r"predicted: prompt [\d.e+]+ tokens/s, generation [\d.e+]+ tokens/s")
        plan = json.loads(self.plan(backends, "--plan", "memory", "--json"))
        self.assertEqual([s["device"] for s in plan["stages"]], [b.address for b in backends])
        self.assertEqual(plan["stages"][1]["input"], "direct")
        self.assertGreater(plan["predicted"]["generation_tokens_per_s"], 0)
        self.assertEqual(plan["missing"], [])

    def test_slow_way_is_left_out(self):
        backend, far = self.start(Backend), self.start(Backend)
        link = SlowLink(far.port, 1e6)
        far.address = link.address
        plan = json.loads(self.plan([far, backend], "--plan", "latency", "--json"))
        link.stop()
        self.assertEqual([s["device"] for s in plan["stages"]], [backend.address])
        self.assertEqual([d["device"] for d in plan["left_out"]][-1], far.address)

    def test_goal_that_is_none(self):
        result = run("plan", "-m", DEMO_MODEL, "--plan", "speed")
        self.assertEqual(result.returncode, 1)
        self.assertIn("accepted: auto, latency, throughput, memory; found 'speed'", result.stderr)


if __name__ == "__main__":
    unittest.main()
