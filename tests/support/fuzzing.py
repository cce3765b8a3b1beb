"""How long hypothesis searches: a few fixed examples or, with ``--fuzz-seconds``, new ones for that time.

A seed that found something is kept in ``tests/fuzz/seeds.json``, by test, and tried in each later run. What a seed
draws changes with the strategies: it stands in for the test that is to be written of what it found, not for good.
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

#: Examples of a test without ``--fuzz-seconds``, and of a round with it.
SHORT, ROUND = 10, 25
#: The first round's seed; ``None``: any.
SEED = "FASTCOMPRESS_FUZZ_SEED"
_QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True)
SEEDS = ROOT / "tests" / "fuzz" / "seeds.json"


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Return examples of a strategy, the same each time."""
    found: list[Any] = []

    @settings(_QUIET, max_examples=count, derandomize=True, phases=[Phase.generate])
    @given(strategy)
    def take(drawn: Any) -> None:
        found.append(drawn)

    take()
    return found


def kept() -> dict[str, list[int]]:
    """Seeds that once found something, by test."""
    return json.loads(SEEDS.read_text(encoding="utf-8")) if SEEDS.exists() else {}


def keep(test: str, number: int) -> None:
    found = kept()
    found[test] = sorted({*found.get(test, []), number})
    SEEDS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], test: str, seconds: float | None) -> None:
    """Check examples of a strategy. A failure shows the smallest example that was found, and its seed.

    Args:
        test: its name, under which seeds are kept.
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
        print(f"{SEED}={number}")  # which pytest shows of a failure
        try:
            seed(number)(once(max_examples=ROUND))()
        except Exception:
            keep(test, number)
            raise
        number += 1
