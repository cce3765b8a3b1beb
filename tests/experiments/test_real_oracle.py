"""Boundaries at the starts of text tokens, with a tiny Whisper model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import real_oracle
from experiments.real_oracle import ORACLE, ORDER, Oracle, divided
from tests.support import tiny_whisper
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]


def test_segments_start_at_the_given_frames():
    assert divided([0, 10, 13], 20, 3).tolist() == [10, 3, 7]
    assert divided([0, 10, 13], 20, 6).tolist() == [4, 3, 3, 3, 4, 3]
    assert divided([0, 10, 13, 14], 20, 3).tolist() == [10, 4, 6]
    assert divided([0], 5, 5).tolist() == [1] * 5


def test_each_utterance_has_its_own_boundaries():
    audio = [torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    oracle = Oracle(audio, [[0, 2], [0, 7]])
    lengths = torch.tensor([6, 6])
    for frames, wanted in zip(audio, ([2, 10], [7, 5]), strict=True):
        values, found = oracle.pool(frames, lengths)
        assert found.tolist() == wanted
        torch.testing.assert_close(values[0], frames[: wanted[0]].mean(0))
        assert sorted(oracle.permuted(frames, lengths)[1].tolist()) == sorted(wanted)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    settings = tiny_whisper.write(tmp_path / "whisper-tiny.en") / "generation_config.json"
    # The last id: ids after it would be times.
    more = {"alignment_heads": [[0, 1]], "no_timestamps_token_id": 59}
    # A generation config that was made of a model's does not keep them.
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more | {"_from_model_config": False}))
    path = write_tones(tmp_path / "speech", 3)
    path.rename(tmp_path / "speech" / "librispeech-test-other.jsonl")
    monkeypatch.setattr(real_oracle, "NEW_TOKENS", 5)
    monkeypatch.setattr("experiments.real.NEW_TOKENS", 5)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    found: list[list[list[int]]] = []
    find = real_oracle.find_starts
    monkeypatch.setattr(real_oracle, "find_starts", lambda part: found.append(find(part)) or found[-1])
    monkeypatch.setattr("sys.argv", ["oracle", str(tmp_path), "--out", str(tmp_path), "--results", str(tmp_path)])
    assert real_oracle.main() == 0
    assert [starts[0] for starts in found[0]] == [0, 0, 0] and max(map(len, found[0])) > 1
    values = json.loads((tmp_path / "real-whisper-tiny.en-test-other-keep.json").read_text())
    keys = {row["variant"]["control"] or row["variant"]["rule"]: row["keys"] for row in values["rows"]}
    assert len(keys) == 5 and keys[ORACLE] == keys[ORDER] == keys["uniform:6"] < keys["none"]
