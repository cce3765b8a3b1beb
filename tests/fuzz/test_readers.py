"""Readers raise only documented errors for bytes that once made them fail, and for small changes of the corpus."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.readers import CORPUS, TARGETS, run

FILES = sorted(path for path in CORPUS.glob("*/*"))


def test_every_target_has_a_corpus():
    assert {path.parent.name for path in FILES} == set(TARGETS)
    assert all(path.stat().st_size <= 8192 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus(path: Path):
    TARGETS[path.parent.name](path.read_bytes())


def changed(data: bytes, g: random.Random) -> bytes:
    """Replace, remove, insert or truncate a few bytes."""
    out = bytearray(data)
    for _ in range(g.randint(1, 4)):
        at = g.randrange(len(out) + 1)
        how = g.randrange(4)
        if how == 0 and at < len(out):
            out[at] = g.choice([0, 1, 0x7F, 0x80, 0xFF, g.randrange(256)])
        elif how == 1:
            del out[at : at + g.randint(1, 8)]
        elif how == 2:
            out[at:at] = g.randbytes(g.randint(1, 8))
        elif g.random() < 0.2:
            del out[at:]
    return bytes(out)


@pytest.mark.parametrize("target", TARGETS)
def test_near_the_corpus(target: str):
    g = random.Random(0)
    seeds = [path.read_bytes() for path in FILES if path.parent.name == target]
    for _ in range(100):
        data = changed(g.choice(seeds), g)
        try:
            TARGETS[target](data)
        except BaseException as error:
            raise AssertionError(f"{target}({data!r})") from error


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_atheris_finds_nothing(target: str):
    pytest.importorskip("atheris")
    assert run(target, 15) == 0
