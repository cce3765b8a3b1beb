"""Measure a kernel from its machine code: resources, memory accesses, and the instructions of its loops by pipe."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scripts.sass.compile import Compiled
from scripts.sass.disassembly import Block, Function, Instruction, Loop
from scripts.sass.paths import longest_iteration
from scripts.sass.sources import function_at, text_at

PIPES = ("fp32", "fp64", "alu", "lsu", "uniform", "special", "control")
#: The pipe that executes an instruction. An integer multiplication runs on the fp32 pipe, and so do the moves that the
#: compiler writes as one. Names that start with U, and those that move data to uniform registers, are ``uniform``.
_PIPE = {
    "fp32": "FADD FMUL FFMA IMAD HFMA2 HADD2 HMUL2 FADD2 FMUL2 FFMA2",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "lsu": "LDG STG LDS STS LDL STL LD ST LDGSTS LDGDEPBAR DEPBAR ATOM ATOMG ATOMS RED REDG SHFL LDC LDSM STSM MEMBAR "
    "CCTL ERRBAR CGAERRBAR SYNCS UBLKCP UBLKPF UTMALDG UTMASTG UTMACMDFLUSH FENCE",
    "special": "MUFU F2F F2I I2F FRND POPC FLO BREV REDUX S2R MATCH",
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV NOP YIELD WARPSYNC ENDCOLLECTIVE BAR NANOSLEEP "
    "KILL BPT ACQBULK PREEXIT USETMAXREG ELECT",
    "uniform": "S2UR R2UR UBLKCP",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPE.items() for name in names.split()}
_PRODUCTS = {"FMUL": 1, "FFMA": 1, "DMUL": 1, "DFMA": 1, "FMUL2": 2, "FFMA2": 2}
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LD"), ("STG", "ST")
#: Instructions that do not belong into a loop over rows: they wait for other units or empty a cache.
COSTLY = ("S2UR", "MEMBAR", "CCTL")
#: C++ functions that load or store rows, those that other functions call for it, and bitmasks of 16 bytes.
_MOVES_ROWS = r"(load|store)_(?!acquire|release|relaxed)\w+|narrow"
_BITMASK = {"first", "last", "count", "masked", "vote", "at"}
_HELPER = r"(load|store)_|for_each_|widen|narrow|multiply_add|operator|.*\.(h|hpp|cuh)$"
#: Bytes of an element, by the name of its C++ type.
ELEMENT_BYTES = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8}


def pipe_of(instruction: Instruction) -> str:
    """Return the pipe that executes an instruction."""
    base = instruction.base
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return "uniform" if base.startswith("U") else "alu"


def pipes(instructions: list[Instruction]) -> dict[str, int]:
    """Return the number of instructions on each pipe."""
    found = Counter(pipe_of(i) for i in instructions)
    return {pipe: found[pipe] for pipe in PIPES if found[pipe]}


def element_bytes(name: str) -> int:
    """Return the size of an element of a kernel from its template arguments, or 0 if it has no element type."""
    arguments = name.partition("<")[2].rstrip(">").split(", ")
    return ELEMENT_BYTES.get(arguments[0], 16 if arguments[0] == "uint4" else 0)


def is_aligned(name: str) -> bool:
    """Return whether a kernel moves rows 16 bytes at a time, by its template arguments."""
    return bool(re.search(r"<\w+, true\b|<uint4>", name))


def functions_of(instruction: Instruction) -> tuple[str, ...]:
    """Return the C++ functions that contain an instruction, innermost first."""
    names = [function_at(path, line) for path, line in instruction.lines]
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Access:
    """A group of accesses to global memory: width in bytes, C++ function and line, whether it moves rows, how many."""

    width: int
    function: str
    text: str
    is_row: bool
    count: int


def accesses(function: Function, bases: tuple[str, ...]) -> list[Access]:
    """Return the accesses to global memory with the given opcodes, by width and source line.

    The source line is the outermost one inside the functions of ``csrc``: a helper that loads or stores a vector is
    named by its caller.
    """
    found: Counter[tuple[int, str, str, bool]] = Counter()
    for instruction in function.instructions:
        if instruction.base in bases:
            is_row = any(re.match(_MOVES_ROWS, name) for name in functions_of(instruction))
            where = [(path, line) for path, line in instruction.lines if "csrc" in Path(path).parts]
            path, line = next(((p, n) for p, n in where if not re.match(_HELPER, function_at(p, n))), ("", 0))
            found[instruction.width, function_at(path, line), text_at(path, line), is_row] += 1
    return [Access(*key, count) for key, count in sorted(found.items())]


@dataclass(frozen=True)
class LoopMeasure:
    """A loop, without the loops in it.

    Attributes:
        kind: ``"copy"`` (global to shared memory), ``"score"`` (products of rows), ``"add"`` (sums of rows),
            ``"store"`` (writes of rows), ``"clear"`` (writes of zeros) or ``""`` if it does not move rows.
        space: The memory that it loads rows from: ``"shared"``, ``"global"`` or ``""``.
        source: C++ functions of its first instruction, innermost first.
        depth: Number of loops around it.
        instructions: Instructions of the longest path of one iteration, without rare paths.
        pipes: The same by pipe.
        elements: Elements of rows that a lane loads per iteration; stores, if the loop loads no rows.
        products: Products per lane and iteration.
        costly: Instructions of ``COSTLY`` in the whole loop.
        local: Accesses to local memory in the whole loop.
    """

    kind: str
    space: str
    source: tuple[str, ...]
    depth: int
    instructions: int
    pipes: dict[str, int]
    elements: int
    products: int
    costly: dict[str, int]
    local: int

    @property
    def function(self) -> str:
        """The innermost C++ function of the loop that is not a helper."""
        return next((name for name in self.source if not re.match(_HELPER, name)), self.source[0])

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements if self.elements else 0.0

    @property
    def per_product(self) -> float:
        return self.instructions / self.products if self.products else 0.0


def row_bytes(instructions: list[Instruction], bases: tuple[str, ...], aligned: bool, size: int) -> int:
    """Return the bytes of rows that loads or stores move.

    Accesses in C++ functions such as ``load_vector`` are to rows. Other accesses of 16 bytes of an aligned kernel are,
    too, but for the bitmasks of tile.cuh.
    """
    total = 0
    for i in instructions:
        if i.base not in bases:
            continue
        names = functions_of(i)
        named = any(re.match(_MOVES_ROWS, name) for name in names[:-1])
        if named and (aligned or i.width == min(size, 8) or i.base in _GLOBAL_STORES):
            total += i.width
        elif aligned and i.width == 16 and not _BITMASK & set(names):
            total += i.width
    return total


def measure_loop(kernel: Compiled, loop: Loop) -> LoopMeasure:
    """Measure a loop; ``LoopMeasure`` documents the results."""
    function, size, aligned = kernel.function, element_bytes(kernel.name), is_aligned(kernel.name)
    path = longest_iteration(function, loop)
    blocks: list[Block] = function.own_blocks(loop)
    everything = [i for block in blocks for i in block.instructions]
    copied = sum(i.width for i in path if i.base == "LDGSTS")
    shared = row_bytes(path, ("LDS",), aligned, size)
    loaded = row_bytes(path, _GLOBAL_LOADS, aligned, size)
    stored = row_bytes(path, _GLOBAL_STORES, aligned, size)
    products = sum(_PRODUCTS.get(i.base, 0) for i in path)
    clears = all(i.operands.endswith("RZ") for i in path if i.base in _GLOBAL_STORES)
    kind, moved = "", 0
    if size:
        divides = any(i.base == "MUFU" for i in path)
        if copied:
            kind, moved = "copy", copied
        elif shared + loaded:
            kind, moved = ("score" if products and not divides else "add"), shared + loaded
        elif stored:
            kind, moved = ("clear" if clears else "store"), stored
    return LoopMeasure(
        kind=kind,
        space="" if not shared + loaded + copied else "shared" if shared else "global",
        source=functions_of(function.blocks[loop.header].instructions[0]),
        depth=sum(other.contains(loop) for other in function.loops),
        instructions=len(path),
        pipes=pipes(path),
        elements=moved // size if size else 0,
        products=products,
        costly={name: n for name in COSTLY if (n := sum(i.base == name for i in everything))},
        local=sum(i.base in ("LDL", "STL") for i in everything),
    )


@dataclass(frozen=True)
class KernelMeasure:
    """A kernel: what it uses, what it reads and writes, and its loops."""

    kernel: Compiled
    loads: list[Access]
    stores: list[Access]
    local: int
    fences: int
    loops: list[LoopMeasure]

    @property
    def name(self) -> str:
        return self.kernel.name

    @cached_property
    def hot(self) -> dict[str, LoopMeasure]:
        """The loops that move rows: of each kind, space and C++ function, that with the most elements per iteration.

        The compiler emits loops for the rest of an unrolled loop; these have fewer elements per iteration.
        """
        found: dict[str, LoopMeasure] = {}
        for loop in self.loops:
            key = f"{loop.kind} {loop.space} {loop.function}".replace("  ", " ")
            if loop.kind and (key not in found or loop.elements > found[key].elements):
                found[key] = loop
        return found

    def widths(self, kind: str) -> dict[int, int]:
        """Return how many global loads (``"loads"``) or stores (``"stores"``) have each width in bytes."""
        found: Counter[int] = Counter()
        for access in self.loads if kind == "loads" else self.stores:
            found[access.width] += access.count
        return dict(sorted(found.items()))


def measure(kernel: Compiled) -> KernelMeasure:
    """Measure a kernel."""
    instructions = kernel.function.instructions
    return KernelMeasure(
        kernel,
        accesses(kernel.function, _GLOBAL_LOADS),
        accesses(kernel.function, _GLOBAL_STORES),
        sum(i.base in ("LDL", "STL") for i in instructions),
        sum(i.base == "MEMBAR" for i in instructions),
        [measure_loop(kernel, loop) for loop in kernel.function.loops],
    )
