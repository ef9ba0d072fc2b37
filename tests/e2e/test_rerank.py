"""Reranking with a real encoder: the kit's BERT with a classifier added, against the same classifier computed here."""

import math
import pathlib
import random
import struct
import tempfile

from harness import ClusterTest, Server, kit_model, run

ALIGNMENT = 32
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def with_tensors(data, tensors):
    """A GGUF file of default alignment with f32 tensors (name, dimensions, values) added."""
    at = 8

    def read(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def advance(n_bytes):
        nonlocal at
        at += n_bytes

    def skip(kind):
        if kind == 8:
            advance(read("Q"))
        elif kind == 9:
            element, count = read("I"), read("Q")
            for _ in range(count):
                skip(element)
        else:
            advance(VALUE_BYTES[kind])

    n_tensors, n_entries = read("Q"), read("Q")
    for _ in range(n_entries):
        advance(read("Q"))
        skip(read("I"))
    for _ in range(n_tensors):
        advance(read("Q"))
        advance(8 * read("I") + 12)
    head_end, data_begin = at, (at + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    weights = bytearray(data[data_begin:])
    infos = b""
    for name, dimensions, values in tensors:
        weights += b"\0" * (-len(weights) % ALIGNMENT)
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, 0, len(weights))
        weights += struct.pack(f"<{len(values)}f", *values)
    head = data[:8] + struct.pack("<Q", n_tensors + len(tensors)) + data[16:head_end] + infos
    return head + b"\0" * (-len(head) % ALIGNMENT) + bytes(weights) + b"\0" * (-len(weights) % ALIGNMENT)


class Rerank(ClusterTest):
    def test_scores_are_those_of_the_classifier_on_the_pooled_row(self):
        base = kit_model("bert-dense.gguf")
        n = int(next(line.split()[-1] for line in run("inspect", base).stdout.splitlines() if "bert.embedding_length" in line))
        randomness = random.Random(1)
        values = lambda count: [struct.unpack("<f", struct.pack("<f", randomness.uniform(-0.3, 0.3)))[0] for _ in range(count)]
        dense, bias, output = values(n * n), values(n), values(n)
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / "reranker.gguf"
            model.write_bytes(with_tensors(pathlib.Path(base).read_bytes(),
                                           [("cls.weight", [n, n], dense), ("cls.bias", [n], bias), ("cls.output.weight", [n, 1], output)]))
            server = self.start(Server, model=str(model), extra=("--reranking", "--pooling", "cls"))
            documents = ["the cat", "a dog sat there", "it rains", "cat"]
            status, answer = server.post("/v1/rerank", {"query": "where is the cat", "documents": documents})
            self.assertEqual(status, 200, answer)
            scores = {r["index"]: r["relevance_score"] for r in answer["results"]}
            self.assertEqual(list(scores.values()), sorted(scores.values(), reverse=True))
            tokens = lambda text: server.post("/tokenize", {"content": text})[1]["tokens"]
            begin, *_, end = server.post("/tokenize", {"content": "x", "add_special": True})[1]["tokens"]
            n_tokens = 0
            for index, document in enumerate(documents):
                pair = [begin, *tokens("where is the cat"), end, *tokens(document)]
                n_tokens += len(pair)
                row = server.post("/embedding", {"input": pair, "embd_normalize": -1})[1][0]["embedding"][0]
                hidden = [math.tanh(bias[i] + sum(w * x for w, x in zip(dense[i * n:(i + 1) * n], row))) for i in range(n)]
                self.assertAlmostEqual(scores[index], sum(w * x for w, x in zip(output, hidden)), places=4)
            self.assertEqual(answer["usage"]["prompt_tokens"], n_tokens)

    def test_a_model_without_a_classifier_is_refused(self):
        result = run("server", "-m", kit_model("bert-dense.gguf"), "--reranking")
        self.assertEqual(result.returncode, 1)
        self.assertIn("ranking head", result.stdout + result.stderr)
