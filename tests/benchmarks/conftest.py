"""Fixtures of the tests of the benchmarks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import cases
from benchmarks.harness.bandwidth_bound import BandwidthBound, BoundUnavailable
from benchmarks.harness.compare import Bench
from benchmarks.results import Recorder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _few_objects_to_collect() -> Iterator[None]:
    """Hide existing objects from the collections before each timing, which take half a second otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a harness with two rounds and small caches that writes measurements to ``out.jsonl``."""
    monkeypatch.setattr(cases, "MIN_ROTATION", 1 << 20)
    recorder = Recorder(tmp_path / "out.jsonl", {"reps": 2})
    return Bench(recorder, quick=True, reps=2, tries=1, cache=1 << 10)


@pytest.fixture
def bound() -> BandwidthBound:
    try:
        return BandwidthBound()
    except BoundUnavailable as error:
        pytest.skip(str(error))
