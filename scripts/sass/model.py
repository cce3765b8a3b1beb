"""Predict the share of copy bandwidth that a kernel reaches. docs/kernels.md explains the model and its assumptions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from scripts.sass.disassembly import Block, Function, Instruction, Loop
from scripts.sass.host_plan import Plan, plan
from scripts.sass.machines import Machine
from scripts.sass.measure import KernelMeasure, LoopMeasure, element_bytes, pipes, row_bytes
from scripts.sass.paths import fewest_path, longest_iteration

#: The batch for which speed is predicted: rows, elements per row, rows per segment.
ROWS, WIDTH, FRAMES = 100_000, 1280, 3
#: Share of the issue slots that a kernel with few warps uses: an assumption, which is not measured.
ISSUE_EFFICIENCY = 0.75


@dataclass(frozen=True)
class Part:
    """A part of the work: instructions per element of x on each pipe."""

    name: str
    pipes: dict[str, float]

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())


@dataclass(frozen=True)
class Cost:
    """What a kernel does per element of x (for the backward of a mean: of the gradient that it writes).

    Attributes:
        parts: Its parts.
        bytes: Bytes of device memory that are read and written.
        level2: Bytes that the second-level cache moves. A store of 4 bytes per lane, 16 bytes apart, costs as much as
            one of 16 bytes.
        shared: Bytes of shared memory that are read and written.
        plan: The plan of the fused kernel, or None.
        in_flight: Bytes that one warp requests before it waits for them.
        rounds: Loads of a warp that wait for each other, such as those of a segment's bounds and of its rows.
        read: Share of the bytes that are read.
    """

    parts: list[Part]
    bytes: float
    level2: float
    shared: float = 0
    plan: Plan | None = None
    in_flight: float = 0
    rounds: int = 1
    read: float = 1

    @property
    def instructions(self) -> float:
        return sum(part.instructions for part in self.parts)

    def on(self, pipe: str) -> float:
        return sum(part.pipes.get(pipe, 0) for part in self.parts)


@dataclass(frozen=True)
class Prediction:
    """The predicted share of copy bandwidth, what limits it, and the bytes in flight per multiprocessor."""

    share: float
    limiter: str
    in_flight: float


def _scaled(found: Mapping[str, int], factor: float) -> dict[str, float]:
    return {pipe: count * factor for pipe, count in found.items()}


def _amounts(kernel: KernelMeasure) -> dict[int, dict[str, int]]:
    """Return the work of each block: bytes of rows loaded, stored and copied, sums and products."""
    size, found = element_bytes(kernel.name), {}
    for block in kernel.kernel.function.blocks:
        instructions: list[Instruction] = block.instructions
        stored = [i for i in instructions if not i.operands.endswith("RZ")]
        certain = [i for i in instructions if not i.predicate]
        count = Counter(i.base for i in instructions)
        found[block.index] = {
            "loads": row_bytes(instructions, ("LDS", "LDG"), True, size),
            "stores": row_bytes(stored, ("STG",), True, size),
            "certain loads": row_bytes(certain, ("LDS", "LDG"), True, size),
            "certain stores": row_bytes([i for i in stored if not i.predicate], ("STG",), True, size),
            "copies": sum(i.width for i in instructions if i.base == "LDGSTS"),
            "sums": count["FADD"] + count["DADD"],
            "products": count["FMUL"] + count["DMUL"] + count["FFMA"] + count["DFMA"],
            "divisions": count["MUFU"],
        }
    return found


def _path(
    kernel: KernelMeasure, loads: int, stores: int, least: dict[str, int], loop: Loop | None = None
) -> list[Instruction] | None:
    """Return the shortest path that loads and stores these bytes of rows and does at least some other work.

    An instruction with a predicate may move its bytes or not; the others must not move more.
    """
    amounts = _amounts(kernel)
    wanted = {"loads": loads, "stores": stores, **least}
    if loop is not None:  # skip the search in loops that cannot do the work
        total = Counter[str]()
        for index in loop.blocks:
            total.update(amounts[index])
        if any(total[name] == 0 for name in wanted):
            return None
    most = {"certain loads": loads, "certain stores": stores}
    return fewest_path(kernel.kernel.function, lambda block: amounts[block.index], wanted, most, loop)


def _outside(kernel: KernelMeasure) -> list[Instruction]:
    """Return the shortest path through a kernel that copies, scores, adds and stores rows, without these loops."""
    amounts, function = _amounts(kernel), kernel.kernel.function
    kinds = ("copies", "products", "sums", "stores")
    busy = {index for index, found in amounts.items() if any(found[kind] for kind in kinds)}
    free = frozenset(index for loop in function.loops if loop.blocks & busy for index in loop.blocks)

    def work(block: Block) -> Mapping[str, int]:
        return {kind: int(amounts[block.index][kind] > 0) for kind in kinds}

    return fewest_path(function, work, dict.fromkeys(kinds, 1), free=free) or []


def store_factor(instructions: list[Instruction]) -> float:
    """Return how many times more sectors the stores of rows touch than stores of 16 bytes would."""
    stores = [i for i in instructions if i.base == "STG" and row_bytes([i], ("STG",), True, 16)]
    return 16 * len(stores) / max(1, sum(i.width for i in stores))


def average_item(kernel: KernelMeasure, frames: int = FRAMES) -> list[Instruction] | None:
    """Return the instructions that average ``frames`` rows at 16 bytes of columns, or None if no path does that.

    It is the shortest path that loads 16 bytes of each row, adds and divides them, and stores 16 bytes of one row: an
    iteration of the innermost loop that can do this, or else a path through the whole kernel.
    """
    columns = 16 // element_bytes(kernel.name)
    least = {"sums": (frames - 1) * columns}
    # A division multiplies each element at least once. Without this, the path of a sum would be the shortest.
    function, amounts = kernel.kernel.function, _amounts(kernel)
    if any(amounts[index]["products"] for index in function.reachable):
        least["products"] = columns
    for loop in reversed(function.loops):
        if (found := _path(kernel, 16 * frames, 16, least, loop)) is not None:
            return found
    return _path(kernel, 16 * frames, 16, least)


def score_loops(kernel: KernelMeasure, width: int = 0) -> list[LoopMeasure]:
    """Return the loops that multiply rows, tightest first: innermost ones, and one for each ratio of products to loads.

    Rows come from shared memory if the kernel copies them there; its loops over global memory are for long segments.
    The compiler emits loops for the rest of an unrolled loop, which have more instructions per product; passes that
    load the same rows for different products have different ratios. With a ``width``, only loops whose loads have this
    width in bytes count: a kernel may have loops for other groups of lanes.
    """
    function = kernel.kernel.function
    measured = list(zip(function.loops, kernel.loops, strict=True))
    scores = [loop for loop, found in measured if found.kind == "score"]
    space = "shared" if any(key.startswith("copy") for key in kernel.hot) else "global"
    best: dict[float, LoopMeasure] = {}
    for loop, found in measured:
        if found.kind != "score" or found.space != space or any(loop.contains(other) for other in scores):
            continue
        loads = {i.width for block in function.own_blocks(loop) for i in block.instructions if i.base in ("LDS", "LDG")}
        if width and loads != {width}:
            continue
        ratio = found.products / found.elements
        if ratio not in best or found.per_product < best[ratio].per_product:
            best[ratio] = found
    return sorted(best.values(), key=lambda found: found.per_product)


def instructions_per_pair(loop: LoopMeasure, size: int) -> float:
    """Return the instructions with which a lane scores 16 bytes of a pair of rows.

    An element of a pair has two products, that of the rows and the square of one row, however many rows a loop loads.
    """
    return loop.instructions / (loop.products / 2) * (16 / size)


def _around(function: Function, measure: LoopMeasure, kernel: KernelMeasure) -> list[Instruction]:
    """Return one iteration of the loop around a loop, without the loops in it; empty if no loop is around it."""
    inner = function.loops[kernel.loops.index(measure)]
    outer = [loop for loop in function.loops if loop.contains(inner)]
    return longest_iteration(function, outer[-1]) if outer else []


def pool_cost(kernel: KernelMeasure, machine: Machine) -> Cost | None:
    """Return the cost of the fused kernel with staged rows, or None if a part is not found or rows are not staged."""
    dtype = re.search(r"<(\w+)", kernel.name)
    size, function = element_bytes(kernel.name), kernel.kernel.function
    copy = next((loop for key, loop in kernel.hot.items() if key.startswith("copy")), None)
    item = average_item(kernel)
    if dtype is None or copy is None or item is None:
        return None
    found = plan(machine, dtype[1], ROWS, WIDTH)
    scores = score_loops(kernel, found.elements_per_lane * size)
    if not found.staged or not scores:
        return None
    score, columns = scores[0], 16 // size
    parts = [
        Part("copy", _scaled(copy.pipes, found.reads / copy.elements)),
        Part("score", _scaled(score.pipes, found.reads / (score.products / 2))),
        Part(
            "reduce scores",
            _scaled(pipes(_around(function, score, kernel)), found.reads * found.lanes_per_pair / WIDTH),
        ),
        Part("average", _scaled(pipes(item), 1 / (FRAMES * columns))),
        Part("rest", _scaled(pipes(_outside(kernel)), found.threads / (found.tile_rows * WIDTH))),
    ]
    loaded = score.elements / (score.products / 2)  # row elements that a pair loads: 2, or fewer if rows are shared
    shared = size * (found.reads * (1 + loaded) + 1)
    return Cost(parts, size * (1 + 1 / FRAMES), size * (found.reads + store_factor(item) / FRAMES), shared, found)


def given_cost(kernel: KernelMeasure) -> Cost | None:
    """Return the cost of a mean over given segments, or of its backward, the expansion; None if no path is found."""
    size = element_bytes(kernel.name)
    columns = 16 // size
    if kernel.name.startswith("segment_reduce"):
        item = average_item(kernel)
        loads: float = 16 * FRAMES
    else:
        item = _path(kernel, 16, 16 * FRAMES, {"divisions": 1, "products": columns})
        loads = 16
    if item is None:
        return None
    part = Part("segment", _scaled(pipes(item), 1 / (FRAMES * columns)))
    # A thread requests its rows one by one or in groups: those of the widest loop are in flight at once.
    group = max((loop.elements for loop in kernel.loops if loop.kind == "add"), default=0) * size
    reads, writes = (1, 1 / FRAMES) if loads > 16 else (1 / FRAMES, 1)
    moved, level2 = size * (reads + writes), size * (reads + store_factor(item) * writes)
    read = reads / (reads + writes)
    return Cost([part], moved, level2, in_flight=32 * min(loads, group or loads), rounds=2, read=read)


def distance_cost(kernel: KernelMeasure) -> Cost | None:
    """Return the cost of the distances of neighbouring rows, or None if no loop multiplies rows."""
    size = element_bytes(kernel.name)
    # A group multiplies every row that it loads with itself, and each but the last with the next one.
    loops = [loop for loop in score_loops(kernel) if loop.products > loop.elements]
    if not loops:
        return None
    loop = min(loops, key=lambda loop: loop.instructions / (loop.products - loop.elements))
    part = Part("score", _scaled(loop.pipes, 1 / (loop.products - loop.elements)))
    return Cost([part], size, size, in_flight=32 * loop.elements * size)


def cost_of(kernel: KernelMeasure, machine: Machine) -> Cost | None:
    """Return the cost of a kernel, or None if there is no model of it or its machine code does not fit the model."""
    if kernel.name.startswith("segment_pool_fwd") and kernel.name.endswith("true, true>"):
        return pool_cost(kernel, machine)
    if re.match(r"segment_(reduce|expand)_fwd_kernel<\w+, true>", kernel.name):
        return given_cost(kernel)
    if re.match(r"adjacent_distance_fwd_kernel<\w+, true>", kernel.name):
        return distance_cost(kernel)
    return None


def resident_blocks(kernel: KernelMeasure, machine: Machine, threads: int, dynamic_shared: int) -> int:
    """Return how many blocks a multiprocessor holds at once."""
    resources = kernel.kernel.resources
    registers = -(-resources.registers // 8) * 8 * threads
    shared = resources.shared + dynamic_shared + 1024  # CUDA reserves 1 KiB per block
    return max(
        0,
        min(
            machine.max_threads // threads,
            machine.registers // registers,
            machine.max_blocks,
            machine.shared_per_processor // shared,
        ),
    )


def _throughput(stations: list[float], delay: float, customers: int) -> float:
    """Return the throughput of a closed queueing network by mean value analysis (Reiser and Lavenberg 1980)."""
    queues, rate = [0.0] * len(stations), 0.0
    for n in range(1, customers + 1):
        times = [service * (1 + queue) for service, queue in zip(stations, queues, strict=True)]
        rate = n / (delay + sum(times))
        queues = [rate * time for time in times]
    return rate


def predict(kernel: KernelMeasure, cost: Cost, machine: Machine) -> Prediction:
    """Predict the speed of a kernel on a machine.

    In the fused kernel, blocks copy rows and then compute. A multiprocessor is a closed network of two queues, the unit
    that is busiest and device memory, with the latency of a load as delay, through which its resident blocks circulate.
    """
    threads = cost.plan.threads if cost.plan else 128
    shared = cost.plan.shared_bytes if cost.plan else 0
    blocks = resident_blocks(kernel, machine, threads, shared)
    memory = cost.bytes / machine.copy_bytes_per_cycle
    limits = {f"pipe {pipe}": cost.on(pipe) / lanes for pipe, lanes in machine.lanes.items()}
    limits["shared memory"] = cost.shared / machine.shared_bytes_per_cycle
    limits["second-level cache"] = cost.level2 / machine.level2_bytes_per_cycle
    limits["issue"] = cost.instructions / machine.issue / ISSUE_EFFICIENCY
    limiter = max(limits, key=lambda name: limits[name])
    busy = limits[limiter]
    latency = machine.latency * machine.clock
    if cost.plan:
        elements = cost.plan.tile_rows * WIDTH
        rate = _throughput([busy * elements, memory * elements], latency, blocks) * elements
        in_flight = float(blocks * cost.plan.shared_bytes)
        if busy < memory:
            limiter = "memory"
        if rate < 0.8 / max(busy, memory):
            limiter += f", {blocks} blocks overlap"
    else:
        in_flight = cost.in_flight * blocks * threads / 32
        rate = 1 / max(busy, memory)
        if busy < memory:
            limiter = "memory"
        waiting = in_flight / cost.rounds / (machine.bytes_in_flight * cost.read) / memory
        if waiting < rate:
            rate, limiter = waiting, "bytes in flight"
    return Prediction(rate * memory, limiter, in_flight)
