"""`fastcompress inspect --ratio`: the search of thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import fastcompress as fc
from fastcompress.cli.main import main
from fastcompress.inspection.search import QUANTILES, distance_quantiles, format_search, search
from fastcompress.inspection.table import LogMel
from tests.support import ROOT

SPEECH = ROOT / "assets" / "speech" / "rainbow.wav"


def noise(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [1.2, 2.0, 3.0, 5.0, 40.0])
def test_rules_have_the_ratio_on_all_audio_together(ratio: float):
    audios = [noise(700), noise(300, 1), noise(1)]
    found = search([fc.adjacent_distance(x) for x in audios], ratio, seconds=10.0)
    assert found.frames == 1001
    for rule, count in found.rules:
        assert count == sum(len(fc.segment_pool(x, rule=rule).values) for x in audios)
        reachable = isinstance(rule, fc.Threshold) or ratio > 2.5  # local maxima compress noise threefold
        assert (abs(count - 1001 / ratio) <= max(1, 0.02 * 1001 / ratio)) == reachable, str(rule)
    assert [type(rule).__name__ for rule, _ in found.rules] == ["Threshold", "LocalMax", "LocalMax"]


def test_quantiles():
    d = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    found = distance_quantiles([torch.cat([d[:2000], torch.tensor([torch.nan])]), d[2000:]])
    np.testing.assert_allclose(list(found.values()), np.quantile(d, QUANTILES), atol=1e-3)
    assert distance_quantiles([torch.tensor([torch.nan])]) == {}


def test_audio_that_no_threshold_can_divide():
    """Silence: all distances are 0."""
    found = search([fc.adjacent_distance(torch.ones(50, 4))], 3.0, seconds=1.0)
    assert [count for _, count in found.rules] == [1, 1, 1]
    lines = format_search(found).splitlines()
    assert "note: threshold:0.0 is the nearest of its kind, with 50.00 frames per token." in lines


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    samples = soundfile.read(SPEECH, dtype="float32")[0]
    soundfile.write(tmp_path / "half.wav", samples[:32_000], 16_000)
    files = [str(SPEECH), str(tmp_path / "half.wav")]
    report = tmp_path / "a.json"
    assert main(["inspect", *files, "--ratio", "3", "--no-noise", "--rule", "uniform:3", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    content = json.loads(report.read_text())
    assert [file["path"] for file in content["files"]] == files
    found = content["search"]["rules"][0]
    assert found["ratio"] == pytest.approx(3, rel=0.02) and found["rule"] in out
    rows = [LogMel().frames(x)[0] for x in (samples, soundfile.read(files[1], dtype="float32")[0])]
    assert found["tokens"] == sum(len(fc.segment_pool(x, rule=found["rule"]).values) for x in rows)
    assert "  50% are at most " in out and "rules with 3 frames per token:" in out
    for ratio in ("1", "x", "nan", "inf"):
        assert main(["inspect", *files, "--ratio", ratio]) == 2
        assert f"argument --ratio: must be more than 1, got '{ratio}'" in capsys.readouterr().err
