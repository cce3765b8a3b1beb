"""Run hypothesis on a few fixed examples, or with ``--fuzz-seconds`` on new ones for that time.

A seed that makes a test fail is kept in ``tests/fuzz/seeds.json``, by test, and every later run tries it again. The
examples of a seed change with the strategies, so a test of its own should replace each seed.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.support import ROOT

#: Number of examples of a test without ``--fuzz-seconds``, and of a round with it.
SHORT, ROUND = 10, 25
#: Environment variable with the seed of the first round; by default it is random.
SEED = "FASTCOMPRESS_FUZZ_SEED"
_QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True)
SEEDS = ROOT / "tests" / "fuzz" / "seeds.json"


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Return examples of a strategy, which are the same in each call."""
    found: list[Any] = []

    @settings(_QUIET, max_examples=count, derandomize=True, phases=[Phase.generate])
    @given(strategy)
    def take(drawn: Any) -> None:
        found.append(drawn)

    take()
    return found


def kept() -> dict[str, list[int]]:
    """Return the kept seeds, by test."""
    return json.loads(SEEDS.read_text(encoding="utf-8")) if SEEDS.exists() else {}


def keep(test: str, number: int) -> None:
    found = kept()
    found[test] = sorted({*found.get(test, []), number})
    SEEDS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], test: str, seconds: float | None) -> None:
    """Check examples of a strategy. A failure prints the smallest example that was found, and its seed.

    Args:
        test: Name of the test, under which seeds are kept.
    """

    def once(**how: Any) -> Callable[[], None]:
        @settings(_QUIET, **how)
        @given(strategy)
        def examine(drawn: Any) -> None:
            check(drawn)

        return examine

    for number in kept().get(test, []):
        print(f"{SEED}={number}")
        seed(number)(once(max_examples=ROUND))()
    if seconds is None:
        once(max_examples=SHORT, derandomize=True)()
        return
    number, end = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**31)), time.monotonic() + seconds
    while time.monotonic() < end:
        print(f"{SEED}={number}")  # pytest shows this output of a failed test
        try:
            seed(number)(once(max_examples=ROUND))()
        except Exception:
            keep(test, number)
            raise
        number += 1
