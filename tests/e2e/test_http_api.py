"""The HTTP API of one local server: shapes, statuses, errors."""

import json
import math
import unittest

from harness import ClusterTest, Server, Stream, kit_model

PROMPT = "Once upon a time there was a fox named Lily."


class HttpApi(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(extra=("--alias", "demo", "-c", "512"))

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0, cls.server.log

    def error(self, path, body, code, kind, *words):
        status, answer = self.server.post(path, body)
        self.assertEqual((status, answer["error"]["code"], answer["error"]["type"]), (code, code, kind), answer)
        for word in words:
            self.assertIn(word, answer["error"]["message"])

    def test_health_livez_models_and_props(self):
        self.assertEqual(json.loads(self.server.get("/health")[1]), {"status": "ok"})
        self.assertEqual(self.server.get("/livez")[0], 200)
        models = json.loads(self.server.get("/v1/models")[1])
        self.assertEqual(models["data"][0]["id"], "demo")
        self.assertEqual(models["object"], "list")
        props = json.loads(self.server.get("/props")[1])
        self.assertTrue(props["model_path"].endswith(".gguf"))
        self.assertEqual(props["default_generation_settings"]["n_ctx"], 512)
        self.assertEqual(props["plan"]["stages"][0]["device"], "local")

    def test_a_completion_has_the_documented_members(self):
        answer = self.server.complete(PROMPT, n_predict=8)
        self.assertEqual((answer["stop"], answer["stop_type"], answer["tokens_predicted"], answer["model"]), (True, "limit", 8, "demo"))
        self.assertTrue(answer["stopped_limit"])
        self.assertEqual(answer["timings"]["predicted_n"], 8)
        self.assertEqual(answer["timings"]["prompt_n"] + answer["timings"]["cache_n"], answer["tokens_evaluated"])
        self.assertEqual(answer["generation_settings"]["temperature"], 0)

    def test_a_stream_gives_the_same_text_in_pieces(self):
        whole = self.server.complete(PROMPT, n_predict=32)["content"]
        events = list(Stream(self.server, PROMPT, n_predict=32).events())
        self.assertEqual("".join(e["content"] for e in events), whole)
        self.assertTrue(all(not e["stop"] for e in events[:-1]) and events[-1]["stop"])
        self.assertEqual(events[-1]["tokens_predicted"], 32)

    def test_prompts_may_be_text_tokens_mixed_or_several(self):
        tokens = self.server.post("/tokenize", {"content": PROMPT})[1]["tokens"]
        expected = self.server.complete(PROMPT)["content"]
        self.assertEqual(self.server.complete(tokens)["content"], expected)
        several = self.server.complete([PROMPT, tokens])
        self.assertEqual([a["content"] for a in several], [expected, expected])
        self.assertEqual([a["index"] for a in several], [0, 1])

    def test_stop_strings_end_the_answer_and_are_cut_off(self):
        whole = self.server.complete(PROMPT, n_predict=48)["content"]
        word = whole.split()[6]
        answer = self.server.complete(PROMPT, n_predict=48, stop=[word])
        self.assertEqual((answer["stop_type"], answer["stopping_word"]), ("word", word))
        self.assertEqual(answer["content"], whole[:whole.index(word)])

    def test_probabilities_of_the_chosen_token_and_the_best_ones(self):
        answer = self.server.complete(PROMPT, n_predict=4, n_probs=5)
        steps = answer["completion_probabilities"]
        self.assertEqual(len(steps), 4)
        for step in steps:
            self.assertEqual(len(step["top_logprobs"]), 5)
            self.assertEqual(step["id"], step["top_logprobs"][0]["id"])   # greedy
            self.assertLessEqual(sum(math.exp(p["logprob"]) for p in step["top_logprobs"]), 1.0001)

    def test_logit_bias_bans_a_token(self):
        first = self.server.complete(PROMPT, n_predict=1, return_tokens=True)["tokens"][0]
        for bias in ([[first, False]], {str(first): -1000.0}):
            self.assertNotEqual(self.server.complete(PROMPT, n_predict=1, return_tokens=True, logit_bias=bias)["tokens"][0], first)

    def test_the_same_seed_gives_the_same_text_and_others_do_not(self):
        texts = [self.server.complete("A", n_predict=32, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=s)["content"] for s in (1, 1, 2, 3)]
        self.assertEqual(texts[0], texts[1])
        self.assertGreater(len(set(texts)), 1)

    def test_every_sampler_generates_and_the_seed_decides(self):
        for fields in ({"mirostat": 1}, {"mirostat": 2, "mirostat_tau": 3}, {"typical_p": 0.7}, {"top_n_sigma": 1.5},
                       {"xtc_probability": 1, "xtc_threshold": 0.05}, {"dynatemp_range": 0.5}, {"dry_multiplier": 0.8},
                       {"samplers": "kta", "adaptive_target": 0.4}):
            texts = [self.server.complete(PROMPT, temperature=0.9, seed=5, **fields)["content"] for _ in range(2)]
            self.assertEqual(texts[0], texts[1], fields)
            self.assertTrue(texts[0], fields)

    def test_dry_keeps_pairs_of_tokens_from_coming_back(self):
        dry = {"dry_multiplier": 30, "dry_allowed_length": 1, "dry_sequence_breakers": ["@@"], "ignore_eos": True}
        n_repeated = []
        for fields in ({}, dry):
            tokens = self.server.complete(PROMPT, n_predict=60, return_tokens=True, **fields)["tokens"]
            pairs = list(zip(tokens, tokens[1:]))
            n_repeated.append(len(pairs) - len(set(pairs)))
        self.assertGreater(n_repeated[0], 0)
        self.assertEqual(n_repeated[1], 0)

    def test_response_fields_select_members(self):
        answer = self.server.complete(PROMPT, n_predict=2, response_fields=["content", "generation_settings/n_predict"])
        self.assertEqual(sorted(answer), ["content", "generation_settings/n_predict"])

    def test_tokenize_and_detokenize_are_inverse(self):
        text = "Grüße, 世界! \n 1 + 1"
        tokens = self.server.post("/tokenize", {"content": text})[1]["tokens"]
        self.assertEqual(self.server.post("/detokenize", {"tokens": tokens})[1]["content"], text)
        pieces = self.server.post("/tokenize", {"content": "Hello", "with_pieces": True})[1]["tokens"]
        self.assertEqual("".join(p["piece"] for p in pieces), "Hello")

    def test_embeddings_of_a_language_model(self):
        status, answer = self.server.post("/embeddings", {"content": "a fox"})
        self.assertEqual(status, 200, answer)
        vector = answer[0]["embedding"][0]
        self.assertAlmostEqual(sum(x * x for x in vector), 1.0, places=4)

    def test_bad_requests_are_named(self):
        invalid = "invalid_request_error"
        self.error("/completion", "{", 400, invalid, "JSON")
        self.error("/completion", "[1]", 400, invalid, "object")
        self.error("/completion", "[" * 10000, 400, invalid)
        self.error("/completion", {}, 400, invalid, "prompt")
        self.error("/completion", {"prompt": 5}, 400, invalid, "prompt")
        self.error("/completion", {"prompt": [1, 10 ** 9]}, 400, invalid, "token id")
        self.error("/completion", {"prompt": "x", "n_predict": "many"}, 400, invalid, "n_predict")
        self.error("/completion", {"prompt": "x", "n_predict": -2}, 400, invalid, "n_predict", "must be")
        self.error("/completion", {"prompt": "x", "top_k": 1.5}, 400, invalid, "top_k")
        self.error("/completion", {"prompt": "x", "samplers": ["topk"]}, 400, invalid, "topk")
        self.error("/tokenize", {}, 400, invalid, "content")
        self.error("/detokenize", {"tokens": [-1]}, 400, invalid)
        self.error("/embeddings", {}, 400, invalid, "input")

    def test_a_grammar_or_a_schema_gives_the_answer_its_form(self):
        digits = self.server.complete("Once upon a time", n_predict=30, grammar='root ::= [0-9]{3} "-" [0-9]{2}', seed=3)
        self.assertRegex(digits["content"], r"^[0-9]{3}-[0-9]{2}$")
        self.assertEqual(digits["stop_type"], "eos")
        schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer",
                  "minimum": 5, "maximum": 17}, "kind": {"enum": ["a", "b"]}}, "required": ["name", "n", "kind"]}
        for seed in range(3):
            answer = self.server.complete("An object:", n_predict=200, json_schema=schema, seed=seed, temperature=1.5)
            value = json.loads(answer["content"])
            self.assertEqual(set(value), {"name", "n", "kind"})
            self.assertTrue(5 <= value["n"] <= 17 and value["kind"] in "ab" and len(value["name"]) <= 8, value)
        again = [self.server.complete("x", n_predict=40, seed=9, response_format={"type": "json_object"})["content"]
                 for _ in range(2)]
        self.assertEqual(again[0], again[1])
        self.assertTrue(again[0].startswith("{"))
        lazy = self.server.complete("Once upon a time", n_predict=60, seed=1, grammar='root ::= "e" "!"{3}',
                                    grammar_lazy=True, grammar_triggers=[{"type": 1, "value": "e"}])["content"]
        self.assertRegex(lazy, r"^[^e]*(e!!!)?$")
        invalid = "invalid_request_error"
        self.error("/completion", {"prompt": "x", "grammar": 'root ::= "a'}, 400, invalid, "grammar line 1, column 10")
        self.error("/completion", {"prompt": "x", "grammar": "root ::= root"}, 400, invalid, "left-recursive")
        self.error("/completion", {"prompt": "x", "json_schema": {"not": {}}}, 400, invalid, "#/not")

    def test_known_but_unsupported_fields_and_endpoints_answer_501(self):
        for field, value in (("lora", [{"id": 0, "scale": 1}]), ("n_cache_reuse", 5)):
            self.error("/completion", {"prompt": "x", field: value}, 501, "not_supported_error", field)
        self.assertEqual(self.server.complete("Hello", n_predict=1, grammar="", mirostat=0)["tokens_predicted"], 1)

    def test_a_prompt_that_cannot_fit_is_refused_with_its_size(self):
        status, answer = self.server.post("/completion", {"prompt": [65] * 600})
        self.assertEqual((status, answer["error"]["type"]), (400, "exceed_context_size_error"))
        self.assertEqual((answer["error"]["n_prompt_tokens"], answer["error"]["n_ctx"]), (600, 512))
        self.assertIn("exceeds the available context size", answer["error"]["message"])

    def test_the_context_limit_ends_an_answer(self):
        answer = self.server.complete(PROMPT, n_predict=-1, ignore_eos=True)
        self.assertEqual((answer["stop_type"], answer["truncated"]), ("limit", True))
        self.assertEqual(answer["tokens_evaluated"] + answer["tokens_predicted"], 512)

    def test_unknown_paths_and_methods(self):
        self.assertEqual(self.server.get("/nothing")[0], 404)
        self.assertEqual(self.server.get("/completion")[0], 405)

    def test_preflight_and_origin(self):
        status, headers, _ = self.server.request("OPTIONS", "/completion", headers={"Origin": "http://a.example"})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (200, "http://a.example"))


