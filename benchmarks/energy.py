"""Joules, if the machine tells: of a CPU's packages (RAPL, in ``/sys/class/powercap``) or of a GPU's board (NVML).

Both count everything that the chip does meanwhile, idling and other processes included.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness.cases import Case
from benchmarks.harness.compare import admit
from benchmarks.registry import CONTENDERS, OURS

#: An hour of audio at 25 frames a second, the rate of Qwen2-Audio's encoder, in clips of a minute.
HOUR = Case(
    "an hour",
    (1500,) * 60,
    1280,
    backward=False,
    contenders=(OURS, "compile, tuned + embedding_bag", "compile, tuned + gather", "blocked + embedding_bag"),
)
QUICK = Case("quick", (200, 100), 64, backward=False, contenders=(OURS, "blocked + embedding_bag"))


class EnergyUnavailable(Exception):
    """The machine does not tell; the text says why."""


class Meter(Protocol):
    """Counts joules."""

    def joules(self) -> float:
        """Since some time."""


class Rapl:
    """The packages of the CPU.

    Args:
        root: the folder of the counters.

    Raises:
        EnergyUnavailable: it has none, or they may not be read.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        try:
            # The parts of a package, and what is beyond it, have zones of other names.
            self._zones = [
                zone for zone in sorted(root.glob("*rapl:*")) if (zone / "name").read_text().startswith("package")
            ]
            self._last = [self._read(zone, "energy_uj") for zone in self._zones]
            self._range = [self._read(zone, "max_energy_range_uj") for zone in self._zones]
        except OSError as error:
            raise EnergyUnavailable(f"{type(error).__name__}: {error.filename}") from error
        if not self._zones:
            raise EnergyUnavailable(f"{root} counts no package of a CPU")
        self._total = 0

    @staticmethod
    def _read(zone: Path, name: str) -> int:
        return int((zone / name).read_text())

    def joules(self) -> float:
        """Since the meter was made; it must be read more often than the counters wrap, once in some minutes."""
        for i, zone in enumerate(self._zones):
            now = self._read(zone, "energy_uj")
            self._total += (now - self._last[i]) % (self._range[i] + 1)
            self._last[i] = now
        return self._total / 1e6


class Nvml:
    """A GPU's board, since the driver was loaded.

    Args:
        uuid: of the GPU, such as ``GPU-8f6d…``.
        library: NVML; the driver's if ``None``.

    Raises:
        EnergyUnavailable: there is no driver, or its GPU does not count.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise EnergyUnavailable(str(error)) from error
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))
        self.joules()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise EnergyUnavailable(f"{name} gives status {status}")

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        return millijoules.value / 1e3


def joules_a_call(meter: Meter, call: Callable[[], Any], seconds: float, wait: Callable[[], None]) -> float:
    """Of calls one after the other for so many seconds; ``wait`` returns when the device has done them."""
    call()
    wait()
    before, start, calls = meter.joules(), time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        calls += 1
        call()
        wait()
    return (meter.joules() - before) / calls


@dataclass(frozen=True)
class Energy:
    """Joules of a call, by contender."""

    case: Case
    dtype: str
    threads: int
    joules: dict[str, float]


def measure(
    meter: Meter, case: Case, dtype: torch.dtype, threads: int, last_level_cache: int, seconds: float = 3.0
) -> Energy:
    """Of pooling ``case``, forward.

    Raises:
        WrongResult: the library is wrong.
    """
    joules = {}
    with torch.no_grad():
        for entrant in admit(CONTENDERS, case, dtype, threads, last_level_cache).entrants:
            # The hour is larger than any cache: one buffer will do.
            pool = functools.partial(entrant.call, entrant.inputs[0])
            joules[entrant.contender.name] = joules_a_call(meter, pool, seconds, lambda: None)
    return Energy(case, str(dtype).removeprefix("torch."), threads, joules)


def rows(found: Sequence[Energy]) -> list[Sequence[str]]:
    """For ``report.align``."""
    lines: list[Sequence[str]] = [["energy", "", "joules", "x ours"]]
    for one in found:
        for name, joules in one.joules.items():
            setting = f"{one.case.name}, {one.dtype}, {one.threads} thr"
            lines.append([name, setting, f"{joules:.2f}", f"{joules / one.joules[OURS]:.2f}"])
    return lines
