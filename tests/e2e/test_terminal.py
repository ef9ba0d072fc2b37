"""The conversation of `caravan cli`: typed on a pseudo-terminal, and piped."""

import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import tempfile
import time
import unittest

from harness import DEMO_MODEL, EXECUTABLE, clean_environment, run

# Every message as "[role]content" on a line of its own: what the model sees is easy to predict and long enough to tell.
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
CHAT = ("cli", "-m", DEMO_MODEL, "-t", "1", "--temp", "0", "-n", "8", "--chat-template", TEMPLATE)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9A-B]?|\r")


class Terminal:
    """caravan on a pseudo-terminal."""

    def __init__(self, *arguments, **environment):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            env = clean_environment(TERM="xterm", **environment)
            if "NO_COLOR" not in environment:
                env.pop("NO_COLOR", None)
            os.execve(EXECUTABLE, [EXECUTABLE, *arguments], env)
        self.raw = ""
        self.seen = 0  # how much of the text wait_for() has passed

    @property
    def text(self):
        return ESCAPES.sub("", self.raw)

    def _read(self, timeout):
        if not select.select([self.master], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self.master, 4096)
        except OSError:  # what Linux says when the other end is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def wait_for(self, pattern, timeout=30):
        """Waits for pattern in what came since the last match."""
        deadline = time.monotonic() + timeout
        while True:
            match = re.compile(pattern).search(self.text, self.seen)
            if match:
                self.seen = match.end()
                return match
            if time.monotonic() > deadline or not self._read(0.1):
                raise AssertionError(f"'{pattern}' did not come; the screen:\n{self.text}")

    def type(self, text):
        os.write(self.master, text.encode())

    def exit_status(self, timeout=20):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it did not end; the screen:\n{self.text}")

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


class TypedConversation(unittest.TestCase):
    def start(self, *arguments, **environment):
        terminal = Terminal(*CHAT, *arguments, **environment)
        self.addCleanup(terminal.close)
        terminal.wait_for(r"/help")
        terminal.wait_for(r"> $")
        return terminal

    def test_messages_are_edited_answered_and_kept(self):
        terminal = self.start()
        terminal.type("Hellp\x7fo\\\nthere\n")   # backspace, and a second line
        terminal.wait_for(r"tokens/s \]\s+> $")
        terminal.type("/stats\n")
        terminal.wait_for(r"messages: 2\s")
        terminal.type("\x1b[A\n")   # the line before: /stats again
        terminal.wait_for(r"messages: 2\s")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "chat.json")
            terminal.type(f"/save {path}\n")
            terminal.wait_for(r"saved 2 messages")
            saved = json.loads(pathlib.Path(path).read_text())
            self.assertEqual(saved["messages"][0], {"role": "user", "content": "Hello\nthere"})
            self.assertEqual(saved["messages"][1]["role"], "assistant")
            terminal.type("/clear\n/stats\n")
            terminal.wait_for(r"messages: 0\s")
            terminal.type(f"/load {path}\n/regen\n")
            terminal.wait_for(r"loaded 2 messages")
            terminal.wait_for(r"tokens/s \]")
        terminal.type("/nonsense\n")
        terminal.wait_for(r"unknown command /nonsense")
        terminal.type("\x04")   # Ctrl-D
        self.assertEqual(terminal.exit_status(), 0)

    def test_an_interrupt_stops_the_answer_and_the_next_one_quits(self):
        terminal = self.start("-n", "-1", "-c", "60000", "--ignore-eos")
        terminal.type("Once upon a time\n")
        terminal.wait_for(r"\w+ \w+ \w+ \w+ \w+")
        terminal.wait_for(r"\w+ \w+ \w+")   # the answer is on its way
        terminal.type("\x03")
        terminal.wait_for(r"\[interrupted\]")
        terminal.wait_for(r"> $")
        terminal.type("\x03")
        self.assertEqual(terminal.exit_status(), 130)

    def test_characters_of_several_bytes_are_typed(self):
        terminal = self.start()
        terminal.type("Café 中\n")
        terminal.wait_for(r"tokens/s \]")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "chat.json")
            terminal.type(f"/save {path}\n")
            terminal.wait_for("saved")
            self.assertEqual(json.loads(pathlib.Path(path).read_text())["messages"][0]["content"], "Café 中")
        terminal.type("/exit\n")
        self.assertEqual(terminal.exit_status(), 0)

    def test_colours_are_off_with_no_color(self):
        for environment, expected in (({}, True), ({"NO_COLOR": "1"}, False)):
            terminal = self.start(**environment)
            terminal.type("Hello\n")
            terminal.wait_for(r"tokens/s \]")
            terminal.type("/exit\n")
            self.assertEqual(terminal.exit_status(), 0)
            self.assertEqual("\x1b[2m" in terminal.raw, expected, environment)


