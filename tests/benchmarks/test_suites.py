"""The suites: every form gives the right result, a wrong one is rejected, and the GPU harness has a dry run."""

from __future__ import annotations

import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcompress as fc
from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.harness.cases import Case, batch_of, cu_seqlens, features, random_bytes, rotation, threshold_of
from benchmarks.harness.compare import Bench, Implementation, WrongResult, compare
from benchmarks.registry import SUITES
from benchmarks.results import BOTH, CLONE, FORWARD, MIX, OURS, read
from benchmarks.suites import (
    decoder,
    eager,
    memory,
    methods,
    pack,
    prefill,
    roofline,
    scaling,
    segment_pool,
    training_step,
)
from benchmarks.suites.checks import Expected


def test_the_registry_and_inputs():
    first, second = (features(200, 64, torch.float32) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, features(200, 64, torch.float32, seed=1))
    inputs = rotation(torch.ones(40, 1 << 14), last_level_cache=100 << 20)
    assert sum(x.nbytes for x in inputs) >= 400 << 20
    assert len({x.data_ptr() for x in inputs}) == len(inputs)
    names = [implementation.name for implementation in segment_pool.implementations()]
    assert len(set(names)) == len(names) and names[0] == OURS
    for case in (*segment_pool.CASES, segment_pool.QUICK):
        assert set(case.implementations or ()) <= set(names)
    assert set(scaling.FORMS) <= set(names) and len(SUITES) == 9