class Keys(ClusterTest):
    def test_without_the_key_only_public_pages_answer(self):
        server = self.start(Server, extra=("--api-key", "first,second"))
        self.assertEqual(server.get("/health")[0], 200)
        self.assertEqual(server.get("/v1/models")[0], 200)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "firs"}):
            status, answer = server.post("/completion", {"prompt": "x"}, headers)
            self.assertEqual((status, answer["error"]["type"]), (401, "authentication_error"))
        for headers in ({"Authorization": "Bearer second"}, {"X-Api-Key": "first"}, {"Authorization": "first"}):
            self.assertEqual(server.post("/completion", {"prompt": "x", "n_predict": 1}, headers)[0], 200)


class Poolings(ClusterTest):
    def test_every_row_of_a_long_text_can_be_pooled_whatever_a_step_gives(self):
        text = {"content": "Once upon a time there was a fox named Lily. " * 12}
        vectors = []
        for ubatch in (512, 9):
            server = self.start(Server, extra=("--pooling", "mean", "-ub", ubatch))
            status, answer = server.post("/embeddings", text)
            self.assertEqual(status, 200, answer)
            vectors.append(answer[0]["embedding"][0])
            server.stop()
        self.assertEqual(vectors[0], vectors[1])
        server = self.start(Server, extra=("--pooling", "none"))
        n_tokens = len(server.post("/tokenize", text)[1]["tokens"])
        self.assertEqual(len(server.post("/embeddings", text)[1][0]["embedding"]), n_tokens)


class Encoder(ClusterTest):
    def test_an_encoder_embeds_and_does_not_generate(self):
        server = self.start(Server, model=kit_model("bert-dense.gguf"))
        status, answer = server.post("/embedding", {"input": ["first text", "second text"]})
        self.assertEqual((status, [a["index"] for a in answer]), (200, [0, 1]))
        self.assertEqual(server.post("/completion", {"prompt": "x"})[0], 501)
        self.assertEqual(server.post("/embedding", {"content": "word " * 2000})[0], 400)


if __name__ == "__main__":
    unittest.main()
