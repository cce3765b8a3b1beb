"""Install wheels in empty environments with several versions of torch, and run their ops on the CPU.

usage: python scripts/wheel_test.py [WHEEL ...] [--dry-run] [--torch SPEC ...]

The default is every repaired wheel in dist/ with torch 2.10 (the oldest supported one), 2.11, the version of
requirements-torch.txt and the newest release. On Linux, each torch with CUDA is a download of several gigabytes. In a
SPEC, ``===`` selects exactly that build if an index has several builds of a version. No GPU or driver is needed.
``--torch here`` uses the torch of this Python instead of downloading one.
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

# Runs every op on the CPU, with the compiled kernels and with the reference. It must not import files of the checkout.
USE = """
import json, pathlib, torch, fastcompress as fc
from fastcompress.cli import info
from fastcompress.dispatch.library import COMPILED, LIBRARY_PATH
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
    return ["torch===2.10.0", "torch===2.11.0", *pinned, "torch"]


def show(command: list[str]) -> str:
    return shlex.join(command).replace(shlex.quote(USE), "...")


def environment(name: str) -> tuple[Path, Path]:
    """Return the folder of an environment and its Python."""
    folder = ENVIRONMENTS / name
    return folder, folder / "bin" / "python"


def made_by(spec: str, folder: Path, python: Path) -> list[list[str]]:
    """Return the commands that create an environment."""
    made = [[sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)]]
    return made if spec == "here" else [*made, [*pip(python), spec]]


def used_by(wheel: Path, folder: Path, python: Path) -> list[list[str]]:
    """Return the commands that install a wheel in place of the previous one and use it."""
    install = [*pip(python), "--no-deps", "--force-reinstall", str(wheel)]
    return [install, [str(python), "-I", "-c", USE], [str(folder / "bin" / "fastcompress"), "info"]]


def pip(python: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile"]


def share_torch(folder: Path) -> None:
    """Make the torch of this Python importable in the environment, after the environment's own packages."""
    site = next(folder.glob("lib/python*/site-packages"))
    import torch

    paths = {str(Path(torch.__file__).parents[1]), sysconfig.get_paths()["purelib"]}
    (site / "torch-from-elsewhere.pth").write_text("\n".join(sorted(paths)) + "\n")


def test(wheels: list[Path], spec: str, dry_run: bool) -> list[str]:
    """Test the wheels with one version of torch, and return the errors."""
    folder, python = environment("".join(c if c.isalnum() else "-" for c in spec))
    print(f"\n== {spec}", flush=True)
    problems: list[str] = []
    for command in made_by(spec, folder, python):
        if problem := run(command, dry_run)[1]:
            return [f"{spec}: {problem}"]
    if spec == "here" and not dry_run:
        share_torch(folder)
    for wheel in wheels:
        print(f"\n-- {wheel.name} with {spec}", flush=True)
        for command in used_by(wheel, folder, python):
            said, problem = run(command, dry_run)
            if problem is None and command[-1] == USE and not dry_run:
                problem = wrong_library(wheel, json.loads(said.splitlines()[-1])[2])
            if problem:
                problems.append(f"{wheel.name} with {spec}: {problem}")
                break
    if not dry_run:
        shutil.rmtree(folder)  # frees gigabytes
    return problems


def run(command: list[str], dry_run: bool) -> tuple[str, str | None]:
    """Run a command, and return its output and its error message."""
    print(f"$ {show(command)}", flush=True)
    if dry_run:
        return "", None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ENVIRONMENTS)
    print(done.stdout, end="", flush=True)
    return done.stdout, f"failed with exit code {done.returncode}: {show(command)}" if done.returncode else None


def wrong_library(wheel: Path, library: dict[str, Any]) -> str | None:
    """Return the difference between the name of a wheel and its library, or None."""
    label = wheel.name.split("-")[1].partition("+")[2]
    version = library["cuda_version"]
    inside = f"cu{version.replace('.', '')}" if version else ""
    if label != inside:
        return f"the label of the wheel is {label!r}, but its library is for {inside or 'no CUDA'}"
    wanted = json.loads((ROOT / "wheels.json").read_text()).get(version)
    if wanted and "manylinux" in wheel.name:  # built by `make wheels`; `make wheel` may choose other GPUs
        archs = ";".join(wanted["archs"]) + "+PTX"
        if library["cuda_archs"] != archs:
            return f"the library is for {library['cuda_archs']}, but wheels.json has {archs}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="*", metavar="WHEEL", help="default: dist/*manylinux*.whl")
    parser.add_argument("--torch", action="append", metavar="SPEC", help=f"default: {', '.join(specs())}")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args()
    wheels = [path.resolve() for path in options.wheels or sorted(ROOT.glob("dist/*manylinux*.whl"))]
    missing = [str(path) for path in wheels if not path.exists()]
    if missing or not wheels:
        parser.error(f"no wheel: {', '.join(missing) or 'dist'}; build wheels with `make wheels`")
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    problems = [problem for spec in options.torch or specs() for problem in test(wheels, spec, options.dry_run)]
    print("\n" + ("\n".join(problems) or ("dry run: no command was run" if options.dry_run else "all passed")))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
