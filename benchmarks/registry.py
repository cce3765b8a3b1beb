"""The suites, in the order in which they run. The first line of a suite's docstring describes its measurements."""

from __future__ import annotations

from types import ModuleType

from benchmarks.suites import decoder, memory, methods, pack, prefill, roofline, scaling, segment_pool, training_step

#: By name. The limits of the machine come first: the report gives shares of them.
SUITES: dict[str, ModuleType] = {
    suite.NAME: suite
    for suite in (roofline, segment_pool, memory, pack, decoder, prefill, methods, training_step, scaling)
}
#: Those that measure nothing on a GPU.
CPU_ONLY = (memory.NAME, training_step.NAME)


def text(suite: ModuleType) -> str:
    """Return what a suite measures, for ``--help``."""
    return str(suite.__doc__).splitlines()[0].partition(": ")[2].replace("``", "").rstrip(".")
