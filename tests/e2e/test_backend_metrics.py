"""What a backend tells about itself over HTTP."""

import http.client
import re
import unittest

from harness import DEMO_MODEL, Backend, ClusterTest, Server


class BackendMetrics(ClusterTest):
    def get(self, port, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        result = response.status, response.read().decode()
        connection.close()
        return result

    def metrics(self, port):
        """Values by name and labels."""
        status, text = self.get(port, "/metrics")
        self.assertEqual(status, 200)
        names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
        values = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, labels, value = re.fullmatch(r"(\w+)(\{.*\})? (\S+)", line).groups()
                self.assertIn(name, names)
                values[name + (labels or "")] = float(value)
        return values

    def test_work_weights_and_stages_are_counted(self):
        backend = self.start(Backend, extra=("--metrics-port", 0))
        port = int(backend.wait_for(r"metrics on http://127\.0\.0\.1:(\d+)").group(1))
        self.assertEqual(self.get(port, "/health"), (200, '{"status":"ok"}'))
        self.assertEqual(self.get(port, "/nothing")[0], 404)
        before = self.metrics(port)
        self.assertEqual((before["caravan_stages"], before["caravan_tickets_total"]), (0, 0))
        server = self.start(Server, [backend])
        server.complete("Once upon a time")
        self.wait_until(lambda: any(key.startswith("caravan_stage_server_rtt_seconds") and value > 0
                                    for key, value in self.metrics(port).items()))
        during = self.metrics(port)
        self.assertEqual((during["caravan_connections"], during["caravan_stages"]), (1, 1))
        self.assertGreater(during["caravan_tickets_total"], 10)
        self.assertGreater(during["caravan_compute_seconds_total"], 0)
        self.assertGreater(during["caravan_received_bytes_total"], 100)
        self.assertGreater(during["caravan_sent_bytes_total"], 100)
        stages = {key: during[key] for key in during if key.startswith("caravan_stage_")}
        for key in stages:
            self.assertRegex(key, r'\{peer="127\.0\.0\.1:\d+",stage="1",layers="0-5"\}$')
        stages = {key.removeprefix("caravan_stage_").split("{")[0]: value for key, value in stages.items()}
        for name in ("queue", "tickets_failed_total", "next_rtt_seconds"):
            self.assertEqual(stages.pop(name), 0, name)
        self.assertEqual(set(stages), {"compute_seconds_total", "tickets_total", "received_bytes_total", "sent_bytes_total", "weights_bytes",
                                       "kv_cache_bytes", "server_rtt_seconds"})
        for name, value in stages.items():
            self.assertGreater(value, 0, name)
        # It is the only stage.
        for name in ("compute_seconds_total", "tickets_total", "received_bytes_total", "sent_bytes_total"):
            self.assertEqual(stages[name], during["caravan_" + name], name)
        self.assertGreater(stages["weights_bytes"], 1e6)
        self.assertGreater(during['caravan_weights_bytes_total{source="server"}'], 1e6, DEMO_MODEL)
        self.assertLess(during['caravan_memory_free_bytes{device="0"}'], during['caravan_memory_bytes{device="0"}'])
        text = server.get("/metrics")[1]
        self.assertRegex(text, r'llamacpp:stage_weights_bytes\{stage="0",replica="0",device="[^"]+",layers="0-\d+",source="server"\} [1-9]\d{6}')
        self.assertRegex(text, r'llamacpp:stage_compute_seconds_total\{stage="0",.*\} 0\.[0-9]*[1-9]')
        label = re.escape(f'{{backend="127.0.0.1:{backend.port}"}}')
        for name, value in (("backend_rtt_seconds", r"(?!0\n)\d\S*\n"), ("backend_rtt_mean_seconds", r"(?!0\n)\d\S*\n"),
                            ("backend_sent_bytes_total", r"[1-9]\d{6}"), ("backend_received_bytes_total", r"[1-9]\d{3}")):
            self.assertRegex(text, rf"llamacpp:{name}{label} {value}")
        self.assertRegex(text, r'llamacpp:stage_queue\{stage="0",replica="0",device="[^"]+",layers="0-\d+"\} \d')
        self.assertRegex(text, r'llamacpp:stage_kv_cache_usage_ratio\{stage="0",replica="0",device="[^"]+",layers="0-\d+"\} 0')
        self.assertEqual(server.stop(), 0)
        self.wait_until(lambda: self.metrics(port)["caravan_stages"] == 0)
        self.assertEqual(self.metrics(port)["caravan_tickets_total"], during["caravan_tickets_total"])


if __name__ == "__main__":
    unittest.main()
