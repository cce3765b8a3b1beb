"""Call the planner of the fused kernel on the host."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scripts.sass.compile import ROOT, source_digest
from scripts.sass.machines import Machine

_DTYPES = ("float", "double", "BFloat16", "Half")  # the order of DType in params.h


@dataclass(frozen=True)
class Plan:
    """The tiles of a launch: rows of a tile, rows that it loads in addition, tiles, and what a block uses."""

    tile_rows: int
    halo: int
    num_tiles: int
    staged: bool
    shared_bytes: int
    threads: int
    lanes_per_row: int

    @property
    def reads(self) -> float:
        """Rows that the multiprocessors read per row of x; all but one come from the second-level cache."""
        return 1 + self.halo / self.tile_rows


@functools.cache
def _program() -> Path:
    source, unit = Path(__file__).with_name("plan.cpp"), ROOT / "csrc" / "cuda" / "segment_pool.cu"
    emulation = ROOT / "tests" / "support" / "cuda_emulation"
    texts = [path.read_text() for path in (source, emulation / "emulator.h", *sorted(unit.parent.glob("*plan*.cpp")))]
    key = source_digest(unit, tuple(texts))
    program = ROOT / "build" / "sass" / f"plan-{key}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        for old in program.parent.glob("plan-*"):
            old.unlink()
        units = [source, unit, *sorted(unit.parent.glob("*plan*.cpp"))]
        # The planner calls no function of the runtime, which the launchers in the same file call.
        flags = ["-std=c++17", "-O0", "-w", "-pthread", "-Wl,--unresolved-symbols=ignore-all"]
        flags += [f"-I{ROOT / 'csrc'}", f"-I{emulation}", "-x", "c++"]
        done = subprocess.run(["g++", *flags, *map(str, units), "-o", str(program)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the planner does not compile:\n{done.stderr[-3000:]}")
    return program


@functools.cache
def plan(machine: Machine, dtype: str, rows: int, width: int, order: int = 1) -> Plan:
    """Return the plan of the fused kernel on a machine, for local maxima of an order."""
    arguments = [machine.processors, machine.shared_per_processor, machine.shared_per_block, _DTYPES.index(dtype)]
    command = [str(_program()), *map(str, [*arguments, rows, width, order])]
    return Plan(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
