"""A model that several backends hold whole: every one serves a share of the streams, and loses only those."""

import json
import re
import threading
import unittest

from harness import DEMO_MODEL, TOKEN, Backend, ClusterTest, Server, Stream, clean_environment, run

PROMPTS = ["Once upon a time there was a fox named Lily.", "Question: What is the capital of France?\nAnswer:",
           "Building a website can be done in 10 simple steps:", "Hello", "2 + 3 =", "The colour of the sky is",
           "A story about a bear named Tom.", "Once"]
FIELDS = {"n_predict": 200, "ignore_eos": True, "return_tokens": True}
MANY = ("--plan", "throughput", "-np", 8, "-c", 2048)


class Replicas(ClusterTest):
    def start_three(self):
        """What one process answers, three backends by address, and a server that has replicas on two of them at least: one that
        is busy while it is measured may look slow."""
        local = self.start(Server, extra=("-np", 8, "-c", 2048))
        expected = [local.complete(p, **FIELDS)["tokens"] for p in PROMPTS]
        local.stop()
        backends = {b.address: b for b in (self.start(Backend) for _ in range(3))}
        server = self.start(Server, list(backends.values()), extra=MANY)
        self.assertGreaterEqual(len(self.replicas(server)), 2, server.log)
        return expected, backends, server

    @staticmethod
    def replicas(server):
        stages = json.loads(server.get("/props")[1])["plan"]["stages"]
        return {stage["replica"]: stage["device"] for stage in stages}  # the last device of each

    def ask_all(self, server, after_first_tokens=None):
        """The tokens of eight streams at once; the hook is called when each has its first."""
        answers = [[] for _ in PROMPTS]
        begun = threading.Barrier(len(PROMPTS) + 1)

        def ask(i):
            stream = Stream(server, PROMPTS[i], **FIELDS)
            for event in stream.events():
                waits = not answers[i]
                answers[i] += event.get("tokens", [event.get("error")])
                if waits:
                    begun.wait(60)
            stream.leave()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        begun.wait(60)
        if after_first_tokens:
            after_first_tokens()
        for thread in threads:
            thread.join()
        return answers

    @staticmethod
    def batches(server):
        found = re.findall(r'stage_batches_total\{stage="\d+",replica="(\d+)"[^}]*\} (\d+)', server.get("/metrics")[1])
        return {int(replica): int(n) for replica, n in found}

    def test_streams_are_spread_and_their_tokens_are_those_of_one_process(self):
        expected, backends, server = self.start_three()
        self.assertRegex(server.log, r"on [23] device\(s\), [23] replicas")
        self.assertEqual(self.ask_all(server), expected)
        batches = self.batches(server)
        self.assertGreaterEqual(len(batches), 2)
        for replica, n in batches.items():
            self.assertGreaterEqual(n, FIELDS["n_predict"], f"replica {replica} computed no answer")

    def test_a_killed_backend_costs_no_token_and_leaves_the_others_undisturbed(self):
        expected, backends, server = self.start_three()
        killed, kept = list(self.replicas(server).values())[:2]
        self.assertEqual(self.ask_all(server, backends[killed].kill), expected)
        self.assertRegex(server.log, rf"a replica of the model is lost: [^\n]*{killed}")
        self.assertEqual(server.metric("plans_lost_total"), 0)
        self.assertEqual(server.metric("replicas_lost_total"), 1)
        self.assertEqual(server.metric("recoveries_total"), 1)
        self.assertIn(f'llamacpp:device_losses_total{{device="{killed}"}} 1\n', server.get("/metrics")[1])
        self.assertGreater(server.metric("tokens_recomputed_total"), 0)
        self.assertIn(kept, self.replicas(server).values())
        self.assertNotIn(killed, self.replicas(server).values())
        self.start(Backend, port=backends[killed].port)
        self.wait_until(lambda: server.log.count(f"{killed}: connected") == 2)
        self.assertEqual(self.ask_all(server), expected)
        self.assertEqual(server.metric("plans_lost_total"), 0)

    def test_a_backend_that_leaves_hands_its_streams_to_the_others(self):
        expected, backends, server = self.start_three()
        leaving = backends[self.replicas(server)[0]]
        stopped = []
        self.assertEqual(self.ask_all(server, lambda: stopped.append(leaving.stop())), expected)
        self.assertEqual(stopped, [0])
        self.assertEqual(server.metric("plans_lost_total"), 0)
        self.assertEqual(server.metric("replicas_lost_total"), 0)

    def test_plan_shows_replicas_only_where_they_serve_more_streams(self):
        def plan(backends, *more):
            result = run("plan", "-m", DEMO_MODEL, "--rpc", ",".join(b.address for b in backends), "-ngl", 99, "-c", 1024, *more,
                         env=clean_environment(APP_RPC_TOKEN=TOKEN))
            self.assertEqual(result.returncode, 0, result.stderr)
            return result.stdout

        # One that is busy while it is measured may look too slow to be of use, but not every time.
        for _ in range(5):
            backends = [self.start(Backend) for _ in range(2)]
            table = plan(backends, "--plan", "throughput", "-np", 8)
            if "replica" in table:
                break
        self.assertRegex(table, r"\nreplica 1\n(.*\n)+replica 2\n")
        stages = json.loads(plan(backends, "--plan", "throughput", "-np", 8, "--json"))["stages"]
        self.assertEqual([stage["replica"] for stage in stages], [0, 1])
        for more in (["--plan", "latency", "-np", 8], ["--plan", "throughput", "-np", 1], ["--plan", "memory", "-np", 8]):
            self.assertNotIn("replica", plan(backends, *more))


if __name__ == "__main__":
    unittest.main()
