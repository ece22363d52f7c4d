"""Run many random ledger sequences with crashes, in as many processes as there are cores.

    python benchmarks/prove_ledger.py --count 100000

tests/client/ledger/test_ledger_sequences.py says what a sequence is and what is checked after each crash. After
it, the accountant judges a sample of what was charged: epsilon of the whole is never below that of a part.
"""

import argparse
import logging
import multiprocessing
import os
import random
import runpy
import time
from pathlib import Path

from fedloom.core.privacy.accounting import Spend, epsilon

__all__ = ["main", "sample_is_monotone"]

_TEST = Path(__file__).parents[1] / "tests" / "client" / "test_ledger_sequences.py"
_PORTION = 500


def _portion(seed: int) -> list[list[Spend]]:
    logging.disable(logging.WARNING)
    charged: list[list[Spend]] = runpy.run_path(str(_TEST))["sequences"](_PORTION, seed, forked=seed % 50 == 0)
    return charged


def sample_is_monotone(charged: list[Spend], rng: random.Random) -> bool:
    """Whether leaving out charges lowers epsilon or leaves it."""
    part = [spend for spend in charged if rng.random() < 0.7]
    return epsilon(part, 1e-5) <= epsilon(charged, 1e-5)


def main() -> None:
    """Run, and say how many and how long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100_000, help=f"sequences, in portions of {_PORTION}")
    parser.add_argument("--seed", type=int, default=1, help="first seed")
    options = parser.parse_args()
    portions = -(-options.count // _PORTION)
    start, done, rng = time.monotonic(), 0, random.Random(options.seed)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for charged in pool.imap_unordered(_portion, range(options.seed, options.seed + portions)):
            done += len(charged)
            if not sample_is_monotone(rng.choice(charged), rng):
                raise SystemExit("a part of the charges has more epsilon than the whole")
            print(f"\r{done} sequences in {time.monotonic() - start:.0f} s", end="", flush=True)
    print(f"\n{done} sequences: no noise without a charge, no round answered twice, no change unnoticed")


if __name__ == "__main__":
    main()
