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


if __name__ == "__main__":
    unittest.main()
