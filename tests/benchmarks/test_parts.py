"""The parts of the benchmark beside the tables: scaling, ceilings, the share of a training step, energy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcompress as fc
from benchmarks import __main__ as command
from benchmarks import energy, gpu, gpu_report, report
from benchmarks.energy import EnergyUnavailable, Nvml, Rapl
from benchmarks.gpu_run import Run
from benchmarks.harness.bandwidth_bound import LINE, Floor, FloorUnavailable
from benchmarks.harness.cases import Case, cu_seqlens, features, packed_buffers, threshold_of
from benchmarks.harness.compare import BOTH, FORWARD
from benchmarks.harness.device import Flush
from benchmarks.registry import CONTENDERS, OURS
from benchmarks.suites import roofline, scaling
from benchmarks.suites import training_step as share
from benchmarks.suites.checks import WrongResult, exact_starts
from benchmarks.suites.segment_pool import segment_ends


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build_floor() -> Floor:
    try:
        return Floor()
    except FloorUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 16, 64])
def test_a_threshold_gives_segments_of_a_mean_length(length: int, dtype: torch.dtype):
    x, cu = features(2000, 64, dtype), cu_seqlens((1200, 800))
    rule = threshold_of(x, cu, length)
    starts = fc.segment_pool(x, cu_seqlens=cu, rule=rule).segments.starts
    assert len(starts) == round(2000 / length)
    (inputs, *_) = packed_buffers(Case("", (1200, 800), 64, mean_length=length, calls=2), dtype, 1 << 10)
    assert torch.equal(exact_starts(inputs), fc.segment_pool(inputs.x, cu_seqlens=cu, rule=inputs.rule).segments.starts)


def test_windows_are_counted():
    case = Case("", (10, 3, 8), 64, rule=fc.Uniform(4), calls=2)
    (inputs, *_) = packed_buffers(case, torch.float32, 1 << 10)
    assert exact_starts(inputs).tolist() == [0, 4, 8, 10, 13, 17]
    with pytest.raises(ValueError, match="LocalMax.. or a Threshold, got uniform:4"):
        segment_ends(torch.zeros(21), torch.zeros(21, dtype=torch.bool), inputs.rule)


def test_each_case_is_measured_once():
    plan = scaling.plan(scaling.AXES, (1, 2))
    assert plan[scaling.BASE, 2] == (scaling.FRAMES, scaling.WIDTH, scaling.THREADS)
    assert plan[scaling.BASE, 1] == (scaling.THREADS,)
    assert [threads for case, threads in plan if case is not scaling.BASE] == [2] * (len(plan) - 2)
    assert len({case.name for case, _ in plan}) == len(plan) - 1
    few = scaling.plan(scaling.AXES, (1,), most=4 * 10_000 * 256)
    assert {case.name for case, _ in few} == {"1 clip", "width 64", "width 256"}
    names = {contender.name for contender in CONTENDERS}
    assert set(scaling.FORMS) <= names and set(energy.HOUR.contenders or ()) <= names
    frames = [case.frames for case in scaling.AXES[0].cases]
    assert frames == sorted(frames) and (frames[0], frames[-1]) == (1_000, 100_000)


def test_the_command_measures_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    build_floor()
    path = tmp_path / "out.json"
    arguments = ["--quick", "--parts", "scaling", "roofline", "energy", "--dtypes", "fp32", "--reps", "1"]
    assert command.main([*arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {axis for table in document["scaling"] for axis in table["axes"]} == {axis.name for axis in scaling.QUICK}
    by_axis: dict[str, list[dict[str, Any]]] = {}
    for table in document["scaling"]:
        assert {row["group"] for row in table["rows"]} >= {"fastcompress", "less work", "floor"}
        assert table["rows"][0]["seconds"]["median"] > 0 and not table["not_timed"]
        for axis in table["axes"]:
            by_axis.setdefault(axis, []).append(table)
    assert [table["frames"] for table in by_axis["frames"]] == [200, 200, 400, 400]
    (length, both) = by_axis["segment length"]
    assert (length["direction"], both["direction"]) == (FORWARD, BOTH) and length["tokens"] == 200 / 4
    assert {row["group"] for row in length["rows"]} >= {"eager"}
    assert by_axis["window"][0]["tokens"] == 200 / 4 and by_axis["window"][0]["window"] == 4
    (ceilings,) = document["ceilings"]
    assert ceilings["threads"] == 1 and all(rate > 0 for name, rate in ceilings.items() if name.endswith("_second"))
    assert document["energy"] or document["no_energy"]
    text = capsys.readouterr().out
    assert "segment length" in text and "fused Gop/s" in text and "energy" in text


def test_a_wrong_library_is_not_scaled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A rule other than the one asked for is wrong."""
    right = CONTENDERS[0].build()
    monkeypatch.setattr(
        "benchmarks.suites.segment_pool.fastcompress_pool",
        lambda inputs: right(type(inputs)(inputs.x, inputs.cu_seqlens, fc.LocalMax(order=2))),
    )
    assert command.main(["--quick", "--parts", "scaling", "--dtypes", "fp32", "--no-floor", "--reps", "1"]) == 1
    assert "scaling: wrong, so nothing is timed" in capsys.readouterr().err


