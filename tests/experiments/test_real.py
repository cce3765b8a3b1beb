"""The experiment on real speech with a tiny Whisper model: its controls, rows, resumption and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from experiments import real, real_published, real_report
from experiments.real_controls import CONSTANT, PERMUTED, controls, ward_lengths
from fastcompress.integrations.transformers.whisper import PooledEncoderOutput
from fastcompress.training.sweep.bootstrap import Interval
from fastcompress.training.sweep.models import Variant
from fastcompress.training.sweep.scores import Comparer, Score
from tests.support import tiny_whisper
from tests.support.lalm_data import write_tones

pytestmark = [
    pytest.mark.xdist_group("training"),
]

SILENCE = 8


def pooled(hidden: Tensor, sizes: list[list[int]]) -> PooledEncoderOutput:
    """Return tokens of the given numbers of frames."""
    lengths = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in sizes], batch_first=True)
    tokens = torch.zeros(*lengths.shape, hidden.shape[-1])
    for row, values, found in zip(hidden, tokens, sizes, strict=True):
        for i, part in enumerate(row.split(found)):
            values[i] = part.mean(0)
    return PooledEncoderOutput(tokens, token_lengths=lengths)


@pytest.mark.parametrize("silence", ["keep", "pool"])
def test_controls(silence: str):
    hidden = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([12, 20])
    sizes = [[1, 5, 2, 4, *[1] * SILENCE], [3, 3, 6, 1, 7]]
    found = controls(silence)[PERMUTED](hidden, frames, pooled(hidden, sizes))
    order = [row[row > 0].tolist() for row in found.token_lengths]
    assert order != sizes and [sorted(row) for row in order] == [sorted(row) for row in sizes]
    assert silence == "pool" or order[0][4:] == [1] * SILENCE
    wanted = pooled(hidden, order)
    assert torch.equal(found.token_lengths, wanted.token_lengths)
    assert torch.allclose(found.last_hidden_state, wanted.last_hidden_state, atol=1e-6)
    again = controls(silence)[PERMUTED](hidden[1:], frames[1:], pooled(hidden[1:], sizes[1:]))
    assert again.token_lengths[0].tolist() == order[1]  # the order does not depend on the batch
    equal = controls(silence)[CONSTANT](hidden, frames, pooled(hidden, sizes)).token_lengths
    first = [3.0] * 4 + [1.0] * SILENCE if silence == "keep" else [20 / 12] * 12
    torch.testing.assert_close(equal[0], torch.tensor(first, dtype=torch.float64))
    torch.testing.assert_close(equal[1], torch.tensor([4.0] * 5 + [0.0] * 7, dtype=torch.float64))


@pytest.mark.parametrize("frames", [1, 2, 40])
def test_ward(frames: int):
    """``ruptures.BottomUp`` merges the same segments."""
    ruptures = pytest.importorskip("ruptures")
    x = torch.randn(frames, 6, generator=torch.Generator().manual_seed(frames))
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    for count in range(1, frames + 1):
        ends = ward_lengths(x, count).cumsum(0).tolist()
        search = ruptures.BottomUp(model="l2", min_size=1, jump=1).fit(unit)
        assert ends == ([frames] if count == 1 else search.predict(n_bkps=count - 1)), count


def test_published_methods():
    generator = torch.Generator().manual_seed(1)
    utterances = [torch.randn(n, 8, generator=generator).cumsum(0) for n in (300, 200)]
    variants, of_methods = real_published.methods(utterances, "keep")
    assert len({variant.label for variant in variants}) == len(variants) == 2 * 2 * 6
    assert {v.control for v in variants if v.control} == set(of_methods)
    thresholds = [v.rule for v in variants if v.rule.startswith(("threshold", "lookback"))]
    tokens = [sum(len(fc.segment_pool(x, rule=rule).values) for x in utterances) for rule in thresholds]
    assert [500 / count for count in tokens] == pytest.approx([3, 3, 4, 4] * 2, rel=0.03)
    for label, control in of_methods.items():
        frames = torch.tensor([100, 40])
        hidden = torch.nn.utils.rnn.pad_sequence([x[:n] for x, n in zip(utterances, frames, strict=True)], True)
        sizes = [[4] * 25 + [1] * 3, [4] * 10 + [1] * 63]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, 3))
        found = control(padded, frames, pooled(padded, sizes))
        assert (found.token_lengths.sum(1) == torch.tensor([103, 103])).all(), label
        mean = (found.last_hidden_state * found.token_lengths[..., None]).sum(1)
        wanted = pooled(padded, sizes)
        torch.testing.assert_close(mean, (wanted.last_hidden_state * wanted.token_lengths[..., None]).sum(1))


def test_rows_and_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
):
    folder = tmp_path / "data"
    tiny_whisper.write(folder / "whisper-tiny.en")
    path = write_tones(folder / "speech", 4)
    lines = [json.loads(line) | {"speaker": f"s{i % 4}"} for i, line in enumerate(path.read_text().splitlines())]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "speech" / "librispeech-test-other.jsonl").write_text(text)
    monkeypatch.setattr(real, "RATES", (4,))
    plan = [
        ("whisper-tiny.en", "test-other", "keep", rows)
        for rows in (real.main_rows, real.without_weights, real.controls)
    ]
    plan += [
        ("whisper-tiny.en", "test-other", "pool", real.main_rows),
        ("whisper-base", "fleurs", "keep", real.main_rows),
    ]
    monkeypatch.setattr(real, "PLAN", tuple(plan))
    arguments = ["real", str(folder), "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(real, "NEW_TOKENS", 5)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    assert real.main() == 0
    assert "whisper-base/fleurs/keep: not in" in capsys.readouterr().out
    files = sorted(tmp_path.glob("real-*.json"))
    assert [file.stem for file in files] == [f"real-whisper-tiny.en-test-other-{p}" for p in ("keep", "pool")]
    keep, pool = (json.loads(file.read_text()) for file in files)
    assert len(pool["rows"]) == 3 and len(keep["rows"]) == 3 + 2 + len(real.controls())
    assert keep["speakers"] == [f"s{i % 4}" for i in range(4)] and "text" not in keep["rows"][0]
    keys = {row["label"]: row["keys"] for row in keep["rows"]}
    of_controls = [keys[f"min-variance, {control}"] for control in (PERMUTED, CONSTANT)]
    assert of_controls == [keys["uniform:4"]] * 2 == [keys["min-variance"]] * 2
    monkeypatch.setattr("fastcompress.training.sweep.whisper.Whisper.answer", lambda *_: pytest.fail("computed again"))
    assert real.main() == 0
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path), "--write"])
    assert real_report.main() == 0
    report = (tmp_path / "real.md").read_text()
    assert (
        report.startswith(f"{len(keep['rows']) + 3} rows, ")
        and "whisper-tiny.en, test-other, everything pooled" in report
    )
    line = next(line for line in report.splitlines() if line.startswith("| whisper-tiny.en, test-other, silence kept"))
    by_label = {row["label"]: f"{row['wer']['value']:.2f}" for row in keep["rows"]}
    wanted = ("none", "uniform:4, proportional attention off", "uniform:4", "min-variance")
    assert [cell.strip() for cell in line.split("|")][4:8] == [by_label[label] for label in wanted]
    assert f"| min-variance:rate=4, {PERMUTED}" in report and "uniform sampling:4" in report
    assert (tmp_path / "real-whisper-tiny.en-test-other-keep.png").read_bytes().startswith(b"\x89PNG")


def score(variant: Variant, errors: list[int]) -> Score:
    whole = Interval(0.0, 0.0, 0.0)
    return Score(
        variant, variant.label, 4, 40, whole, 0, 0, 0, 0.0, None, 9, 12.5, 4.0, 4.0, 1, 1, 0, 1, errors=tuple(errors)
    )  # fmt: skip


def test_the_best_row_is_chosen_on_one_half_and_reported_on_the_other():
    words, speakers = [10, 10, 10, 10], ["d", "a", "b", "c"]
    none = score(Variant("none"), [1, 1, 1, 1])
    uniform, other = score(Variant("uniform:4"), [0, 3, 3, 0]), score(Variant("min-variance"), [5, 2, 2, 4])
    scores = [none, uniform, other]
    part = real_report.Part("whisper/test-other/keep", scores, Comparer(words, speakers), speakers, 0.0)
    first, second = part.half(True), part.half(False)
    assert (first.speakers, second.speakers) == (["a", "b"], ["d", "c"])
    assert [s.wer.value for s in first.scores] == [10, 30, 20] and [s.wer.value for s in second.scores] == [10, 0, 45]
    row = [cell.strip() for cell in real_report.choice(part).splitlines()[2].split("|")]
    assert row[1:8] == ["4x", "min-variance:rate=4", "log(length)", "2", "20.00", "45.00", "+35.00"]
    effect = real_report.parts_effect(part)
    assert effect == ""


def test_no_cost_needs_an_upper_bound_below_the_margin():
    words, speakers = [50] * 4, ["a", "b", "c", "d"]
    none = score(Variant("none"), [1, 1, 1, 1])
    for errors, wanted in (([1, 1, 1, 1], "yes"), ([2, 0, 1, 1], "no"), ([0, 0, 1, 1], "yes")):
        scores = [none, score(Variant("uniform:4"), errors)]
        part = real_report.Part("whisper/test-other/keep", scores, Comparer(words, speakers), speakers, 0.0)
        cells = [cell.strip() for cell in real_report.table(part).splitlines()[3].split("|")]
        assert cells[13] == wanted, errors
