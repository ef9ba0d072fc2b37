"""Chats of one local server: three protocols over the same model, streams, templates."""

import json
import unittest

from harness import ClusterTest, Server, free_port, run, DEMO_MODEL

MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]


def events_of(text):
    """The data of every event of a stream but [DONE], and the names that events have."""
    data, names = [], []
    for event in text.split("\n\n"):
        lines = event.splitlines()
        if not lines:
            continue
        names += [line[7:] for line in lines if line.startswith("event: ")]
        payload = next(line[6:] for line in lines if line.startswith("data: "))
        if payload != "[DONE]":
            data.append(json.loads(payload))
    return data, names


class Chats(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(extra=("--alias", "demo", "-c", "1024"))

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0, cls.server.log

    def chat(self, path="/v1/chat/completions", **more):
        status, answer = self.server.post(path, {"messages": MESSAGES, "temperature": 0, "max_tokens": 24, **more})
        self.assertEqual(status, 200, answer)
        return answer

    def stream(self, path, body):
        status, _, text = self.server.request("POST", path, {**body, "stream": True})
        self.assertEqual(status, 200, text)
        return events_of(text)

    def test_an_answer_is_the_same_whole_streamed_and_as_a_completion_of_the_rendered_prompt(self):
        whole = self.chat()
        content = whole["choices"][0]["message"]["content"]
        self.assertEqual((whole["object"], whole["model"]), ("chat.completion", "demo"))
        self.assertEqual(whole["usage"]["completion_tokens"], 24)
        chunks, _ = self.stream("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 24})
        self.assertEqual("".join(c["choices"][0]["delta"].get("content") or "" for c in chunks), content)
        self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "length")
        prompt = self.server.post("/apply-template", {"messages": MESSAGES})[1]["prompt"]
        self.assertIn(MESSAGES[0]["content"], prompt)
        self.assertEqual(self.server.complete(prompt, n_predict=24)["content"].strip(), content.strip())

    def test_the_protocols_agree(self):
        content = self.chat()["choices"][0]["message"]["content"]
        status, message = self.server.post("/v1/messages", {"messages": MESSAGES, "temperature": 0, "max_tokens": 24})
        self.assertEqual((status, message["stop_reason"]), (200, "max_tokens"), message)
        self.assertEqual(message["content"], [{"type": "text", "text": content}])
        status, response = self.server.post("/v1/responses", {"input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": 24})
        self.assertEqual((status, response["status"]), (200, "completed"), response)
        self.assertEqual(response["output"][0]["content"][0]["text"], content)
        data, names = self.stream("/v1/messages", {"messages": MESSAGES, "temperature": 0, "max_tokens": 24})
        self.assertEqual((names[0], names[-1]), ("message_start", "message_stop"))
        self.assertEqual("".join(d.get("delta", {}).get("text", "") for d in data), content)
        data, names = self.stream("/v1/responses", {"input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": 24})
        self.assertEqual((names[0], names[-1]), ("response.created", "response.completed"))
        self.assertEqual("".join(d["delta"] for d in data if d["type"] == "response.output_text.delta"), content)

    def test_tokens_can_be_counted(self):
        used = self.chat()["usage"]["prompt_tokens"]
        self.assertEqual(self.server.post("/v1/chat/completions/input_tokens", {"messages": MESSAGES})[1]["input_tokens"], used)
        self.assertEqual(self.server.post("/v1/messages/count_tokens", {"messages": MESSAGES})[1]["input_tokens"], used)

    def test_images_are_refused_by_name(self):
        body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]}
        status, answer = self.server.post("/v1/chat/completions", body)
        self.assertEqual(status, 400, answer)
        self.assertIn("image_url", answer["error"]["message"])


TOOLS = [{"type": "function", "function": {"name": "tell", "parameters": {
    "type": "object", "required": ["animal", "n_lines"],
    "properties": {"animal": {"enum": ["fox", "owl"]}, "n_lines": {"type": "integer", "minimum": 1, "maximum": 9}}}}}]


