"""The GPUs for which speed is predicted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Machine:
    """A GPU. Rates are per multiprocessor and cycle.

    Attributes:
        name: Its name.
        processors: Number of multiprocessors.
        clock: Cycles per second at full boost.
        bandwidth: Bytes per second of device memory, from the data sheet.
        level2: Bytes per second between the second-level cache and the multiprocessors: an assumption.
        copy: Bytes per second, read and written, of a device-to-device copy: measured on an H200, assumed elsewhere.
        shared_per_processor: Bytes of shared memory per multiprocessor.
        shared_per_block: Largest shared memory of a block in bytes.
        lanes: Lanes per cycle of each pipe (CUDA C++ programming guide, table of arithmetic throughput). An integer
            multiplication counts as fp32, though it has half of this rate.
        latency: Seconds of a load from device memory under load.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    level2: float
    copy: float
    shared_per_processor: int
    shared_per_block: int
    lanes: dict[str, int] = field(hash=False)
    latency: float = 700e-9

    #: Lane instructions that the four schedulers issue per cycle.
    issue = 128
    #: Threads, registers and blocks of a multiprocessor, and bytes that shared memory moves per cycle.
    max_threads, registers, max_blocks, shared_bytes_per_cycle = 2048, 65536, 32, 128

    @property
    def copy_bytes_per_cycle(self) -> float:
        """Bytes per cycle and multiprocessor at the rate of a copy."""
        return self.copy / self.processors / self.clock

    @property
    def level2_bytes_per_cycle(self) -> float:
        return self.level2 / self.processors / self.clock

    @property
    def bytes_in_flight(self) -> float:
        """Bytes that each multiprocessor must have requested to reach the bandwidth (Little's law)."""
        return self.bandwidth * self.latency / self.processors


_LANES = {"fp32": 128, "fp64": 64, "alu": 64, "lsu": 32, "uniform": 64, "special": 16}
MACHINES = (
    Machine("H200", 132, 1.98e9, 4.8e12, 5.5e12, 4.3e12, 228 << 10, 227 << 10, _LANES),
    Machine("A100", 108, 1.41e9, 2.04e12, 4.0e12, 1.83e12, 164 << 10, 163 << 10, {**_LANES, "fp32": 64, "fp64": 32}),
    Machine("B200", 148, 1.965e9, 8.0e12, 10e12, 7.2e12, 228 << 10, 227 << 10, _LANES),
)
