"""Streams go on exactly while backends are killed, stopped and restarted at random."""

import unittest

from chaos import Chaos


class RandomKills(unittest.TestCase):
    def test_twenty_kills_under_eight_streams_lose_no_token(self):
        chaos = Chaos(20)
        self.addCleanup(chaos.stop)
        result = chaos.run()
        self.assertEqual((result.aborts, result.wrong), ([], []), f"{result}\n{chaos.server.log[-20000:]}")
        self.assertTrue(chaos.server.alive())
        self.assertGreater(result.streams, 8)
        self.assertGreater(len(result.recoveries), 0)

    def test_kills_of_replicas_under_eight_streams_lose_no_token(self):
        chaos = Chaos(6, seed=2, pause=4, extra=("--plan", "throughput"))
        self.addCleanup(chaos.stop)
        result = chaos.run()
        self.assertEqual((result.aborts, result.wrong), ([], []), f"{result}\n{chaos.server.log[-20000:]}")
        self.assertTrue(chaos.server.alive())
        self.assertRegex(chaos.server.log, r"on [23] device\(s\), [23] replicas")


if __name__ == "__main__":
    unittest.main()
