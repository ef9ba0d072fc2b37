"""Backends that hand activations to each other: the same answers as alone and as over the server, whoever reaches whom."""

import pathlib
import re
import tempfile
import threading
import unittest
import urllib.request

from harness import DEMO_MODEL, TOKEN, Backend, ClusterTest, Proxy, Server, Stream, clean_environment, free_port, run

PROMPTS = ["Once upon a time there was a fox named Lily.", "Question: What is the capital of France?\nAnswer:",
           "Building a website can be done in 10 simple steps:", "Hello", "2 + 3 =", "The colour of the sky is",
           "A story about a bear named Tom.", "Once"]


def inputs(log):
    """The column "input" of the last plan in a log."""
    table = log[log.rindex("plan:\n"):].splitlines()[2:]
    rows = [re.match(r"\S+ +\d+-\d+ +(server|direct|relayed) ", line) for line in table]
    return [row.group(1) for row in rows if row]


class DirectHops(ClusterTest):
    def test_logits_are_those_of_the_whole_model_bit_for_bit(self):
        tokens = ",".join(str(3 + 17 * i % 250) for i in range(40))
        backends = [self.start(Backend, threads=1 + i % 2) for i in range(3)]
        with tempfile.TemporaryDirectory() as folder:
            whole = pathlib.Path(folder) / "whole"
            self.assertEqual(run("logits", "-m", DEMO_MODEL, "--tokens", tokens, "-t", 1, "-o", whole).returncode, 0)
            expected = whole.read_bytes()
            for n in (2, 3):
                rpc = ",".join(b.address for b in backends[:n])
                for relay in ([], ["--rpc-relay"]):
                    for rows in (1, 7, 40):
                        split = pathlib.Path(folder) / "split"
                        result = run("logits", "-m", DEMO_MODEL, "--tokens", tokens, "--rpc", rpc, "-ngl", 99, "--plan", "memory", "-ub", rows,
                                     "-o", split, "--log-level", "info", *relay, env=clean_environment(APP_RPC_TOKEN=TOKEN))
                        self.assertEqual(result.returncode, 0, result.stderr)
                        log = result.stderr + result.stdout
                        self.assertEqual(inputs(log), ["server"] + ["relayed" if relay else "direct"] * (n - 1), log)
                        self.assertEqual(split.read_bytes(), expected, f"{n} backends, {rows} rows, {relay}")

    def test_eight_clients_at_once_get_what_each_would_get_alone(self):
        local = self.start(Server)
        expected = [local.complete(p)["content"] for p in PROMPTS]
        local.stop()
        backends = [self.start(Backend) for _ in range(3)]
        for n, extra in ((2, ()), (3, ()), (3, ("--rpc-relay",)), (2, ("-ub", "8"))):
            server = self.start(Server, backends[:n], extra=("-np", 8, *extra))
            answers = [None] * len(PROMPTS)

            def ask(i, server=server, answers=answers):
                answers[i] = "".join(e["content"] for e in Stream(server, PROMPTS[i], n_predict=24).events())

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(answers, expected, f"{n} backends {extra}")
            self.assertEqual(inputs(server.log)[1:], ["relayed" if "--rpc-relay" in extra else "direct"] * (n - 1))
            server.stop()

    def test_whatever_an_answer_needs_of_the_logits_comes_back(self):
        requests = [dict(temperature=1.2, seed=3), dict(temperature=0.8, top_k=0, top_p=0.99, min_p=0, seed=4),
                    dict(temperature=1.0, typical_p=0.8, seed=5), dict(temperature=0.9, mirostat=2, seed=6),
                    dict(temperature=1.0, seed=7, repeat_penalty=1.5, frequency_penalty=0.5), dict(n_probs=12),
                    dict(temperature=1.0, seed=8, logit_bias=[[40, 5], [41, -3], [300, 2]]),
                    dict(temperature=1.0, seed=9, grammar='root ::= [a-f0-9]+'), dict(ignore_eos=True, n_predict=60)]

        def answers(server):
            result = []
            for fields in requests:
                answer = server.complete(PROMPTS[1], return_tokens=True, **fields)
                result.append((answer["tokens"], answer.get("completion_probabilities")))
            return result

        local = self.start(Server)
        expected = answers(local)
        local.stop()
        server = self.start(Server, [self.start(Backend), self.start(Backend)])
        self.assertEqual(inputs(server.log), ["server", "direct"])
        self.assertEqual(answers(server), expected)

    def test_backends_without_a_token_hand_on_too(self):
        server = self.start(Server, [self.start(Backend, token=None), self.start(Backend, token=None)], token=None)
        self.assertEqual(inputs(server.log), ["server", "direct"])
        self.assertTrue(server.complete(PROMPTS[0])["content"])

    def test_a_backend_that_others_do_not_reach_is_relayed(self):
        hidden = f"127.0.0.1:{free_port()}"
        backends = [self.start(Backend), self.start(Backend, extra=("--advertise", hidden)), self.start(Backend)]
        server = self.start(Server, backends)
        self.assertEqual(inputs(server.log), ["server", "relayed", "direct"])
        server.wait_for(rf"relayed by this server: .*{hidden}")
        local = self.start(Server)
        self.assertEqual(server.complete(PROMPTS[0])["content"], local.complete(PROMPTS[0])["content"])

    def test_an_address_that_leads_to_another_backend_is_noticed(self):
        first = self.start(Backend)
        second = self.start(Backend, extra=("--advertise", first.address))
        server = self.start(Server, [first, second])
        self.assertEqual(inputs(server.log), ["server", "relayed"])
        server.wait_for("is another backend")
        self.assertTrue(server.complete(PROMPTS[0])["content"])

    def test_an_answer_goes_on_when_the_connection_between_two_backends_is_lost(self):
        local = self.start(Server)
        expected = local.complete(PROMPTS[0], n_predict=200, ignore_eos=True)["content"]
        local.stop()
        proxy = Proxy()
        self.addCleanup(proxy.stop)
        first = self.start(Backend, extra=("--metrics-port", 0))
        second = self.start(Backend, extra=("--advertise", proxy.address))
        proxy.target = second.port
        server = self.start(Server, [first, second])
        self.assertEqual(inputs(server.log), ["server", "direct"])
        metrics = first.wait_for(r"metrics on (http://127\.0\.0\.1:\d+)").group(1) + "/metrics"

        def value(name):
            text = urllib.request.urlopen(metrics, timeout=10).read().decode()
            return sum(float(found) for found in re.findall(rf"^caravan_{name}(?:\{{.*\}})? (\S+)$", text, re.M))

        self.wait_until(lambda: value("stage_next_rtt_seconds") > 0)
        self.assertEqual(value("hops_lost_total"), 0)
        stream = Stream(server, PROMPTS[0], n_predict=200, ignore_eos=True)
        events = stream.events()
        text = next(events)["content"]
        proxy.stop()
        text += "".join(event["content"] for event in events)
        self.assertEqual(text, expected)
        self.assertEqual(inputs(server.log), ["server", "relayed"])
        self.assertGreaterEqual(value("hops_lost_total"), 1)
        self.assertTrue(first.alive() and second.alive() and server.alive())


if __name__ == "__main__":
    unittest.main()
