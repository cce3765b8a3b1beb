"""The number of times that the audio of an example is read and its features are computed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastcompress.training import examples as examples_module
from fastcompress.training.evaluation import evaluate, transcribe
from fastcompress.training.examples import EncodedExamples, Examples
from fastcompress.training.manifest import Utterance, read_manifest
from fastcompress.training.recipes import build_small
from tests.support.lalm_data import write_tones


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each file is loaded."""
    found: Counter[str] = Counter()
    load = examples_module.load_utterance

    def counted(utterance: Utterance, rate: int) -> Any:
        found[utterance.name] += 1
        return load(utterance, rate)

    monkeypatch.setattr(examples_module, "load_utterance", counted)
    return found


def test_features_are_computed_once_per_use(loads: Counter[str], tmp_path: Path):
    utterances = read_manifest(write_tones(tmp_path, 7, texts=1))
    utterances[2].audio_filepath.write_bytes(b"RIFF")
    model, processor = build_small(utterances)
    examples = Examples(utterances, processor)
    transcribe(model, examples, 3, max_new_tokens=2, do_sample=False)
    assert len(loads) == 7 and set(loads.values()) == {1}
    assert len(examples.skipped) == 1
    examples.batch(range(8))
    assert loads[utterances[2].name] == 1 and loads[utterances[0].name] == 2
    loads.clear()
    evaluate(model, Examples(utterances, processor), 3, timed=0, max_new_tokens=2)
    EncodedExamples(Examples(utterances, processor), model, 2)
    assert set(loads.values()) == {2}
    loads.clear()
    cached = Examples(utterances, processor, cache=True)
    for _ in range(2):
        cached.batch([0, 1, 0])
    assert set(loads.values()) == {1}


def test_no_features_are_kept(tmp_path: Path):
    utterances = read_manifest(write_tones(tmp_path, 4))
    _, processor = build_small(utterances)
    examples = Examples(utterances, processor)
    examples.batch([0, 0, 1])
    assert not examples._checked
