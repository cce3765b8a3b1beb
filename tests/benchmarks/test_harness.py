"""The harness: it interleaves implementations, rejects wrong ones, and records measurements."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command
from benchmarks.harness import clock, device, machine
from benchmarks.harness.bandwidth_bound import KINDS, LINE, BandwidthBound
from benchmarks.harness.cases import Batch, Case, cu_seqlens, features
from benchmarks.harness.clock import CpuClock, Disturbance, Samples, interleave
from benchmarks.harness.compare import Bench, Implementation, WrongResult, compare
from benchmarks.results import BOTH, CLONE, FORWARD, OURS, Recorder, parse, read
from benchmarks.suites import eager
from benchmarks.suites.checks import Expected, check_average_pool
from benchmarks.suites.eager import Tokens
from benchmarks.suites.segment_pool import implementations, job
from tests.support import ROOT

SMALL = Case("S1", (40, 1, 2, 57), 64)
#: Compiling takes a minute; `python -m benchmarks --quick` covers it.
IMPLEMENTATIONS = implementations()
EAGER = [implementation for implementation in IMPLEMENTATIONS if implementation.group != "compile"]


def run(bench: Bench, chosen: list[Implementation], dtype: torch.dtype = torch.float32) -> list[dict]:
    return compare(bench, job(bench, SMALL, dtype, 1, chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_is_checked_and_timed(bench: Bench, dtype: torch.dtype):
    rows = run(bench, EAGER, dtype)
    installed = {implementation.name for implementation in EAGER if implementation.available}
    for direction, more in ((FORWARD, {CLONE}), (BOTH, set())):
        table = [row for row in rows if row["direction"] == direction]
        assert {row["implementation"] for row in table} == installed | more
        assert all(0 < row["p10"] <= row["median"] <= row["p90"] and row["reps"] == 2 for row in table)
        assert all(row.get("differing_boundaries", 0) == 0 for row in table)
    left = [row for row in bench.recorder.measurements if "not_timed" in row]
    assert len(left) == len(EAGER) - len(installed)


def _shifted(tokens: Tokens, x: torch.Tensor) -> Tokens:
    starts = tokens.starts.clone()
    starts[3] += 1
    return Tokens(tokens.values, starts)


def _one_value_off(tokens: Tokens, x: torch.Tensor) -> Tokens:
    values = tokens.values.clone()
    values[2, 5] += 0.01 * values[2].abs().max().item()
    return Tokens(values, tokens.starts)


def _nan(tokens: Tokens, x: torch.Tensor) -> Tokens:
    return Tokens(tokens.values * float("nan"), tokens.starts)


def _missing_token(tokens: Tokens, x: torch.Tensor) -> Tokens:
    return Tokens(tokens.values[:-1], tokens.starts)


def _other_dtype(tokens: Tokens, x: torch.Tensor) -> Tokens:
    return Tokens(tokens.values.double(), tokens.starts)


def _gradient_of_first_frames(tokens: Tokens, x: torch.Tensor) -> Tokens:
    first = x[tokens.starts]
    return Tokens(tokens.values.detach() + first - first.detach(), tokens.starts)


def _raises(tokens: Tokens, x: torch.Tensor) -> Tokens:
    raise RuntimeError("no kernel")


BROKEN = (_shifted, _one_value_off, _nan, _missing_token, _other_dtype, _gradient_of_first_frames, _raises)


@pytest.mark.parametrize("breakage", BROKEN, ids=lambda f: f.__name__)
def test_a_wrong_implementation_is_refused(bench: Bench, breakage):
    right = eager.vectorised(eager.cosine, eager.index_add)
    broken = Implementation("broken", "eager", lambda x, batch: breakage(right(x, batch), x))
    rows = run(bench, [IMPLEMENTATIONS[0], broken, Implementation("right", "eager", right)])
    assert {row["implementation"] for row in rows} == {OURS, "right", CLONE}
    (refused,) = (row for row in bench.recorder.measurements if row["implementation"] == "broken")
    assert refused["not_timed"].startswith("fails: RuntimeError: no kernel" if breakage is _raises else "wrong: ")
    ours = Implementation(OURS, OURS, broken.form)
    with pytest.raises(WrongResult, match="segment_pool, S1: fastcompress: "):  # nothing to compare with
        run(bench, [ours, Implementation("right", "eager", right)])


def test_what_the_checks_refuse():
    def native(x: torch.Tensor) -> torch.Tensor:  # finds other segments, so its time is not comparable
        return (1 - F.cosine_similarity(x[:-1], x[1:], dim=-1)).float()

    x, batch = features(1500, 256, torch.bfloat16), Batch(cu_seqlens((1500,)))
    with pytest.raises(WrongResult, match="boundaries differ"):
        Expected(x, batch).check("native", eager.vectorised(native, eager.embedding_bag)(x, batch))
    x, batch = features(9000, 64, torch.float32), Batch(cu_seqlens((9000,)))
    expected = Expected(x, batch)
    starts = expected.segments.starts
    assert len(starts) > 2000 and torch.equal(starts, eager.vectorised(eager.cosine, eager.index_add)(x, batch).starts)

    def means(starts: torch.Tensor) -> Tokens:
        parts = x.split(torch.cat([starts, torch.tensor([9000])]).diff().tolist())
        return Tokens(torch.stack([part.mean(0) for part in parts]), starts)

    assert expected.check("few", means(torch.cat([starts[:10], starts[11:]]))) == 1
    with pytest.raises(WrongResult, match="many: 10 of"):
        expected.check("many", means(torch.cat([starts[:10], starts[20:]])))
    x, batch = features(24, 64, torch.float32).view(2, 12, 64), Batch(cu_seqlens((12, 12)), window=5)
    tokens = eager.average_pool(x, batch)
    check_average_pool("right", x, batch, tokens)
    with pytest.raises(WrongResult, match="wrong: values are off"):
        check_average_pool("wrong", x, batch, Tokens(tokens.values * 1.01, None))


def test_functions_are_timed_in_turn():
    numbers: list[int] = []
    order: list[str] = []
    functions = {name: lambda i, name=name: (numbers.append(i), order.append(name)) for name in "abc"}
    samples, disturbance = interleave(functions, 5, CpuClock(calls=2, tries=1))
    assert numbers == list(range(len(numbers)))  # each buffer is used once before any is reused
    rounds = ["".join(dict.fromkeys(order[start : start + 6])) for start in range(3, len(order), 6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1
    assert {len(s.quiet) + len(s.disturbed) for s in samples.values()} == {5} and disturbance.samples == 15
    samples, disturbance = interleave(functions, 4, device.DeviceClock(torch.device("cpu")))
    assert {len(s.seconds) for s in samples.values()} == {4} and disturbance.samples == 12


@pytest.mark.parametrize("threads, seconds", [(1, 0.1), (2, 1.0)])
def test_disturbed_samples(monkeypatch: pytest.MonkeyPatch, threads: int, seconds: float):
    """Another process had the core for 0.9 of a second. On one thread, waiting time is subtracted."""
    medians = [Samples(*each).fields()["median"] for each in (([1.0, 2.0, 3.0], [100.0]), ([1.0], [5.0, 6.0]))]
    assert medians == [2.0, 5.0]
    torch.set_num_threads(threads)
    monkeypatch.setattr(clock, "_waited", iter([5.0, 5.9, 7.0, 7.0]).__next__)
    monkeypatch.setattr(clock.time, "perf_counter", iter([2.0, 3.0, 10.0, 11.0]).__next__)
    monkeypatch.setattr(clock.time, "process_time", iter([1.0, 1.1, 2.0, 2.9]).__next__)
    samples = Samples()
    for _ in range(2):
        CpuClock(tries=1)(lambda i: None, itertools.count(), samples, Disturbance())
    assert samples.disturbed == [pytest.approx(seconds)] and samples.quiet == [1.0]


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("frames, tokens", ((1, 1), (5, 2), (100, 33)))
def test_bandwidth_bound_moves_every_byte(bound: BandwidthBound, threads: int, frames: int, tokens: int):
    x = torch.randint(1, 2**31, (frames, 16), dtype=torch.int32)
    grad = torch.full((tokens, 16), 7, dtype=torch.int32)
    for kind in KINDS:
        out, grad_x = bound.calls(kind, [x], [grad], tokens, threads, backward=True)(0)
        assert out.nbytes == grad.nbytes and grad_x.nbytes == x.nbytes
        assert torch.equal(grad_x.view(torch.int32), torch.full((frames * 16,), 7, dtype=torch.int32))
    untouched = torch.full((tokens, 16), -1, dtype=torch.int32)
    bound._library.bound_pool(x.data_ptr(), frames, untouched.data_ptr(), tokens, 64, threads)
    assert not (untouched == -1).any()
    source = torch.randint(0, 255, (5 * LINE,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    bound.copy(source, target, threads)
    assert torch.equal(source, target)
    assert bound.arithmetic(20, True, threads) == 2 * threads * bound.arithmetic(20, False, 1) > 0


def test_measurements_round_trip(bench: Bench, bound: BandwidthBound, tmp_path: Path):
    bench.bound = bound
    rows = run(bench, [IMPLEMENTATIONS[0], IMPLEMENTATIONS[-1]])
    path = tmp_path / "out.jsonl"
    results = read(path)
    assert results.name == machine.slug() and results.machine == machine.machine()
    assert results.runs[bench.recorder.date]["versions"]["torch"] == torch.__version__
    assert results.runs[bench.recorder.date]["versions"]["fastcompress_compiled"]
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text()
    assert results.rows["implementation"].to_list() == [row["implementation"] for row in rows]
    for name in ("median", "moved", "tokens"):
        assert results.rows[name].to_list() == [row[name] for row in rows]
    forward = results.rows[results.rows["direction"] == FORWARD]
    assert {f"bandwidth bound, {kind}" for kind in KINDS} < set(forward["implementation"])


def test_the_newest_of_a_table_counts_and_machines_do_not_mix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    for day, seconds in (("02", 2.0), ("01", 1.0)):
        monkeypatch.setattr(machine, "now", lambda day=day: f"2026-01-{day}")
        recorder = Recorder(path, {})
        recorder.add("pack", "a", "x", OURS, median=seconds)
        recorder.add("pack", "only then" if day == "01" else "a", "y", "eager", median=seconds)
    assert sorted(read(path).rows["median"]) == [1.0, 2.0, 2.0]
    monkeypatch.setattr(machine, "machine", lambda device: {"cpu": "Other", "cores": 3, "isa": "AVX2"})
    monkeypatch.setattr(machine, "now", lambda: "2026-01-03")
    Recorder(path, {})
    with pytest.raises(ValueError, match="must hold runs of one machine, got .*other-3c-avx2"):
        read(path)
    with pytest.raises(ValueError, match="b, line 1: KeyError"):
        parse(['{"run": "2026", "suite": "pack"}'], "b")
    monkeypatch.undo()
    assert machine.slug().replace("-", "").isalnum()
    hardware = {"cpu": "AMD EPYC(R) Processor @ 2.4GHz", "cores": 2, "isa": "AVX512"}
    assert machine.slug(hardware) == "amd-epyc-2c-avx512"
    assert machine.slug(hardware | {"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]):
    refused = {
        "--save --quick": "--save needs a full run, got --quick or --dry",
        "--dry": "--dry needs --device cuda",
        "nothing": "SUITE must be one of roofline, segment_pool",
        "scaling --cases S3": "--cases must be of S1, S2, ",
    }
    if not torch.cuda.is_available():
        refused["--device cuda"] = "torch sees no CUDA device; --dry runs without one"
    for arguments, message in refused.items():
        with pytest.raises(SystemExit):
            command.main(arguments.split())
        assert message in capsys.readouterr().err


def test_a_wrong_library_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    right = eager.fastcompress_pool
    monkeypatch.setattr(eager, "fastcompress_pool", lambda x, batch: _shifted(right(x, batch), x))
    arguments = ["segment_pool", "--quick", "--dtypes", "fp32", "--no-bound", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "segment_pool: wrong result, not timed: " in capsys.readouterr().err
    (path,) = tmp_path.glob(f"{machine.slug()}-cpu.jsonl")
    assert len(path.read_text().splitlines()) == 1 and "machine" in json.loads(path.read_text())
