"""Backends behind a network of their own: one whose packets are dropped, and names of several machines. Needs root, for namespaces."""

import contextlib
import ctypes
import os
import subprocess
import tempfile
import time
import unittest

import test_cluster
from harness import TOKEN, Backend, ClusterTest, Server, clean_environment, free_port, run

CLONE_NEWNET = 0x40000000
NEAR, FAR = "10.99.0.1", "10.99.0.2"
NOBODY = "02:00:00:00:00:99"


class Network:
    """Two network namespaces with a wire between them: this thread, and what it starts, is in the near one."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.holder = None
        if self.libc.unshare(CLONE_NEWNET) != 0:
            self.leave()
            raise unittest.SkipTest(f"a network namespace needs root: {os.strerror(ctypes.get_errno())}")
        try:
            self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo there; exec sleep 1000"], stdout=subprocess.PIPE)
            self.holder.stdout.readline()
            self.inside = ["nsenter", "--target", str(self.holder.pid), "--net"]
            self.shell("ip", "link", "set", "lo", "up")
            self.shell("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.holder.pid)
            for prefix, address in ((), NEAR), (self.inside, FAR):
                self.shell(*prefix, "ip", "addr", "add", f"{address}/24", "dev", "wire")
                self.shell(*prefix, "ip", "link", "set", "wire", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.leave()
            raise unittest.SkipTest(f"no wire between network namespaces: {error}") from None

    @staticmethod
    def shell(*arguments):
        subprocess.run([str(a) for a in arguments], check=True, capture_output=True)

    def cut(self):
        """From now on packets vanish, in both directions: they are sent to a machine that is not there."""
        for prefix, other in ((), FAR), (self.inside, NEAR):
            self.shell(*prefix, "ip", "neigh", "replace", other, "lladdr", NOBODY, "dev", "wire", "nud", "permanent")

    def mend(self):
        for prefix, other in ((), FAR), (self.inside, NEAR):
            self.shell(*prefix, "ip", "neigh", "del", other, "dev", "wire")

    def leave(self):
        self.libc.setns(self.home, CLONE_NEWNET)
        os.close(self.home)
        if self.holder:
            self.holder.kill()
            self.holder.wait()
            self.holder.stdout.close()


class NetworkTest(ClusterTest):
    def setUp(self):
        self.network = Network()
        self.addCleanup(self.network.leave)

    def start_near(self, **fields):
        return self.start(Backend, host=NEAR, **fields)

    def start_far(self, **fields):
        return self.start(Backend, host=FAR, prefix=self.network.inside, **fields)


class Cut(NetworkTest):
    """What is done to a stream, and what is expected of it, is as in test_cluster.Failures."""

    FIELDS = test_cluster.Failures.FIELDS
    expected_and_stream = test_cluster.Failures.expected_and_stream
    rest_of = test_cluster.Failures.rest_of

    def test_a_stream_goes_on_exactly_without_a_backend_whose_packets_vanish(self):
        near, far = self.start_near(), self.start_far()
        server = self.start(Server, [near, far], extra=("-c", 1024, "--rpc-timeout", 1))
        server.wait_for(rf"{FAR}:\d+ +\d+-\d+ +direct")
        expected, first, events = self.expected_and_stream(server)
        self.network.cut()
        began = time.monotonic()
        server.wait_for("the plan is lost", timeout=20)
        self.assertLess(time.monotonic() - began, 5)  # a second, and what a busy machine adds
        self.assertEqual(first + self.rest_of(events), expected)
        self.assertRegex(server.log, rf"{FAR}:\d+.*missed heartbeats")
        self.assertGreater(server.metric("tokens_recomputed_total"), 0)
        self.assertEqual(server.get("/livez")[0], 200)
        self.network.mend()
        server.wait_for(rf"{FAR}:\d+ has come", timeout=60)
        self.assertEqual(server.complete(test_cluster.PROMPTS[0], **self.FIELDS)["content"], expected)
        self.assertEqual(server.metric("plans_lost_total"), 1)

    def test_a_stream_waits_for_the_only_backend_while_its_packets_vanish(self):
        server = self.start(Server, [self.start_far()], extra=("-c", 1024, "--mem", 1, "--rpc-timeout", 1))
        expected, first, events = self.expected_and_stream(server)
        self.network.cut()
        self.wait_until(lambda: server.get("/health")[0] == 503, message="the server did not notice that its backend is gone")
        self.assertEqual(server.get("/livez")[0], 200)
        self.network.mend()
        self.assertEqual(first + self.rest_of(events), expected)
        self.assertEqual(server.get("/health")[0], 200)


class CutDuringThePrompt(test_cluster.SlowPrompt, NetworkTest):
    def test_a_backend_whose_packets_vanish(self):
        server = self.serve([self.start_near(), self.start_far()], "--rpc-timeout", 1)
        self.check(server, self.network.cut)
        self.assertRegex(server.log, rf"{FAR}:\d+.*missed heartbeats")


class NamesOfSeveral(NetworkTest):
    NAME = "several.caravan.invalid"

    @contextlib.contextmanager
    def hosts(self, *addresses):
        """A prefix of commands that find these addresses under one name, and what adds another one."""
        with tempfile.NamedTemporaryFile("w", prefix="caravan-hosts-") as hosts:
            def add(address):
                print(f"{address} {self.NAME}", file=hosts, flush=True)

            print("127.0.0.1 localhost", file=hosts, flush=True)
            for address in addresses:
                add(address)
            prefix = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts.name]
            if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
                self.skipTest("a file /etc/hosts of its own needs root")
            yield prefix, add

    def doctor(self, prefix, port):
        result = run("doctor", "--rpc", f"{self.NAME}:{port}", prefix=prefix, env=clean_environment(APP_RPC_TOKEN=TOKEN))
        return result.returncode, result.stdout + result.stderr

    def test_doctor_looks_at_all_machines_of_a_name(self):
        port = free_port()
        self.start_near(port=port)
        far = self.start_far(port=port)
        with self.hosts(NEAR, FAR) as (prefix, _):
            status, text = self.doctor(prefix, port)
            self.assertEqual(status, 0, text)
            for address in (NEAR, FAR):
                self.assertRegex(text, rf"ok +{self.NAME}:{port} \({address}:{port}\): link: ")
            self.assertIn("2 of 2 ways between them are direct", text)
            far.kill()
            status, text = self.doctor(prefix, port)
            self.assertEqual(status, 1, text)
            self.assertRegex(text, rf"ok +{self.NAME}:{port} \({NEAR}:{port}\): link: ")
            self.assertRegex(text, rf"PROBLEM +{self.NAME}:{port} \({FAR}:{port}\): .*refused")

    def test_all_machines_of_a_name_are_used_and_those_that_it_gains_later(self):
        port = free_port()
        near, far = self.start_near(port=port), self.start_far(port=port)
        with self.hosts(NEAR, FAR) as (prefix, _):
            server = self.start(Server, [f"{self.NAME}:{port}"], prefix=prefix)
            server.wait_for(r"on 2 device\(s\)")
            expected = server.complete("Hello")["content"]
            self.assertEqual(server.stop(), 0)
        with self.hosts(NEAR) as (prefix, add):
            server = self.start(Server, [f"{self.NAME}:{port}"], prefix=prefix)
            server.wait_for(r"on 1 device\(s\)")
            add(FAR)
            server.wait_for(rf"{far.address} has come")
            server.wait_for(r"on 2 device\(s\)")
            self.assertEqual(server.complete("Hello")["content"], expected)
            self.assertEqual(server.metric("plans_lost_total"), 0)
        self.assertTrue(near.alive() and far.alive())

    def test_doctor_says_that_a_name_does_not_resolve(self):
        result = run("doctor", "--rpc", "nobody.invalid:50052")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stdout, r"PROBLEM +nobody\.invalid:50052: .*Is the name right")


if __name__ == "__main__":
    unittest.main()