class PipedConversation(unittest.TestCase):
    def talk(self, text, *arguments):
        return subprocess.run([EXECUTABLE, *CHAT, *arguments], input=text, capture_output=True, text=True, errors="replace",
                              timeout=60, env=clean_environment(), check=False)

    def test_standard_output_holds_answers_only(self):
        first = self.talk("Hello\n")
        self.assertEqual(first.returncode, 0, first.stderr)
        both = self.talk("Hello\n/stats\nAnd then?\n")
        self.assertEqual(both.returncode, 0, both.stderr)
        self.assertTrue(both.stdout.startswith(first.stdout))
        self.assertGreater(len(both.stdout), len(first.stdout))
        self.assertNotIn("\x1b", both.stdout + both.stderr)
        self.assertIn("messages: 2", both.stderr)
        self.assertEqual(both.stderr.count("tokens/s ]"), 3)

    def test_the_model_sees_what_the_template_makes_of_the_conversation(self):
        continued = run(*CHAT, "-no-cnv", "-p", "[system]Be brief.\n[user]Hello\n", "--no-display-prompt")
        talked = self.talk("Hello\n", "-sys", "Be brief.")
        self.assertEqual(talked.returncode, 0, talked.stderr)
        self.assertEqual(talked.stdout.strip(), continued.stdout.replace("[end of text]", "").strip())

    def test_a_single_turn_needs_no_input(self):
        result = run(*CHAT, "-cnv", "-st", "-p", "Hello")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stdout, self.talk("Hello\n").stdout)
        self.assertIn("needs the message", run(*CHAT, "-st").stderr)

    def test_reasoning_is_marked(self):
        result = self.talk("Hello\n", "--chat-template", TEMPLATE + "<think>\n")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.startswith("[Start thinking]\n"))
        self.assertIn("\n[End thinking]\n", result.stdout)

    def test_a_script_hears_of_errors(self):
        for text, word in (("/load /nonexistent\n", "/nonexistent"), ("/nonsense\n", "/nonsense"), ("/regen\n", "no answer")):
            result = self.talk(text)
            self.assertEqual((result.returncode, word in result.stderr), (1, True), result.stderr)
        result = self.talk("Hello\n", "--chat-template", "{{ raise_exception('only poems') }}")
        self.assertEqual((result.returncode, "only poems" in result.stderr), (1, True), result.stderr)

    def test_what_cannot_be_a_conversation_is_refused(self):
        result = run("cli", "-m", DEMO_MODEL, "-cnv", "--chat-template", "no-such-name")
        self.assertEqual((result.returncode, "no-such-name" in result.stderr), (1, True))
        result = run("cli", "-m", DEMO_MODEL, "-cnv", "--chat-template", "{{ nothing closes")
        self.assertEqual((result.returncode, "TemplateSyntaxError" in result.stderr), (1, True), result.stderr)

    def test_downloads_say_what_to_do_instead(self):
        for flag in ("-hf", "-hfr", "--hf-repo", "-mu"):
            result = run("cli", flag, "user/model")
            self.assertEqual(result.returncode, 1)
            for word in (flag, "not supported", "curl", "-m FILE"):
                self.assertIn(word, result.stderr)


if __name__ == "__main__":
    unittest.main()