@pytest.mark.parametrize("length", [1, 2, 16, 64])
def test_a_threshold_gives_segments_of_a_mean_length(length: int):
    x, cu = features(2000, 64, torch.bfloat16), cu_seqlens((1200, 800))
    starts = fc.segment_pool(x, cu_seqlens=cu, rule=threshold_of(x, cu, length)).segments.starts
    assert len(starts) == round(2000 / length)
    x, batch = batch_of(Case("", (1200, 800), 64, mean_length=length), torch.float32)
    pooled = fc.segment_pool(x, cu_seqlens=cu, rule=batch.rule)
    assert torch.equal(Expected(x, batch).segments.starts, pooled.segments.starts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_packing(bench: Bench, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    rows = compare(bench, pack.job(bench, pack.QUICK, dtype, 1))
    forms = {one.name for one in pack.implementations(bench) if one.available}
    assert {row["implementation"] for row in rows if row["direction"] == FORWARD} == forms | {CLONE}
    assert {row["implementation"] for row in rows if row["direction"] == BOTH} == forms
    one = pack.job(bench, pack.QUICK, dtype, 1)
    wrong = {
        "rows": lambda audio, batch: pack.flat_cat(audio, batch).flip(0),
        "gradient": lambda audio, batch: pack.flat_cat(audio, batch).detach() + 0 * audio.sum(),
    }
    one.implementations = [one.implementations[0], *(Implementation(name, "eager", f) for name, f in wrong.items())]
    assert {row["implementation"] for row in compare(bench, one)} == {"fastcompress.pack", CLONE}
    reasons = [row["not_timed"] for row in bench.recorder.measurements if row["implementation"] in wrong]
    assert "rows differ" in reasons[0] and "gradient of the audio" in reasons[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_methods(bench: Bench, dtype: torch.dtype):
    """Every published form gives our tokens and gradients. A form that does not stops the suite."""
    bench.reps = 1
    jobs = {one.case: one for one in methods.jobs(bench, *methods.QUICK, dtype, 1)}
    for method, one in jobs.items():
        assert len(compare(bench, one)) == 2 * sum(
            implementation.available for implementation in one.implementations
        ), method
    one = jobs["CIF"]
    right = one.implementations[0].form
    for ours, message in (
        (lambda x, batch: right(x, batch) * 1.1, "CIF: .*tokens differ by more than rounding"),
        (lambda x, batch: right(x, batch)[1:], "CIF: .*tokens of torch.* for"),
        (lambda x, batch: right(x, batch).detach() + 0 * x.sum(), "gradient: .* differ by more than rounding"),
    ):
        wrong = replace(
            one, implementations=[Implementation(OURS, OURS, ours), *one.implementations[1:]], check=methods.checks()
        )
        with pytest.raises(WrongResult, match=message):
            compare(bench, wrong)


def test_decoder(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    one = decoder.job(bench, "quick", torch.float32, 1)
    one.peak = None
    rows = compare(bench, one)
    assert {(row["implementation"], row["direction"]) for row in rows} == {
        (f, d) for f in decoder.FORMS for d in (FORWARD, BOTH)
    }
    assert 0.2 < decoder.padding(decoder.lengths(decoder.SIZES["cpu"])) < 0.8

    def as_one_sequence(self: fc.PackedInputs, right=fc.PackedInputs.model_inputs) -> dict[str, Any]:
        count = len(self.source)
        cu = torch.tensor([0, count], dtype=torch.int32)
        return right(self) | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": count}

    expected = decoder.build(decoder.PADDED, decoder.SIZES["quick"])()[0]
    monkeypatch.setattr(fc.PackedInputs, "model_inputs", as_one_sequence)  # attends across samples
    with pytest.raises(WrongResult, match="packed, fastcompress: .*logits are off"):
        compare(bench, one)
    wrong = decoder.build(decoder.PACKED, decoder.SIZES["quick"])()[0]
    with pytest.raises(WrongResult, match="logits are off"):  # also with the tolerance for bf16
        decoder.check_logits("packed", wrong, expected, decoder.TOLERANCE[torch.bfloat16])


@pytest.mark.slow
def test_prefill(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    one = prefill.job(bench, "quick", torch.float32, 1)
    rows = {row["implementation"]: row for row in compare(bench, one)}
    text, audio = 2 * prefill.TEXT, 2 * 2 * 25
    assert [rows[form]["tokens"] for form in ("stock", "uniform:2")] == [text + audio, text + audio // 2]
    assert rows["uniform:3"]["tokens"] == text + 2 * 17
    assert rows["uniform:2"]["cache_bytes"] == 2 * 2 * (25 + 50) * 2 * 2 * 16 * 4
    assert all(row.get("peak_bytes", 1) > 0 for row in rows.values())
    with pytest.raises(WrongResult, match="uniform:3: generate returns another token"):
        one.check("uniform:3", None, torch.tensor([-1, -1]), None, None)


def test_each_case_of_scaling_is_measured_once(bench: Bench):
    plan = scaling.plan(scaling.AXES, (1, 2))
    assert plan[scaling.BASE, 2] == (scaling.FRAMES, scaling.WIDTH, scaling.THREADS)
    assert plan[scaling.BASE, 1] == (scaling.THREADS,)
    assert len({case.name for case, _ in plan}) == len(plan) - 1
    bench.dtypes, bench.reps = ["fp32"], 1
    scaling.run(bench)
    found = {(axis, row["frames"], row["tokens"]) for row in bench.recorder.measurements for axis in row["axes"]}
    assert {("frames", 400), ("window", 200)} <= {place[:2] for place in found} and ("segment length", 200, 50) in found


def test_limits_memory_and_training_step(bench: Bench, bound, monkeypatch: pytest.MonkeyPatch):
    bench.bound, bench.dtypes = bound, ["fp32"]
    roofline.run(bench)
    assert all(row["rate"] > 0 for row in bench.recorder.measurements) and len(bench.recorder.measurements) == 4
    assert roofline.operations(2, 3, 1, FORWARD, scores=False) == 2 * 3 + 3  # counted by hand
    assert roofline.operations(2, 3, 1, BOTH) == 4 * 2 * 3 + 2 * 3 + 3 + 3
    monkeypatch.setattr(memory, "FRAMES", 3000)
    bench.quick = False
    memory.run(bench)
    found = bench.recorder.measurements[-1]
    assert "not_timed" in found or found["peak_bytes"] > found["output_bytes"] > found["tokens"] * memory.DIM * 4
    if not training_step.available():
        pytest.skip("fastcompress[lalm] is not installed")
    rows = training_step.measure(bench, 1, ("uniform:1", "uniform:3"), steps=1)
    third = {row["implementation"]: row["median"] for row in rows if row["case"] == "uniform:3"}
    assert 0 < third["pack_rows"] < 0.1 * third[training_step.BUSY] < 0.2 * third[training_step.STEP]
    assert [row["tokens_per_frame"] for row in rows if "tokens_per_frame" in row] == [1, pytest.approx(0.36, abs=0.04)]
    monkeypatch.setattr(training_step, "_PREFIX", "another::")
    with pytest.raises(WrongResult, match="none of fastcompress's ops ran"):
        training_step.measure(bench, 1, ("uniform:3",), steps=1)


def test_the_harness_of_the_gpu_runs_dry(bench: Bench, tmp_path: Path):
    suites = ["roofline", "segment_pool", "pack", "decoder"]
    assert command.main([*suites, "--device", "cuda", "--dry", "--reps", "1", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "dry-cuda.jsonl").rows
    assert set(rows["suite"]) == set(suites) and set(rows["threads"]) == {0}
    pooled = rows[(rows["suite"] == "segment_pool") & rows["median"].notna()]
    assert {OURS, "eager", "compile", "max-autotune", "clone"} <= set(pooled["group"])
    assert set(pooled["direction"]) == {FORWARD, BOTH} and set(pooled["dtype"]) == {"bfloat16", "float32"}
    assert set(pooled.loc[pooled["group"] == OURS, "how"]) == {"no graph"}
    assert (pooled.loc[(pooled["group"] == OURS) & (pooled["direction"] == FORWARD), "call"] > 0).all()
    assert "| fastcompress, end to end, ms |" in re.sub(
        " +", " ", report.text({"dry": read(tmp_path / "dry-cuda.jsonl")})
    )


def test_windows_of_one_size(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Every form for a Uniform rule is right; one that returns no starts has those of the windows, and may be wrong."""
    bench.dry, bench.device = True, torch.device("cpu")
    case = segment_pool.UNIFORM_DRY
    forms = segment_pool.uniform_implementations(bench)
    rows = compare(bench, segment_pool.job(bench, case, torch.float32, 1, forms))
    timed = {row["implementation"] for row in rows if row["direction"] == FORWARD}
    assert {OURS, "embedding_bag", "index_add", "compile, index_add", CLONE, MIX} <= timed
    assert {row["implementation"] for row in rows if row["direction"] == BOTH} >= {OURS, "embedding_bag", "index_add"}
    x, batch = batch_of(case, torch.float32)
    assert eager.window_offsets(batch).tolist()[14:18] == [
        56,
        60,
        61,
        65,
    ]  # the last window of a sequence has one frame
    with pytest.raises(ValueError, match="rule must be Uniform"):
        eager.window_offsets(replace(batch, rule=fc.LocalMax()))

    def means(x: torch.Tensor, size: int, cu: torch.Tensor) -> torch.Tensor:  # as in flash-linear-attention
        assert x.dim() == 4 and len(x) == 1
        pooled = [part.mean(1, keepdim=True) for seq in x.split(cu.diff().tolist(), 1) for part in seq.split(size, 1)]
        return torch.cat(pooled, 1)

    library = types.ModuleType("fla.ops.utils.pooling")
    monkeypatch.setattr(eager.importlib, "import_module", lambda name: library)
    for pooling, admitted in ((means, True), (lambda x, size, cu: means(x, size, cu).flip(1), False)):
        library.mean_pooling = pooling
        theirs = Implementation("theirs", "library", eager.mean_pooling)
        rows = compare(bench, segment_pool.job(bench, case, torch.float32, 1, [forms[0], theirs]))
        assert ("theirs" in {row["implementation"] for row in rows}) == admitted
    assert any("values are off" in row.get("not_timed", "") for row in bench.recorder.measurements)


def test_ceilings_use_random_bytes():
    first, second = (random_bytes(1 << 16, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first, random_bytes(1 << 16))
    counts = torch.bincount(first.int(), minlength=256)
    assert counts.min() > 150 and counts.max() < 400  # 256 of each on average


def test_prefill_is_skipped_before_the_model_is_built(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An old transformers is a reason to skip; it does not make the library wrong."""
    families = pytest.importorskip("fastcompress.integrations.transformers.families")
    monkeypatch.setattr(families.transformers, "__version__", "5.17.0")
    monkeypatch.setattr(prefill, "build", lambda *_: pytest.fail("a model is built"))
    prefill.run(bench)
    assert "prefill: not measured: dynamic mode needs transformers" in capsys.readouterr().out
    assert bench.recorder.measurements == []
