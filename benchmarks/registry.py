"""The suites: one entry per suite, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.compare import Bench
from benchmarks.suites import decoder, memory, methods, pack, prefill, roofline, scaling, segment_pool, training_step


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        run: Function that measures it.
        text: What it measures, for ``--help``.
        devices: Devices that it runs on.
    """

    run: Callable[[Bench], None]
    text: str
    devices: tuple[str, ...] = ("cpu", "cuda")


#: By name. The limits of the machine come first: the report gives shares of them.
SUITES: dict[str, Suite] = {
    roofline.NAME: Suite(roofline.run, "bandwidth and arithmetic of the machine"),
    segment_pool.NAME: Suite(segment_pool.run, "segment pooling against PyTorch and other libraries"),
    memory.NAME: Suite(memory.run, "memory that segment pooling needs beyond its outputs", ("cpu",)),
    pack.NAME: Suite(pack.run, "packing text and audio against what people write"),
    decoder.NAME: Suite(decoder.run, "a decoder on a packed and on a padded batch"),
    prefill.NAME: Suite(prefill.run, "time to the first token of an audio LLM, with and without compression"),
    methods.NAME: Suite(methods.run, "published methods against their published forms"),
    training_step.NAME: Suite(training_step.run, "share of a training step in compression and packing", ("cpu",)),
    scaling.NAME: Suite(scaling.run, "segment pooling as frames, width, segments, windows and threads grow"),
}
