"""The prefix cache of a running server: what is reused, and that answers do not change by it."""

import threading

from harness import Backend, ClusterTest, Server, kit_model

STORY = "Once upon a time there was a fox named Lily. She lived in a small house near the river. " * 4
QUESTIONS = ["Every day she", "One day, a bear", "Her friend Tom", "She was very"]


class PrefixCache(ClusterTest):
    def answers(self, server, **fields):
        return [server.complete(STORY + q, n_predict=16, return_tokens=True, **fields) for q in QUESTIONS]

    def check(self, server):
        expected = [a["tokens"] for a in self.answers(server, cache_prompt=False)]
        first, second = self.answers(server), self.answers(server)
        self.assertEqual([a["tokens"] for a in first], expected)
        self.assertEqual([a["tokens"] for a in second], expected)
        self.assertEqual(first[0]["timings"]["cache_n"], 0)
        shared = len(server.post("/tokenize", {"content": STORY, "add_special": True})[1]["tokens"])
        for answer in first[1:]:
            self.assertGreaterEqual(answer["timings"]["cache_n"], shared - 1)  # the last token may join with what follows
        for answer in second:
            self.assertEqual(answer["timings"]["prompt_n"], 1)
            self.assertEqual(answer["timings"]["cache_n"] + 1, answer["tokens_evaluated"])
        # Sampled answers, and several at the same time.
        sampled = [server.complete(STORY + q, temperature=1.0, seed=5, cache_prompt=False)["content"] for q in QUESTIONS]
        found = [None] * len(QUESTIONS)

        def ask(i):
            found[i] = server.complete(STORY + QUESTIONS[i], temperature=1.0, seed=5)["content"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(QUESTIONS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(found, sampled)

    def test_a_local_model_answers_the_same_with_and_without_the_cache(self):
        server = self.start(Server)
        self.check(server)
        self.assertGreater(server.metric("prompt_tokens_cached_total"), 0)

    def test_a_split_model_answers_the_same_with_and_without_the_cache(self):
        self.check(self.start(Server, [self.start(Backend), self.start(Backend)]))

    def test_a_model_with_sliding_windows_answers_the_same_with_and_without_the_cache(self):
        server = self.start(Server, model=kit_model("gemma3-dense.gguf"))  # without a vocabulary: token ids
        story = [3 + 17 * i % 120 for i in range(100)]
        prompts = [story + [7 + i, 8, 9] for i in range(4)] + [story[:50], story[:50] + [5, 6]]

        def tokens(**fields):
            return [server.complete(p, n_predict=16, ignore_eos=True, return_tokens=True, **fields) for p in prompts]

        expected = [a["tokens"] for a in tokens(cache_prompt=False)]
        first, second = tokens(), tokens()
        self.assertEqual([a["tokens"] for a in first], expected)
        self.assertEqual([a["tokens"] for a in second], expected)
        self.assertGreater(first[1]["timings"]["cache_n"], 0)
        self.assertEqual(second[5]["timings"]["prompt_n"], 1)

    def test_a_lost_backend_empties_the_cache(self):
        backends = [self.start(Backend), self.start(Backend)]
        server = self.start(Server, backends)
        expected = server.complete(STORY)["content"]
        self.assertGreater(server.complete(STORY)["timings"]["cache_n"], 0)
        backends[1].kill()
        backends.append(self.start(Backend, port=backends[1].port))
        self.wait_until(lambda: server.post("/completion", {"prompt": STORY, "n_predict": 1})[0] == 200, timeout=40)
        answer = server.complete(STORY)
        self.assertEqual(answer["content"], expected)

    def test_the_server_can_be_told_not_to_reuse(self):
        server = self.start(Server, extra=("--no-cache-prompt",))
        server.complete(STORY)
        self.assertEqual(server.complete(STORY)["timings"]["cache_n"], 0)
        server.complete(STORY, cache_prompt=True)
        self.assertGreater(server.complete(STORY, cache_prompt=True)["timings"]["cache_n"], 0)