def test_operations():
    """Counted by hand: x of 2 rows of 3 to 1 token."""
    assert roofline.operations(2, 3, 1, FORWARD, scores=False) == 2 * 3 + 3
    assert roofline.operations(2, 3, 1, FORWARD) == 4 * 2 * 3 + 2 * 3 + 3
    assert roofline.operations(2, 3, 1, BOTH) == 4 * 2 * 3 + 2 * 3 + 3 + 3


def test_the_ceilings_do_what_they_are_timed_at():
    floor = build_floor()
    source = torch.randint(0, 255, (5 * LINE,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    floor.copy(source, target, 2)
    assert torch.equal(source, target)
    floor.read(source, 2)
    assert torch.equal(source, target)
    separate, fused = floor.arithmetic(10, False, 1), floor.arithmetic(10, True, 1)
    assert fused == 2 * separate > 0 and floor.arithmetic(20, True, 3) == 6 * fused


def test_share_of_a_step(monkeypatch: pytest.MonkeyPatch):
    if not share.available():
        pytest.skip("fastcompress[lalm] is not installed")
    every, third = share.measure(1, 1, 1, rules=("uniform:1", "uniform:3"), steps=1)
    assert every.tokens == 1 and 0.33 < third.tokens < 0.4
    assert {"segment_pool", "segment_expand", "pack_rows"} <= third.ops.keys()
    assert 0 < third.share < 0.1 and 0 < third.busy < 2 * third.samples.median
    assert "uniform:3, 1 thr" in report.share_text([every, third])
    monkeypatch.setattr(share, "_PREFIX", "another::")
    with pytest.raises(WrongResult, match="none of fastcompress's ops ran"):
        share.measure(1, 1, 1, rules=("uniform:3",), steps=1)


def package(root: Path, number: int, joules: float, name: str = "package") -> Path:
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{name}-{number}\n" if name == "package" else f"{name}\n")
    (zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text("99999999\n")
    return zone


def test_packages_are_added_and_wrap(tmp_path: Path):
    package(tmp_path, 0, 10)
    package(tmp_path, 1, 99)
    package(tmp_path, 2, 50, name="psys")  # counts the packages once more
    meter = Rapl(tmp_path)
    assert meter.joules() == 0
    package(tmp_path, 0, 12.5)
    package(tmp_path, 2, 60, name="psys")
    assert meter.joules() == 2.5
    package(tmp_path, 1, 3)  # over its range of 100 J
    assert meter.joules() == 6.5


def test_what_does_not_tell_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EnergyUnavailable, match="counts no package"):
        Rapl(tmp_path)
    zone = package(tmp_path, 0, 1)

    def read_text(path: Path, right=Path.read_text) -> str:
        if path == zone / "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return right(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(EnergyUnavailable, match="PermissionError: .*energy_uj"):
        Rapl(tmp_path)
    with pytest.raises(EnergyUnavailable, match="nvmlInit_v2 gives status 9"):
        Nvml("GPU-0", FakeNvml(9))


class FakeNvml:
    """Uses a joule a reading."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.used, self.uuid = status, 0, b""

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        self.uuid = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, millijoules: Any) -> int:
        self.used += 1000
        millijoules._obj.value = self.used
        return 0


def test_joules_of_a_gpu():
    library = FakeNvml()
    meter = Nvml("GPU-0", library)
    assert library.uuid == b"GPU-0"
    assert energy.joules_a_call(meter, lambda: None, 0.0, lambda: None) == 1


def test_energy_is_measured_a_call():
    class Meter:
        used = 0.0

        def joules(self) -> float:
            return self.used

    meter = Meter()

    def call() -> None:
        meter.used += 2 if meter.used else 100  # the first one warms up

    assert energy.joules_a_call(meter, call, 0.001, lambda: None) == 2 and meter.used >= 102
    one = energy.measure(FakeMeter(), energy.QUICK, torch.float32, 1, 1 << 10, seconds=0.0)
    assert one.joules == dict.fromkeys((OURS, "blocked + embedding_bag"), 1.0)
    assert "blocked + embedding_bag" in report.energy_text([one], None)
    assert report.energy_text([], "no counter") == "energy: not told by this machine (no counter)"


class FakeMeter:
    """Uses a joule a reading."""

    used = 0.0

    def joules(self) -> float:
        self.used += 1
        return self.used


def test_energy_of_a_gpu_is_measured_by_contender(monkeypatch: pytest.MonkeyPatch):
    run = Run(torch.device("cpu"), 1, float("inf"), Flush(torch.device("cpu")))
    assert "error" in gpu.measure_energy(run, dry=True)  # no GPU has that name
    case = gpu.GpuCase(2, 60, 48)
    monkeypatch.setattr(gpu, "CASES", (case,))
    monkeypatch.setattr(energy, "HOUR", Case("", (60, 60), 48))
    monkeypatch.setattr(energy, "Nvml", lambda uuid: FakeMeter())
    monkeypatch.setattr(energy.time, "perf_counter", iter(range(1000)).__next__)  # a second a call
    found = gpu.measure_energy(run, dry=True)
    eager = [c.name for c in gpu.all_contenders(dry=True) if c.group == "eager"]
    assert (found["case"], found["dtype"]) == (str(case), "bfloat16")
    assert found["joules"] == dict.fromkeys(["fastcompress, cuda", *eager], 1.0)
    document = gpu_report.document([], 1.0, [], [], {}, found)
    assert "2 x 60 x 48: fastcompress, cuda: 1.000 J of the board" in gpu_report.text(document)
