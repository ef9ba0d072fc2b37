#!/usr/bin/env python3
"""Kills backends at random while streams run, and compares every stream with the undisturbed answer token for token.

Usage: bench/chaos.py [CARAVAN_EXECUTABLE] [--kills 100] [--backends 3] [--streams 8] [--seed 1] [--model FILE] [--plan memory]

--kills counts SIGKILL only: beside them backends are sent SIGSTOP (and SIGCONT later) and SIGTERM, about two of each for six kills.
What ended is started again after a random delay. Prints the strikes, the recoveries and their times, streams with wrong or lost tokens,
aborts (a stream that ended with an error, or the server itself), and how often /livez was asked and did not answer 200; exits 1 unless
there were none of the last three."""

import argparse
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caravan", nargs="?", default=str(ROOT / "build" / "release" / "apps" / "caravan"))
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; strikes of the other kinds come on top (100)")
    parser.add_argument("--backends", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.5, help="most seconds between two strikes (0.5)")
    parser.add_argument("--model", default=str(ROOT / "models" / "demo.gguf"))
    parser.add_argument("--plan", default="memory", help="what the server places layers for; by speeds there are up to as many replicas as backends")
    arguments = parser.parse_args()
    os.environ["CARAVAN_EXECUTABLE"] = arguments.caravan
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    from chaos import Chaos  # pylint: disable=import-outside-toplevel,import-error

    chaos = Chaos(arguments.kills, n_backends=arguments.backends, n_streams=arguments.streams, seed=arguments.seed,
                  model=arguments.model, pause=arguments.pause,
                  extra=("--plan", arguments.plan))
    try:
        result = chaos.run()
        print(result)
        for line in (result.wrong + result.aborts + result.not_alive)[:10]:
            print("  " + line[:2000])
        alive = chaos.server.alive()
        if not alive:
            print(f"the server died:\n{chaos.server.log[-4000:]}")
        sys.exit(0 if alive and not result.wrong and not result.aborts and not result.not_alive else 1)
    finally:
        chaos.stop()


if __name__ == "__main__":
    main()
