"""How long hypothesis looks: a few examples, always the same, or, with ``--fuzz-seconds``, others until time is up."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

#: Examples of a test without ``--fuzz-seconds``, and of a round with it.
SHORT, ROUND = 10, 25
#: The first round's seed; ``None``: any.
SEED = "FASTCOMPRESS_FUZZ_SEED"
_QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True)



def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """What the strategy draws, the same each time."""
    found: list[Any] = []

    @settings(_QUIET, max_examples=count, derandomize=True, phases=[Phase.generate])
    @given(strategy)
    def take(drawn: Any) -> None:
        found.append(drawn)

    take()
    return found


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], seconds: float | None) -> None:
    """Checks what the strategy draws. A failure shows the smallest example that was found, and its seed."""

    def once(**how: Any) -> Callable[[], None]:
        @settings(_QUIET, **how)
        @given(strategy)
        def test(drawn: Any) -> None:
            check(drawn)

        return test

    if seconds is None:
        once(max_examples=SHORT, derandomize=True)()
        return
    number, end = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**31)), time.monotonic() + seconds
    while time.monotonic() < end:
        print(f"{SEED}={number}")  # which pytest shows of a failure
        seed(number)(once(max_examples=ROUND))()
        number += 1
