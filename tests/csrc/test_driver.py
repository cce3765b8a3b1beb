"""The driver of the CUDA kernels, which needs no torch: in the emulator, and built by nvcc.

``make gpu-driver`` builds it for a GPU. It links the row kernels of the CPU, with which it compares bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import build_driver
from tests.support import ROOT, cuda_build

emulated = [
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the emulator is x86-64 code"),
    pytest.mark.emulated,
    pytest.mark.xdist_group("emulated"),  # one worker compiles
    pytest.mark.timeout(900),
]


def run(program: Path, *arguments: str, code: int = 0) -> list[dict]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def driver() -> Path:
    return build_driver.build("", 2)


def test_every_source_is_in_the_driver():
    """Only the host code of the ops, which needs torch, is left out."""
    host, device = build_driver.sources()
    left_out = {path.name for path in (ROOT / "csrc/cuda").glob("*.c*") if path.suffix in (".cu", ".cpp")}
    left_out -= {path.name for path in device}
    assert left_out == {f"{name}.cpp" for name in build_driver.NEEDS_TORCH}
    for path in [*host, *device]:
        assert "torch/" not in path.read_text(), path
    setup = (ROOT / "setup.py").read_text()
    for name, flags in build_driver.ISA.items():
        assert f'"{name}.cpp": "{flags}"' in setup
    for flag in ("-ffp-contract=off", "-fno-math-errno"):
        assert flag in setup and flag in build_driver.HOST
    assert "-fmad=false" in setup and "-fmad=false" in build_driver.DEVICE


def with_marks(test):
    for mark in emulated:
        test = mark(test)
    return test


@with_marks
def test_check(driver: Path):
    """Every kernel returns the bits of the CPU kernels, for three shapes and for offsets that do not fit the rows."""
    (summary,) = run(driver, "check")
    assert summary["wrong"] == 0 and summary["compared"] > 1000
    (short,) = run(driver, "sanitize")
    assert short["wrong"] == 0 and 0 < short["compared"] <= summary["compared"]


@with_marks
@pytest.mark.parametrize(
    "name, old, new, found",
    [
        ("segment_reduce.cuh", "total[k] = total[k] / S(segment.length)", "total[k] = total[k]", {"segment_reduce"}),
        ("pack.cuh", "values[u] = from[first + 32 * u]", "values[u] = from[first]", {"pack_rows"}),
    ],
)
def test_a_wrong_kernel_is_found(driver: Path, tmp_path: Path, name: str, old: str, new: str, found: set[str]):
    text = (ROOT / "csrc/cuda" / name).read_text()
    assert text.count(old) == 1
    unit = ROOT / "csrc/cuda" / f"{Path(name).stem}.cu"
    changed = tmp_path / unit.name
    changed.write_text(
        unit.read_text().replace(f'"{name}"', f'"{tmp_path / name}"').replace('#include "', '#include "cuda/')
    )
    changed.write_text(changed.read_text().replace(f'"cuda/{tmp_path}', f'"{tmp_path}'))
    (tmp_path / name).write_text(
        text.replace(old, new)
        .replace('#include "../', '#include "')
        .replace('#include "', '#include "cuda/')
        .replace('"cuda/pack.h"', '"pack.h"')
    )
    objects = build_driver.commands("g++", "", driver.with_name(f"{driver.name}-objects"), [])
    command = next(c for target, c in objects.items() if target.name == f"cuda_{unit.stem}.o")
    subprocess.run([*command[:-1], str(changed), "-o", str(tmp_path / "changed.o")], check=True)
    others = [str(target) for target in objects if target.name != f"cuda_{unit.stem}.o"]
    subprocess.run(
        ["g++", "-pthread", *others, str(tmp_path / "changed.o"), "-o", str(tmp_path / "driver")], check=True
    )
    *lines, summary = run(tmp_path / "driver", "sanitize", code=1)
    assert {line["check"] for line in lines} == found and summary["wrong"] == len(lines)


@with_marks
def test_ceilings_and_sweep(driver: Path):
    """The modes that measure print one line per result; the host's times mean nothing."""
    lines = run(driver, "ceilings", "65536")
    names = ["copy", "read", "store 16 bytes", "store 4 bytes", "3 reads per write"]
    assert [line["ceiling"] for line in lines] == names
    assert [round(line["bytes"] / lines[1]["bytes"], 2) for line in lines] == [2, 1, 1, 1, 1.33]
    lines = run(driver, "sweep", "150", "64")
    variants = [line for line in lines if "tile_rows" in line]
    for dtype in ("bfloat16", "float32"):
        found = [line for line in variants if line["dtype"] == dtype]
        assert sum(line["planned"] for line in found) == 1 and len(found) > 10
        assert len({(line["staged"], line["tile_rows"]) for line in found}) == len(found)
        assert all(line["seconds"] > 0 for line in found)
        (summary,) = (line for line in lines if "planned_over_best" in line and line["dtype"] == dtype)
        planned = next(line["seconds"] for line in found if line["planned"])
        best = min(line["seconds"] for line in found)
        assert summary["planned_over_best"] == pytest.approx(planned / best, abs=2e-3)
    assert run(driver, "nonsense", code=2) == []


@pytest.mark.skipif(cuda_build.nvcc_version() is None, reason="no nvcc")
@pytest.mark.slow  # nvcc takes minutes
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("cuda-build")
def test_build_for_a_gpu():
    """nvcc builds it without a GPU; it starts at once, and reports that there is no device."""
    program = build_driver.build("90", 2)
    begin = time.monotonic()
    done = subprocess.run([program, "check"], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert time.monotonic() - begin < 5
    assert done.returncode == 3 and json.loads(done.stdout) == {"error": "no CUDA device"}
    linked = subprocess.check_output(["readelf", "-d", program], text=True)
    assert "torch" not in linked and "cudart" not in linked