class Tools(ClusterTest):
    """A family that writes parameters without JSON."""

    @classmethod
    def setUpClass(cls):
        template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{# <tool_call><function=NAME> #}"
        cls.server = Server(extra=("--chat-template", template, "-c", "1024"))

    @classmethod
    def tearDownClass(cls):
        assert cls.server.stop() == 0, cls.server.log

    def body(self, **more):
        return {"messages": MESSAGES, "temperature": 0, "max_tokens": 64, "tools": TOOLS, **more}

    def both_ways(self, body):
        """The message of an answer, which is the same whole and streamed."""
        status, answer = self.server.post("/v1/chat/completions", body)
        self.assertEqual(status, 200, answer)
        message = answer["choices"][0]["message"]
        status, _, text = self.server.request("POST", "/v1/chat/completions", {**body, "stream": True})
        self.assertEqual(status, 200, text)
        deltas = [c["choices"][0]["delta"] for c in events_of(text)[0]]
        self.assertEqual("".join(d.get("content") or "" for d in deltas), message.get("content") or "")
        functions = [call["function"] for d in deltas for call in d.get("tool_calls", [])]
        self.assertEqual("".join(f.get("name", "") + f.get("arguments", "") for f in functions),
                         "".join(c["function"]["name"] + c["function"]["arguments"] for c in message.get("tool_calls", [])))
        return message

    def test_a_model_that_may_call_writes_as_if_it_could_not(self):
        message = self.both_ways(self.body())
        prompt = self.server.post("/apply-template", self.body())[1]["prompt"]
        self.assertEqual(message["content"].strip(), self.server.complete(prompt, n_predict=64)["content"].strip())
        self.assertNotIn("tool_calls", message)

    def test_a_model_that_must_call_writes_a_call_that_its_schema_accepts(self):
        for temperature in (0, 1.5):
            message = self.both_ways(self.body(tool_choice="required", temperature=temperature, seed=3, max_tokens=400))
            function = message["tool_calls"][0]["function"]
            arguments = json.loads(function["arguments"])
            self.assertEqual(function["name"], "tell")
            self.assertIn(arguments["animal"], ("fox", "owl"))
            self.assertIn(arguments["n_lines"], range(1, 10))

    def test_a_schema_that_is_not_supported_fails_only_a_forced_call(self):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"a": {"type": "string", "pattern": "^x"}}}}}]
        self.assertEqual(self.server.post("/v1/chat/completions", self.body(tools=tools, max_tokens=4))[0], 200)
        status, answer = self.server.post("/v1/chat/completions", self.body(tools=tools, tool_choice="required"))
        self.assertEqual(status, 501, answer)
        self.assertIn("pattern", answer["error"]["message"])
        status, answer = self.server.post("/v1/chat/completions", self.body(response_format={"type": "json_object"}))
        self.assertEqual(status, 400, answer)
        self.assertIn("response_format", answer["error"]["message"])


class Templates(ClusterTest):
    def test_a_template_can_be_given_by_name_or_as_source(self):
        for template, expected in (("llama3", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
                                   ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[Hi]")):
            server = Server(extra=("--chat-template", template, "-c", "512"))
            try:
                prompt = server.post("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})[1]["prompt"]
                self.assertIn(expected, prompt)
            finally:
                self.assertEqual(server.stop(), 0, server.log)

    def test_a_bad_template_ends_the_server_at_the_start(self):
        for template, word in (("nothing-known", "chatml"), ("{% if %}", "line 1")):
            ended = run("server", "-m", DEMO_MODEL, "--port", free_port(), "--chat-template", template)
            self.assertEqual(ended.returncode, 1)
            self.assertIn(word, ended.stdout + ended.stderr)


if __name__ == "__main__":
    unittest.main()
