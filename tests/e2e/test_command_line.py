"""The command line: names, help, errors, the terminal tools."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import unittest

from harness import DEMO_MODEL, EXECUTABLE, clean_environment, kit_model, run

COMMANDS = ("server", "backend", "cli", "embedding", "bench", "logits", "inspect", "quantize", "synth",
            "health")


class Names(unittest.TestCase):
    def test_help_lists_every_command_and_each_has_its_own(self):
        overview = run("--help")
        self.assertEqual(overview.returncode, 0)
        for command in COMMANDS:
            self.assertIn(command, overview.stdout)
            result = run(command, "--help")
            self.assertEqual((result.returncode, "usage" in result.stdout.lower()), (0, True), command)

    def test_llama_names_are_the_commands(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, command in (("rpc-server", "backend"), ("llama-server", "server"), ("llama-cli", "cli"),
                                  ("llama-embedding", "embedding"), ("llama-quantize", "quantize")):
                link = pathlib.Path(folder) / name
                os.symlink(EXECUTABLE, link)
                help_text = subprocess.run([link, "--help"], capture_output=True, text=True, check=True).stdout
                self.assertIn(f"caravan {command}", help_text)

    def test_unknown_flags_and_commands_are_errors_with_a_suggestion(self):
        for arguments, suggestion in ((("server", "--ctx-sise", "5"), "--ctx-size"), (("cli", "-m", "x", "--tmep", "1"), "--temp"),
                                      (("backend", "--prot", "1"), "--port"), (("sever",), "server")):
            result = run(*arguments)
            self.assertEqual(result.returncode, 1, arguments)
            self.assertIn(suggestion, result.stderr)

    def test_known_but_unsupported_flags_say_so(self):
        result = run("server", "-m", DEMO_MODEL, "--lora", "x")
        self.assertEqual((result.returncode, "not supported" in result.stderr), (1, True))

    def test_bad_values_name_the_flag(self):
        for arguments, word in ((("server", "--port", "99999"), "--port"), (("backend", "--mem", "lots"), "--mem"),
                                (("cli", "-m", DEMO_MODEL, "-p"), "-p"), (("cli", "-p", "x"), "-m"),
                                (("server", "-m", DEMO_MODEL, "-ctk", "q2"), "q2"),
                                (("server", "-m", "/nonexistent.gguf"), "/nonexistent.gguf"),
                                (("server", "-m", __file__), "GGUF")):
            result = run(*arguments)
            self.assertEqual(result.returncode, 1, arguments)
            self.assertIn(word, result.stderr)


class Cli(unittest.TestCase):
    def test_a_prompt_is_continued_and_the_speed_said(self):
        result = run("cli", "-m", DEMO_MODEL, "-p", "Once upon a time there was a fox named Lily.", "-n", 16, "--temp", 0, "-t", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.startswith("Once upon a time there was a fox named Lily."))
        self.assertGreater(len(result.stdout), 60)
        self.assertIn("tokens/s", result.stderr)

    def test_every_sampler_has_an_option(self):
        options = ("--mirostat", "2", "--mirostat-ent", "3"), ("--dry-multiplier", "0.8", "--xtc-probability", "0.5", "--sampling-seq", "edkxt")
        for chosen in options:
            text = [run("cli", "-m", DEMO_MODEL, "-p", "Once upon a time", "-n", 12, "-s", 3, "-t", 1, *chosen).stdout for _ in range(2)]
            self.assertGreater(len(text[0]), len("Once upon a time"))
            self.assertEqual(text[0], text[1], chosen)
        refused = run("cli", "-m", DEMO_MODEL, "-p", "x", "--adaptive-target", "0.4")
        self.assertEqual((refused.returncode, "samplers" in refused.stderr), (1, True), refused.stderr)

    def test_an_interrupt_ends_the_answer_and_not_the_program(self):
        cli = subprocess.Popen([EXECUTABLE, "cli", "-m", DEMO_MODEL, "-p", "Once upon a time", "-c", "60000", "--ignore-eos", "-t", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=clean_environment())
        self.addCleanup(cli.kill)
        cli.stdout.read(40)   # the answer has begun
        cli.send_signal(signal.SIGINT)
        out, err = cli.communicate(timeout=30)
        self.assertEqual(cli.returncode, 0, err)
        self.assertIn("[interrupted]", out)
        self.assertIn("tokens/s", err)

    def test_interactive_input_continues_the_text(self):
        result = subprocess.run([EXECUTABLE, "cli", "-m", DEMO_MODEL, "-i", "-n", "8", "--temp", "0", "-t", "1"], input="Hello\nOnce\n",
                                capture_output=True, text=True, errors="replace", timeout=60, env=clean_environment(), check=False)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stdout.count("> "), 3)
        self.assertEqual(result.stderr.count("generation:"), 2)

    def test_an_encoder_or_an_unknown_architecture_is_refused(self):
        result = run("cli", "-m", kit_model("bert-dense.gguf"), "-p", "x")
        self.assertEqual((result.returncode, "embedding" in result.stderr), (1, True))
        with tempfile.TemporaryDirectory() as folder:
            # The architecture's name is the first text of that length.
            unknown = pathlib.Path(folder) / "unknown.gguf"
            name = (5).to_bytes(8, "little")
            unknown.write_bytes(pathlib.Path(DEMO_MODEL).read_bytes().replace(name + b"llama", name + b"lamma", 1))
            result = run("cli", "-m", unknown, "-p", "x")
        self.assertEqual(result.returncode, 1)
        for word in ("lamma", "llama", "gemma3", "bert"):
            self.assertIn(word, result.stderr)


class Embedding(unittest.TestCase):
    def setUp(self):
        self.model = kit_model("bert-dense.gguf")

    def embed(self, *arguments):
        result = run("embedding", "-m", self.model, *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_plain_format_prints_one_vector_whole_and_several_in_part(self):
        one = self.embed("-p", "a text")
        self.assertRegex(one, r"^embedding 0: (( *-?\d+\.\d{6}) ){17,}\n$")
        several = self.embed("-p", "a text\\nanother text\\na text").split("\n")
        for i in range(3):
            self.assertRegex(several[i], rf"^embedding {i}: (( *-?\d+\.\d{{6}}) ){{16}}$")
        self.assertEqual(several[3:6], ["", "cosine similarity matrix:", ""])
        self.assertEqual(several[6], "a text anothe a text ")
        self.assertRegex(several[7], r"^  1\.00 +-?\d\.\d\d   1\.00 a text$")
        self.assertRegex(several[8], r"another te$")

    def test_json_formats_hold_the_same_numbers(self):
        data = json.loads(self.embed("-p", "one\\ntwo", "--embd-output-format", "json+"))
        vectors = [entry["embedding"] for entry in data["data"]]
        self.assertEqual([entry["index"] for entry in data["data"]], [0, 1])
        self.assertAlmostEqual(sum(x * x for x in vectors[0]), 1, places=4)
        self.assertAlmostEqual(data["cosineSimilarity"][0][1], sum(a * b for a, b in zip(*vectors)), delta=0.006)
        self.assertNotIn("cosineSimilarity", self.embed("-p", "one\\ntwo", "--embd-output-format", "json"))
        self.assertEqual(json.loads(self.embed("-p", "one\\ntwo", "--embd-output-format", "array")), vectors)
        raw = self.embed("-p", "one\\ntwo", "--embd-output-format", "raw").splitlines()
        self.assertEqual([[float(x) for x in line.split(" ")] for line in raw], vectors)

    def test_texts_are_separated_and_scaled_as_asked(self):
        texts = self.embed("-p", "one<#>two", "--embd-separator", "<#>", "--embd-normalize", "0", "--embd-output-format", "array")
        vectors = json.loads(texts)
        self.assertEqual([max(abs(x) for x in v) for v in vectors], [32760, 32760])
        self.assertTrue(all(x == int(x) for v in vectors for x in v))
        tokens = self.embed("-p", "one two", "--pooling", "none").splitlines()
        self.assertGreater(len(tokens), 2)
        self.assertRegex(tokens[0], r"^embedding 0: (( *-?\d+\.\d{6}) ){3} \.\.\. (( *-?\d+\.\d{6}) ){3}$")
        wrong = run("embedding", "-m", self.model, "-p", "x", "--embd-output-format", "xml")
        self.assertEqual((wrong.returncode, "xml" in wrong.stderr), (1, True))


class Files(unittest.TestCase):
    def test_inspect_and_synth(self):
        result = run("inspect", DEMO_MODEL)
        self.assertEqual((result.returncode, "general.architecture" in result.stdout), (0, True))
        self.assertEqual(run("synth", "--shape", "no-such-shape", "--type", "Q4_0", "-o", "/tmp/x.gguf").returncode, 1)

    def test_a_quantised_model_answers(self):
        with tempfile.TemporaryDirectory() as folder:
            out = str(pathlib.Path(folder) / "small.gguf")
            for arguments, message in (((DEMO_MODEL, out, "Q9_Z"), "Q4_K_M"), ((DEMO_MODEL, out, "Q4_K_M"), "--allow-requantize")):
                refused = run("quantize", *arguments)
                self.assertEqual((refused.returncode, message in refused.stderr), (1, True), refused.stderr)
            self.assertEqual(os.listdir(folder), [])
            result = run("quantize", "--allow-requantize", DEMO_MODEL, out, "Q5_K_M", 2)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(os.listdir(folder), ["small.gguf"])
            self.assertLess(os.path.getsize(out), 0.75 * os.path.getsize(DEMO_MODEL))
            prompt = ("-p", "Once upon a time there was a fox named Lily.", "-n", 8, "--temp", 0, "-t", 1)
            answers = [run("cli", "-m", model, *prompt).stdout for model in (DEMO_MODEL, out)]
            self.assertEqual(answers[0], answers[1], "the first words survive five bits")

    def test_bench_prints_its_table_and_json(self):
        table = run("bench", "-m", DEMO_MODEL, "-p", 16, "-n", 4, "-r", 2, "-t", 1)
        self.assertEqual(table.returncode, 0, table.stderr)
        for word in ("pp16", "tg4", "limits", "GB/s"):
            self.assertIn(word, table.stdout)
        result = run("bench", "-m", DEMO_MODEL, "-p", 16, "-n", 4, "-r", 2, "-t", 1, "-o", "json", env=clean_environment())
        self.assertIn('"weight_bytes_per_s"', result.stdout)


if __name__ == "__main__":
    unittest.main()
