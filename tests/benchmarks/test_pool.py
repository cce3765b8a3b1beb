"""The benchmarks: the registry runs, a wrong contender is not timed, the JSON says what it should."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.harness import clock as timing
from benchmarks.harness import machine
from benchmarks.harness.bandwidth_bound import KINDS, Floor, FloorUnavailable
from benchmarks.harness.cases import Case, Inputs, cu_seqlens, features, packed_buffers
from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.harness.compare import BOTH, FORWARD, Table, measure
from benchmarks.harness.memory import measure_memory
from benchmarks.measurement import Record
from benchmarks.registry import CASES, CONTENDERS, OURS, Contender, case
from benchmarks.suites import segment_pool as contenders
from benchmarks.suites.checks import Expected, WrongResult, check_average_pool, exact_starts
from benchmarks.suites.segment_pool import Tokens
from benchmarks.targets import TARGETS, outcomes
from tests.support import ROOT

SMALL = Case("S1", (40, 1, 2, 57), 64)
DTYPES = (torch.float32, torch.bfloat16)
#: Compiling takes a minute; `python -m benchmarks --quick` covers it.
EAGER = [contender for contender in CONTENDERS if contender.group != "compile"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs_of(lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> Inputs:
    return Inputs(features(sum(lengths), dim, dtype), cu_seqlens(lengths))


def run(contenders_: list[Contender], dtype: torch.dtype = torch.float32, floor: Floor | None = None) -> list[Table]:
    return measure(SMALL, dtype, 1, contenders_, floor, reps=2, last_level_cache=1 << 10, tries=1)


def build_floor() -> Floor:
    try:
        return Floor()
    except FloorUnavailable as error:
        pytest.skip(str(error))


def test_features_are_deterministic_and_correlated():
    first, second = (features(200, 64, torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, features(200, 64, torch.float32, seed=1))
    near = F.cosine_similarity(first[:-1], first[1:]).mean()
    far = F.cosine_similarity(first[:-50], first[50:]).mean()
    assert near > far + 0.1


def test_names_are_unique_and_cases_name_contenders():
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names) and names[0] == OURS
    assert len({c.name for c in CASES}) == len(CASES)
    for c in CASES:
        assert set(c.contenders or ()) <= set(names)
        assert case(c.name) is c
    with pytest.raises(ValueError, match="S1"):
        case("nothing")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registry_runs(dtype: torch.dtype):
    forward, both = run(EAGER, dtype)
    assert (forward.direction, both.direction) == (FORWARD, BOTH)
    installed = {contender.name for contender in EAGER if contender.available}
    for table in (forward, both):
        assert {row.contender for row in table.rows} == installed
        assert all(reason.endswith("is not installed") for reason in table.skipped.values())
        assert all(0 < row.p10 <= row.median <= row.p90 for row in table.rows)
        assert all(row.differing == 0 for row in table.rows if row.group != "less work")
        assert table.tokens > len(SMALL.lengths)
        assert OURS in report.table_text(table)


def test_every_contender_finds_the_segments_of_the_library():
    # The second sequence is too short for a local maximum; the others are not.
    inputs = inputs_of((200, 2, 300), 128, torch.float32)
    starts = contenders.fastcompress_pool(inputs).starts
    assert starts is not None and torch.equal(starts, exact_starts(inputs))
    assert torch.equal(starts, contenders.loop("split")(inputs).starts)


def _shifted(tokens: Tokens, inputs: Inputs) -> Tokens:
    assert tokens.starts is not None
    starts = tokens.starts.clone()
    starts[3] += 1
    return Tokens(tokens.values, starts)


def _one_value_off(tokens: Tokens, inputs: Inputs) -> Tokens:
    values = tokens.values.clone()
    values[2, 5] += 0.01 * values[2].abs().max().item()
    return Tokens(values, tokens.starts)


def _nan(tokens: Tokens, inputs: Inputs) -> Tokens:
    values = tokens.values.clone()
    values[0, 0] = float("nan")
    return Tokens(values, tokens.starts)


def _sum_for_mean(tokens: Tokens, inputs: Inputs) -> Tokens:
    assert tokens.starts is not None
    edges = torch.cat([tokens.starts, tokens.starts.new_tensor([inputs.x.shape[0]])])
    return Tokens(tokens.values * edges.diff().unsqueeze(1), tokens.starts)


def _missing_token(tokens: Tokens, inputs: Inputs) -> Tokens:
    return Tokens(tokens.values[:-1], tokens.starts)


def _other_dtype(tokens: Tokens, inputs: Inputs) -> Tokens:
    return Tokens(tokens.values.double(), tokens.starts)


def _detached(tokens: Tokens, inputs: Inputs) -> Tokens:
    # Right values whose gradient goes to the first frame of each segment only.
    assert tokens.starts is not None
    first = inputs.x[tokens.starts]
    return Tokens(tokens.values.detach() + first - first.detach(), tokens.starts)


BROKEN = (_shifted, _one_value_off, _nan, _sum_for_mean, _missing_token, _other_dtype, _detached)


@pytest.mark.parametrize("breakage", BROKEN, ids=lambda f: f.__name__)
def test_a_wrong_contender_is_not_timed(breakage):
    right = contenders.vectorised(contenders.cosine_scores, contenders.index_add)

    def call(inputs: Inputs) -> Tokens:
        return breakage(right(inputs), inputs)

    tables = run([CONTENDERS[0], Contender("broken", "eager", lambda: call), Contender("ok", "eager", lambda: right)])
    for table in tables:
        assert table.row("broken") is None
        assert table.row("ok") is not None
        assert table.skipped["broken"].startswith("wrong: ")


def test_half_precision_scores_are_refused():
    # The cosine in bf16 finds other segments: timing it would compare different work.
    def native(x: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(x[:-1], x[1:], dim=-1)).float()

    inputs = inputs_of((1500,), 256, torch.bfloat16)
    tokens = contenders.vectorised(native, contenders.embedding_bag)(inputs)
    with pytest.raises(WrongResult, match="boundaries differ"):
        Expected(inputs, exact_starts(inputs)).check("native", tokens)


def test_a_wrong_library_stops_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    right = contenders.fastcompress_pool
    ours = dataclasses.replace(CONTENDERS[0], build=lambda: lambda inputs: _shifted(right(inputs), inputs))
    with pytest.raises(WrongResult, match=OURS):
        run([ours])
    monkeypatch.setattr(command, "CONTENDERS", (ours,))
    assert command.main(["--quick", "--dtypes", "fp32", "--no-floor", "--no-memory"]) == 1
    assert "nothing is timed" in capsys.readouterr().err


def test_a_contender_that_raises_is_named_and_left_out():
    def call(inputs: Inputs) -> Tokens:
        raise RuntimeError("no kernel")

    for table in run([CONTENDERS[0], Contender("raises", "eager", lambda: call)]):
        assert table.skipped == {"raises": "fails: RuntimeError: no kernel"}


def test_average_pool_check():
    x = features(24, 64, torch.float32).view(2, 12, 64)
    for window in (3, 5):
        inputs = Inputs(x, cu_seqlens((12, 12)), window=window)
        tokens = contenders.average_pool(inputs)
        check_average_pool("right", inputs, tokens)
        with pytest.raises(WrongResult):
            check_average_pool("wrong", inputs, Tokens(tokens.values * 1.01, None))


def test_a_few_flipped_boundaries_are_counted_and_more_are_refused():
    inputs = inputs_of((9000,), 64, torch.float32)
    starts = exact_starts(inputs)
    assert starts.shape[0] > 2000
    expected = Expected(inputs, starts)
    few = torch.cat([starts[:10], starts[11:]])
    assert expected.check("few", Tokens(Expected(inputs, few).values.float(), few)).differing == 1
    many = torch.cat([starts[:10], starts[20:]])
    with pytest.raises(WrongResult, match="10 of"):
        expected.check("many", Tokens(Expected(inputs, many).values.float(), many))


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("frames, tokens", ((1, 1), (5, 2), (100, 33)))
def test_floor_writes_every_byte(threads: int, frames: int, tokens: int):
    floor = build_floor()
    x = torch.randint(1, 2**31, (frames, 16), dtype=torch.int32)
    grad = torch.full((tokens, 16), 7, dtype=torch.int32)
    for kind in KINDS:
        out, grad_x = floor.calls(kind, [x], [grad], tokens, threads, backward=True)(0)
        assert out.nbytes == grad.nbytes and grad_x.nbytes == x.nbytes
        assert torch.equal(grad_x.view(torch.int32), torch.full((frames * 16,), 7, dtype=torch.int32))
    untouched = torch.full((tokens, 16), -1, dtype=torch.int32)
    floor._library.floor_pool(x.data_ptr(), frames, untouched.data_ptr(), tokens, 64, threads)
    assert not (untouched == -1).any()


def test_interleave_rotates_buffers_and_is_fair():
    numbers: list[int] = []
    samples, disturbance = interleave({"a": numbers.append, "b": numbers.append}, reps=5, calls=2, tries=1)
    assert numbers == list(range(len(numbers)))  # no buffer comes twice before all others
    assert {len(s.quiet) + len(s.disturbed) for s in samples.values()} == {5}
    assert disturbance.samples == 10


def test_disturbed_samples_count_only_when_there_are_no_others():
    assert Samples([1.0, 2.0, 3.0], [100.0]).median == 2.0
    assert Samples([1.0], [5.0, 6.0]).median == 5.0


@pytest.mark.parametrize("threads, seconds", [(1, 0.1), (2, 1.0)])
def test_waiting_is_taken_off_a_disturbed_sample_of_one_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, seconds: float
):
    """A second, 0.9 of which somebody else had the core; then one in which nobody did."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(timing, "_waited", iter([5.0, 5.9, 7.0, 7.0]).__next__)
    monkeypatch.setattr(timing.time, "perf_counter", iter([2.0, 3.0, 10.0, 11.0]).__next__)
    monkeypatch.setattr(timing.time, "process_time", iter([1.0, 1.1, 2.0, 2.9]).__next__)
    samples, noted = Samples(), Disturbance()
    for _ in range(2):
        timing._sample(lambda i: None, itertools.count(), 1, 1, 0, samples, noted)
    assert samples.disturbed == [pytest.approx(seconds)] and samples.quiet == [1.0]


