"""Time functions against each other on a machine that may have other work."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Samples:
    """Seconds per call, those taken on a quiet machine and those that were disturbed.

    Disturbed samples of one thread are its CPU time, without the time that it waited for a core; those of more threads
    include the waits, which overlap.
    """

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The samples that count: the quiet ones if there are enough of them, else all."""
        return self.quiet if len(self.quiet) >= _ENOUGH else self.quiet + self.disturbed

    def _quantile(self, share: float) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        return self._quantile(0.9)


@dataclass
class Disturbance:
    """How far other work got into the samples.

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


def _waited() -> float:
    """Seconds that the threads of this process have waited for a core; 0 where the system does not report it."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(path.read_text().split()[1])
    return total / 1e9


def _foreign() -> float:
    """Core-seconds of other processes since some time; 0 where the system does not report it."""
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
    under KVM with free page reporting). Called before each sample, so that no contender pays for the pause that a slow
    one before it made; new pages from the system's own free list still cost what they cost.
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


def _sample(
    call: Callable[[int], Any], numbers: Iterator[int], calls: int, tries: int, recall: int, samples: Samples,
    noted: Disturbance,
) -> None:  # fmt: skip
    """Add the seconds per call of ``call``, from the least disturbed of a few tries."""
    best, least = 0.0, float("inf")
    for attempt in range(tries):
        if attempt:
            noted.retried += 1
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        turn = list(itertools.islice(numbers, calls))
        recall_memory(recall)
        waited = _waited()
        start, busy = time.perf_counter(), time.process_time()
        for i in turn:
            result = call(i)
        elapsed, busy = time.perf_counter() - start, time.process_time() - busy
        wait = (_waited() - waited - _FREE_WAIT) / elapsed
        del result  # freeing the result is not part of any call
        noted.samples += 1
        if wait < MAX_WAIT:
            samples.quiet.append(elapsed / calls)
            return
        if wait < least:
            best, least = (busy if torch.get_num_threads() == 1 else elapsed) / calls, wait
    samples.disturbed.append(best)


def interleave(
    functions: Mapping[str, Callable[[int], Any]], reps: int, calls: int = 1, max_seconds: float = 10.0,
    tries: int = TRIES, recall: int = 0, seed: int = 0,
) -> tuple[dict[str, Samples], Disturbance]:  # fmt: skip
    """Time all functions in rounds, in a new random order in each round, so that drift and other work hit all alike.

    Args:
        functions: Functions by name. Their argument is a number that grows with every call of any of them, by which a
            function picks its input buffer, so that the buffer touched longest ago comes next.
        reps: Rounds.
        calls: Calls per sample.
        max_seconds: A function that has used as much is left out of later rounds, but not of the first three.
        tries: Tries of a sample that other work disturbs.
        recall: Bytes for ``recall_memory``.
        seed: Seed of the order.
    """
    order, generator = list(functions), random.Random(seed)
    samples = {name: Samples() for name in functions}
    disturbance = Disturbance()
    used = dict.fromkeys(functions, 0.0)
    numbers = itertools.count()
    for function in functions.values():  # warm: code, allocator, thread pool
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
                _sample(functions[name], numbers, calls, tries, recall, samples[name], disturbance)
                used[name] += time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()
    disturbance.foreign = max(0.0, _foreign() - foreign) / (time.perf_counter() - begin)
    disturbance.kept = sum(len(sample.seconds) - len(sample.quiet) for sample in samples.values())
    return samples, disturbance
