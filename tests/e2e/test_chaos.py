"""Streams go on exactly while backends are killed, stopped and restarted at random."""

import unittest

from chaos import Chaos


class RandomKills(unittest.TestCase):
    def run_chaos(self, chaos):
        self.addCleanup(chaos.stop)
        result = chaos.run()
        self.assertEqual((result.aborts, result.wrong, result.not_alive), ([], [], []), f"{result}\n{chaos.server.log[-20000:]}")
        self.assertGreater(result.lives, 10)
        self.assertTrue(chaos.server.alive())
        return result

    def test_twenty_kills_under_eight_streams_lose_no_token(self):
        chaos = Chaos(20)
        result = self.run_chaos(chaos)
        self.assertEqual(result.kills["SIGKILL"], 20)
        self.assertGreater(result.streams, 8)
        self.assertGreater(len(result.recoveries), 0)

    def test_kills_of_replicas_under_eight_streams_lose_no_token(self):
        chaos = Chaos(4, seed=2, pause=4, extra=("--plan", "throughput"))
        self.run_chaos(chaos)
        self.assertRegex(chaos.server.log, r"on [23] device\(s\), [23] replicas")


if __name__ == "__main__":
    unittest.main()