def test_targets_compare_with_the_best():
    rows = run([CONTENDERS[0]])[0].rows
    ours = dataclasses.replace(rows[0], median=1.0)
    others = [
        dataclasses.replace(ours, contender=name, group=group, median=median)
        for name, group, median in (("a", "eager", 9.0), ("b", "loop", 8.0), ("floor, fresh", "floor", 0.5))
    ]
    name = "float32"
    table = Table(SMALL, name, 1, FORWARD, 10, 2, 1, [ours, *others], {}, Disturbance())
    found = {one.target.name: one for one in outcomes([table])}
    eager, floor = found["fp32 forward vs eager"], found["fp32 forward / floor, fresh"]
    assert (eager.figure, eager.against, eager.reached) == (8.0, "b", True)
    assert (floor.figure, floor.reached) == (2.0, False)
    assert "8.00 reached" in report.targets_text(list(found.values()))


def test_json(tmp_path: Path):
    tables = run([CONTENDERS[0], *(c for c in CONTENDERS if c.group == "less work")], floor=build_floor())
    path = tmp_path / "result.json"
    path.write_text(json.dumps(Record(pool=tables, memory=[{"error": "none"}]).document({"reps": 2})))
    document = json.loads(path.read_text())
    assert set(document) == {
        "schema", "date", "commit", "machine", "versions", "settings", "tables", "memory", "methods", "packing",
        "decoder", "prefill", "scaling", "ceilings", "share", "energy", "no_energy", "targets",
    }  # fmt: skip
    assert {"cpu", "cores", "caches", "memory", "transparent_hugepages"} <= set(document["machine"])
    assert document["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text()
    for table, measured in zip(document["tables"], tables, strict=True):
        assert table["tokens"] == measured.tokens and table["frames"] == SMALL.frames
        rows = {row["contender"]: row for row in table["rows"]}
        assert {f"floor, {kind}" for kind in KINDS} < set(rows)
        assert rows[OURS]["multiple_of_fastcompress"] == 1.0
        assert rows[OURS]["seconds"]["median"] > 0
        assert rows[OURS]["differing_boundaries"] == 0
    assert {target["name"] for target in document["targets"]} <= {target.name for target in TARGETS}
    assert document["targets"]


def test_machine_slug_is_a_file_name():
    assert machine.slug().replace("-", "").isalnum()
    hardware = {"cpu": "AMD EPYC(R) Processor @ 2.4GHz", "cores": 2, "isa": "AVX512"}
    assert machine.slug(hardware) == "amd-epyc-2c-avx512"
    assert machine.slug(hardware | {"isa": "AVX2"}) == "amd-epyc-2c-avx2"
    assert machine.slug(hardware | {"isa": "NO AVX"}) == "amd-epyc-2c-noavx"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_measured():
    entry = measure_memory(torch.float32, 1, frames=3000, dim=64)
    if "error" in entry:
        pytest.skip(entry["error"])
    assert entry["input_bytes"] == 3000 * 64 * 4
    assert entry["output_bytes"] > entry["tokens"] * 64 * 4
    assert entry["extra_bytes"] == entry["peak_bytes"] - entry["output_bytes"]


def test_buffers_outgrow_the_cache():
    buffers = packed_buffers(Case("wide", (40,), 1 << 14), torch.float32, last_level_cache=100 << 20)
    assert sum(inputs.x.nbytes for inputs in buffers) >= 400 << 20
    assert len({inputs.x.data_ptr() for inputs in buffers}) == len(buffers)
    assert all(torch.equal(inputs.x, buffers[0].x) for inputs in buffers[-3:])
    assert len(packed_buffers(case("tiny"), torch.float32, 1 << 25)) == 1
