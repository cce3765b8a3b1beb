"""Time functions against each other on a machine that may have other work."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Share of a sample that our threads may wait for a core before the sample counts as disturbed.
MAX_WAIT = 0.04
#: Tries per sample.
TRIES = 4
#: Seconds to wait for a quiet machine before the second try, twice as long before each further one.
_PAUSE = 0.05
#: Undisturbed samples from which the disturbed ones are left out.
_ENOUGH = 3
#: Seconds of scheduling noise that are no disturbance.
_FREE_WAIT = 2e-5

Call = Callable[[int], Any]


@dataclass
class Samples:
    """Seconds per call, those taken on a quiet machine and those that were disturbed.

    Disturbed samples of one thread are its CPU time, without the time that it waited for a core; those of more threads
    include the waits, which overlap. ``busy`` is the CPU time of all threads, retries included.
    """

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The samples that count: the quiet ones if there are enough of them, else all."""
        return self.quiet if len(self.quiet) >= _ENOUGH else self.quiet + self.disturbed

    def fields(self) -> dict[str, Any]:
        """Return median, 10th and 90th percentile, and the number of samples, as fields of a measurement."""
        p10, median, p90 = np.quantile(self.seconds, (0.1, 0.5, 0.9)).tolist()
        return {"median": median, "p10": p10, "p90": p90, "reps": len(self.seconds)}


@dataclass
class Disturbance:
    """How far other work got into the samples of a table.

    Attributes:
        samples: Samples taken, retries included.
        retried: Samples discarded because our threads waited for a core.
        kept: Samples kept although disturbed, since no retry was better and there were no others.
        foreign: Cores that other processes kept busy on average. On another core than ours they take memory bandwidth
            without making us wait.
    """

    samples: int = 0
    retried: int = 0
    kept: int = 0
    foreign: float = 0.0


#: Takes one sample of a call, whose arguments come from the numbers.
Clock = Callable[[Call, Iterator[int], Samples, Disturbance], None]


def _waited() -> float:
    """Return the seconds that our threads have waited for a core; 0 if the system does not report it."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(path.read_text().split()[1])
    return total / 1e9


def _foreign() -> float:
    """Return the core-seconds of other processes since boot; 0 if the system does not report them."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    except (OSError, ValueError):
        return 0.0
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def recall_memory(size: int) -> None:
    """Write ``size`` bytes of new memory, in huge pages where there are any, and free them.

    A virtual machine may return free memory to its host within a fraction of a second, and whoever touches it next
    waits for the host: 64 MB of new huge pages took 8 ms, and 15 to 200 ms after a pause of half a second (AMD EPYC
    under KVM with free page reporting). Called before each sample, so that no implementation pays for the pause that
    a slow one before it made; new pages from the system's own free list still cost what they cost.
    """
    if size <= 0:
        return
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    with mmap.mmap(-1, size, **private) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        view.fill_(1)
        del view  # the mapping cannot close while it is in use


@dataclass(frozen=True)
class CpuClock:
    """Takes the least disturbed of a few tries.

    Attributes:
        calls: Calls per sample.
        tries: Tries of a sample that other work disturbs.
        recall: Bytes for ``recall_memory``.
    """

    calls: int = 1
    tries: int = TRIES
    recall: int = 0

    def __call__(self, call: Call, numbers: Iterator[int], samples: Samples, noted: Disturbance) -> None:
        best, least = 0.0, float("inf")
        for attempt in range(self.tries):
            if attempt:
                noted.retried += 1
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            turn = list(itertools.islice(numbers, self.calls))
            recall_memory(self.recall)
            waited = _waited()
            start, busy = time.perf_counter(), time.process_time()
            for i in turn:
                result = call(i)
            elapsed, busy = time.perf_counter() - start, time.process_time() - busy
            wait = (_waited() - waited - _FREE_WAIT) / elapsed
            del result  # freeing the result is not part of any call
            samples.busy.append(busy / self.calls)
            noted.samples += 1
            if wait < MAX_WAIT:
                samples.quiet.append(elapsed / self.calls)
                return
            if wait < least:
                best, least = (busy if torch.get_num_threads() == 1 else elapsed) / self.calls, wait
        samples.disturbed.append(best)


def interleave(
    functions: Mapping[str, Call], reps: int, clock: Clock, max_seconds: float = 10.0, warm: int = 1
) -> tuple[dict[str, Samples], Disturbance]:
    """Time all functions in rounds, in a new random order in each round, so that drift and other work hit all alike.

    Args:
        functions: Functions by name. Their argument is a number that grows with every call of any of them, by which a
            function picks its input buffer, so that the buffer touched longest ago comes next.
        reps: Rounds.
        clock: Function that takes a sample.
        max_seconds: A function that has used as much is left out of later rounds, but not of the first three.
        warm: Calls of each function before the first round, which warm up code, allocator and thread pool.
    """
    order, generator = list(functions), random.Random(0)
    samples = {name: Samples() for name in functions}
    noted = Disturbance()
    used = dict.fromkeys(functions, 0.0)
    numbers = itertools.count()
    for function in functions.values():
        for _ in range(warm):
            function(next(numbers))
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    begin, foreign = time.perf_counter(), _foreign()
    try:
        for rep in range(reps):
            generator.shuffle(order)
            for name in order:
                if rep >= 3 and used[name] > max_seconds:
                    continue
                start = time.perf_counter()
                clock(functions[name], numbers, samples[name], noted)
                used[name] += time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()
    noted.foreign = max(0.0, _foreign() - foreign) / (time.perf_counter() - begin)
    noted.kept = sum(len(sample.seconds) - len(sample.quiet) for sample in samples.values())
    return samples, noted
