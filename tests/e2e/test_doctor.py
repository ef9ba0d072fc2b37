"""`caravan doctor` finds what is wrong with backends and the network, `caravan plan` shows what would be placed where."""

import json
import os
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest

from harness import DEMO_MODEL, TOKEN, Backend, ClusterTest, Proxy, clean_environment, free_port, run
from test_hostile import HEARTBEAT, HELLO, PROTOCOL_MAJOR, frame, message, varint

SURVEY, LINK_TEST = 25, 27


def fields(header):
    """The numbers of a protobuf message, by field; what is not a number is left out."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = header[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(header):
        key = varint()
        value = varint()
        if key & 7 == 2:
            at += value
        else:
            found[key >> 3] = value
    return found


class ScriptedBackend:
    """Answers what doctor asks, with the version and the clock that it is given. Its connection ends with the process's."""

    def __init__(self, major=PROTOCOL_MAJOR, minor=2, version=None, clock_ahead_s=0):
        self.version = version or re.search(r"version: (\S+)", run("--version").stderr).group(1)
        self.major, self.minor, self.clock_ahead_s = major, minor, clock_ahead_s
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        connection, _ = self.listener.accept()
        memory = varint(1 << 30)
        with connection, connection.makefile("rb") as incoming:
            while len(head := incoming.read(20)) == 20:
                _, kind, _, header_bytes, payload_bytes = struct.unpack("<4sHHIQ", head)
                asked = fields(incoming.read(header_bytes))
                incoming.read(payload_bytes)
                sequence = asked.get(1, 0)
                if kind == HELLO:
                    device = message(f1=b"CPU", f2=b"cpu", f3=b"scripted", f4=1 << 30, f5=1 << 30, f6=1, f7=b"some")
                    answer = frame(HELLO + 1, message(f1=self.major, f2=self.minor, f3=self.version.encode(), f4=b"scripted", f5=bytes(16),
                                                      f6=device, f7=5000))
                elif kind == HEARTBEAT:
                    answer = frame(HEARTBEAT + 1, message(f1=sequence, f2=memory))
                elif kind == SURVEY:
                    answer = frame(SURVEY + 1, message(f1=sequence, f6=int(1000 * (time.time() + self.clock_ahead_s))))
                elif kind == LINK_TEST:
                    answer = frame(LINK_TEST + 1, message(f1=sequence), bytes(asked.get(2, 0)))
                else:
                    answer = b""
                connection.sendall(answer)
        self.listener.close()


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
        link = Proxy(self.start(Backend).port, 2e6)
        status, text = self.doctor([link.address])
        link.stop()
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*the link is slow: .*1 GiB of weights takes \d+ s\. Use a wired")

    def test_wrong_token(self):
        status, text = self.doctor([self.start(Backend).address], token="another secret of sufficient length")
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*token.*Give the same --rpc-token")

    def test_other_version(self):
        status, text = self.doctor([ScriptedBackend(major=9, minor=0, version="9.0.0").address], token="")
        self.assertEqual(status, 1, text)
        self.assertRegex(text, r"PROBLEM .*speaks protocol 9\.0 \(caravan 9\.0\.0\).*Update the older side")

    def test_other_minor_version(self):
        for minor in (0, 1, 3):
            with self.subTest(minor):
                status, text = self.doctor([ScriptedBackend(minor=minor, version="0.0.9").address], token="")
                self.assertEqual(status, 1, text)
                self.assertRegex(text, rf"PROBLEM .*it runs caravan 0\.0\.9 \(protocol 2\.{minor}\), this side .* update the older side")
                self.assertIn("1 problem\n", text)

    def test_wrong_clock(self):
        self.assertEqual(self.doctor([ScriptedBackend().address], token="")[0], 0)
        for ahead, words in ((3600, "ahead of"), (-3600, "behind")):
            status, text = self.doctor([ScriptedBackend(clock_ahead_s=ahead).address], token="")
            self.assertEqual(status, 1, text)
            self.assertRegex(text, rf"PROBLEM .*its clock is (3[56]\d\d) s {words} this one's.*run a time service")
            self.assertIn("1 problem\n", text)

    def test_backends_that_do_not_reach_each_other(self):
        near, hidden = self.start(Backend), self.start(Backend, extra=("--advertise", f"127.0.0.1:{free_port()}"))
        status, text = self.doctor([near.address, hidden.address])
        self.assertEqual(status, 1, text)
        self.assertRegex(text, rf"PROBLEM +{near.address}: it does not reach {hidden.address}: .*The server relays between the two.*--advertise")
        self.assertIn("1 of 2 ways between them are direct", text)

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
        self.assertRegex(text, r"device +layers +input +weights +KV cache +scratch +free\n")
        size = r" +[\d.]+ [KMG]iB"
        for backend, row in zip(backends, (r"0-\d +server", r"\d-4 +direct")):
            self.assertRegex(text, rf"\n{backend.address} +{row}{4 * size}\n")
        self.assertRegex(text, r"predicted: prompt [\d.e+]+ tokens/s, generation [\d.e+]+ tokens/s")
        plan = json.loads(self.plan(backends, "--plan", "memory", "--json"))
        self.assertEqual([s["device"] for s in plan["stages"]], [b.address for b in backends])
        self.assertEqual(plan["stages"][1]["input"], "direct")
        for stage in plan["stages"]:
            for part in ("weights", "kv_cache", "scratch"):
                self.assertGreater(stage[part], 0)
        begins, ends = zip(*(stage["layers"] for stage in plan["stages"]))
        self.assertEqual(begins + (5,), (0,) + ends)
        for speed in ("prompt_tokens_per_s", "generation_tokens_per_s", "streams_tokens_per_s"):
            self.assertGreater(plan["predicted"][speed], 0)
        self.assertEqual([d["device"] for d in plan["devices"]], ["local"] + [b.address for b in backends])
        for device in plan["devices"][1:]:
            for key in ("memory_free", "round_trip_ms", "link_bytes_per_s"):
                self.assertGreater(device[key], 0)
        self.assertEqual(plan["missing"], [])

    def test_stages_that_do_not_reach_each_other_are_relayed(self):
        backends = [self.start(Backend), self.start(Backend, extra=("--advertise", f"127.0.0.1:{free_port()}"))]
        self.assertRegex(self.plan(backends, "--plan", "memory"), rf"\n{backends[1].address} +\d-4 +relayed ")
        plan = json.loads(self.plan(backends, "--plan", "memory", "--json"))
        self.assertEqual([s["input"] for s in plan["stages"]], ["server", "relayed"])

    def test_slow_way_is_left_out(self):
        backend, far = self.start(Backend), self.start(Backend)
        link = Proxy(far.port, 1e6)
        far.address = link.address
        plan = json.loads(self.plan([far, backend], "--plan", "latency", "--json"))
        text = self.plan([far, backend], "--plan", "latency")
        link.stop()
        self.assertEqual([s["device"] for s in plan["stages"]], [backend.address])
        self.assertEqual(plan["left_out"][-1]["device"], far.address)
        self.assertRegex(text, rf"\n{far.address} +left out: {re.escape(plan['left_out'][-1]['reason'])}\n")

    def test_goal_that_is_none(self):
        result = run("plan", "-m", DEMO_MODEL, "--plan", "speed")
        self.assertEqual(result.returncode, 1)
        self.assertIn("accepted: auto, latency, throughput, memory; found 'speed'", result.stderr)


if __name__ == "__main__":
    unittest.main()
