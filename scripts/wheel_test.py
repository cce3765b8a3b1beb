"""Installs a wheel in empty environments beside several builds of torch, and runs it on the CPU.

usage: python scripts/wheel_test.py WHEEL [--dry-run] [--torch SPEC ...]

By default: torch 2.10, the oldest that the wheel is for, the newest release, both as they come from the index (on
Linux with CUDA, several gigabytes each), and the one of requirements-torch.txt. ``===`` asks for that very build, where
an index also has others of the version. No GPU and no driver is needed. ``--torch here`` takes the torch of this
Python instead of downloading one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "wheel-test"

# Every op once on the CPU, compiled against the reference; none of the checkout's files may be in the way.
USE = """
import json, pathlib, torch, fastcompress as fc
from fastcompress import info
from fastcompress._library import COMPILED, LIBRARY_PATH
assert "site-packages" in fc.__file__, fc.__file__
assert COMPILED, "the wheel's library does not load"
torch.manual_seed(0)

def run():
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(97, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        cu = torch.tensor([0, 40, 40, 97], dtype=torch.int32)
        for rule in (fc.Uniform(3), fc.LocalMax(), fc.LocalMax(2, min_len=2, max_len=5), fc.Threshold(0.9)):
            for reduce in ("mean", "max"):
                pooled = fc.segment_pool(x, cu_seqlens=cu, rule=rule, reduce=reduce)
                results += [pooled.values, pooled.segments.starts, fc.segment_expand(pooled.values, pooled.segments)]
                results += torch.autograd.grad(pooled.values.sum(), x)
        weighted = fc.segment_reduce(x, pooled.segments, weights=torch.linspace(0, 1, 97).to(dtype))
        d = fc.adjacent_distance(x, cu_seqlens=cu)
        results += [weighted, d, *torch.autograd.grad(weighted.sum() + d.nansum(), x)]
    ids = torch.tensor([[1, 9, 2], [9, 3, 9]])
    table = torch.randn(10, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
    audio, cu = pooled.values[:6].float().detach().requires_grad_(), torch.tensor([0, 3, 3, 6])
    packed = fc.pack(ids, table, audio, audio_cu_seqlens=cu, placeholder=9, placeholder_counts=1, labels=ids)
    results += [packed.inputs_embeds, packed.cu_seqlens, packed.source, packed.labels, packed.unpack()[0]]
    results += torch.autograd.grad(packed.inputs_embeds.sum(), (table, audio))
    return results

compiled = run()
with fc.backend("reference"):
    expected = run()
for a, b in zip(compiled, expected, strict=True):
    assert torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)), (a, b)
found = info.collect()
assert all(choice["cpu"]["backend"] == "compiled" for choice in found["ops"].values())
print(json.dumps([len(compiled), found["versions"], found["library"]]))
"""


def specs() -> list[str]:
    pinned = (ROOT / "requirements-torch.txt").read_text().split()
    return ["torch===2.10.0", "torch", *pinned]


def show(command: list[str]) -> str:
    return shlex.join(command).replace(shlex.quote(USE), "...")


def environment(name: str) -> tuple[Path, Path]:
    """The folder of an environment and its Python."""
    folder = ENVIRONMENTS / name
    return folder, folder / "bin" / "python"


def commands(wheel: Path, spec: str, folder: Path, python: Path) -> list[list[str]]:
    """What makes an environment, and then uses the wheel in it."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    made = [[sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)]]
    if spec != "here":
        made.append([*pip, spec])
    made.append([*pip, "--no-deps", str(wheel)])
    return [*made, [str(python), "-I", "-c", USE], [str(folder / "bin" / "fastcompress"), "info"]]


def share_torch(folder: Path) -> None:
    """Lets the environment find the torch of this Python, behind its own packages."""
    site = next(folder.glob("lib/python*/site-packages"))
    import torch

    paths = {str(Path(torch.__file__).parents[1]), sysconfig.get_paths()["purelib"]}
    (site / "torch-from-elsewhere.pth").write_text("\n".join(sorted(paths)) + "\n")


def test(wheel: Path, spec: str, dry_run: bool) -> str | None:
    """Returns what went wrong."""
    folder, python = environment("".join(c if c.isalnum() else "-" for c in spec))
    print(f"\n== {wheel.name} with {spec}", flush=True)
    for command in commands(wheel, spec, folder, python):
        print(f"$ {show(command)}", flush=True)
        if dry_run:
            continue
        if command[-1] == USE and spec == "here":
            share_torch(folder)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ENVIRONMENTS)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return f"{spec}: failed with exit code {done.returncode}: {show(command)}"
        if command[-1] == USE and (problem := wrong_library(wheel, json.loads(done.stdout.splitlines()[-1])[2])):
            return f"{spec}: {problem}"
    if not dry_run:
        shutil.rmtree(folder)  # gigabytes
    return None


def wrong_library(wheel: Path, library: dict[str, Any]) -> str | None:
    """What the wheel's name and its library do not agree on."""
    label = wheel.name.split("-")[1].partition("+")[2]
    version = library["cuda_version"]
    inside = f"cu{version.replace('.', '')}" if version else ""
    return None if label == inside else f"the wheel is labelled {label!r}, its library is for {inside or 'no CUDA'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?", metavar="WHEEL", help="such as dist/fastcompress-....whl")
    parser.add_argument("--torch", action="append", metavar="SPEC", help=f"default: {', '.join(specs())}")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = parser.parse_args()
    if options.wheel is None or not options.wheel.exists():
        parser.error(f"no wheel {options.wheel or ''}: build one with `make wheel`")
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    wheel = options.wheel.resolve()
    problems = [test(wheel, spec, options.dry_run) for spec in options.torch or specs()]
    found = [problem for problem in problems if problem]
    print("\n" + ("\n".join(found) or ("dry run: nothing was run" if options.dry_run else "all passed")))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
