"""Parse the output of ``nvdisasm -c -gi`` and find the loops of each kernel from its control-flow graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"([.$\w]+):\s*$")
_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{ *)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
# Instructions after which the next one is not executed, unless they have a predicate.
_ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP", "JMX", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    """A machine instruction.

    Attributes:
        address: Offset in the function.
        predicate: The guard, such as ``"!P0"``, or ``""``.
        opcode: Name with modifiers, such as ``"LDG.E.128"``.
        operands: The text after the opcode.
        target: The label to which it branches, or ``""``.
        lines: Source lines as (file, line): that of the instruction, then those of the calls into which it is inlined.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    target: str = ""
    lines: tuple[tuple[str, int], ...] = ()

    @property
    def base(self) -> str:
        """The name without modifiers: ``"LDG"``."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def is_conditional(self) -> bool:
        """Whether the next instruction can follow a branch. ``BRA P1, L`` has its condition among the operands."""
        if self.predicate not in ("", "PT"):
            return True
        return self.base == "BRA" and bool(re.match(r"[!~]?U?[PR]\w*\s*,", self.operands))

    @property
    def width(self) -> int:
        """Bytes per lane that a load, store or copy moves."""
        for modifier in self.modifiers:
            if modifier in ("64", "128"):
                return int(modifier) // 8
            if re.fullmatch(r"[US](8|16)", modifier):
                return int(modifier[1:]) // 8
        return 4


@dataclass
class Block:
    """A basic block: instructions that run one after the other."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    # The successor that is reached only if the lanes of a warp have diverged (BRA.DIV), or -1.
    diverged: int = -1

    @property
    def calls(self) -> bool:
        """Whether it calls a subroutine. The compiler moves the rare cases of divisions and roots there."""
        return any(i.base == "CALL" for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks that reach a back edge to ``header`` without passing ``header``."""

    header: int
    blocks: frozenset[int]

    def contains(self, other: Loop) -> bool:
        return self != other and other.header in self.blocks and other.blocks <= self.blocks


@dataclass
class Function:
    """The code of a kernel, with the subroutines in its section."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # address of each label

    @cached_property
    def blocks(self) -> list[Block]:
        """The basic blocks, in the order of their addresses."""
        starts = {self.instructions[0].address} | {self.labels[i.target] for i in self.instructions if i.target}
        ends = {"CALL", *_ENDS}
        for before, after in zip(self.instructions, self.instructions[1:], strict=False):
            if before.base in ends:
                starts.add(after.address)
        blocks: list[Block] = []
        for instruction in self.instructions:
            if instruction.address in starts:
                blocks.append(Block(len(blocks), []))
            blocks[-1].instructions.append(instruction)
        at = {block.instructions[0].address: block.index for block in blocks}
        for block in blocks:
            last = block.instructions[-1]
            jumps = last.base in ("BRA", "BRX", "JMP", "JMX")
            targets = _TARGET.findall(last.operands) if jumps else []
            if last.base in ("BRX", "JMX") and not targets:
                raise ValueError(f"{self.name}: the targets of {last.opcode} at {last.address:#x} are not known")
            # Lanes that take part in an operation of a diverged warp continue at the label of WARPSYNC.COLLECTIVE.
            targets += [i.target for i in block.instructions if i.base == "WARPSYNC" and i.target]
            block.successors = [at[self.labels[target]] for target in targets]
            if "DIV" in last.modifiers and targets:
                block.diverged = block.successors[0]
            if (last.base not in _ENDS or last.is_conditional) and block.index + 1 < len(blocks):
                block.successors.append(block.index + 1)
            block.successors = list(dict.fromkeys(block.successors))
        for block in blocks:
            for successor in block.successors:
                blocks[successor].predecessors.append(block.index)
        return blocks

    @cached_property
    def reachable(self) -> list[int]:
        """Indices of the blocks that the entry reaches, without the subroutines, in reverse postorder."""
        order: list[int] = []
        seen = {0}
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.blocks[0].successors))]
        while stack:
            index, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(index)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return order[::-1]

    @cached_property
    def dominators(self) -> dict[int, int]:
        """The immediate dominator of each reachable block (Cooper, Harvey and Kennedy 2001)."""
        rank = {index: i for i, index in enumerate(self.reachable)}
        found = {0: 0}
        changed = True
        while changed:
            changed = False
            for index in self.reachable[1:]:
                known = [p for p in self.blocks[index].predecessors if p in found]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        while rank[best] > rank[other]:
                            best = found[best]
                        while rank[other] > rank[best]:
                            other = found[other]
                if found.get(index) != best:
                    found[index] = best
                    changed = True
        return found

    def dominates(self, a: int, b: int) -> bool:
        """Return whether each path from the entry to block ``b`` passes block ``a``."""
        while b != a and b != 0:
            b = self.dominators[b]
        return a == b

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, outer ones before inner ones. Back edges to one header belong to one loop."""
        bodies: dict[int, set[int]] = {}
        for index in self.reachable:
            for header in self.blocks[index].successors:
                if not self.dominates(header, index) or self._is_padding(index):
                    continue
                body = bodies.setdefault(header, {header})
                stack = [index]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack += [p for p in self.blocks[block].predecessors if p in self.dominators]
        return sorted(
            (Loop(h, frozenset(b)) for h, b in bodies.items()), key=lambda loop: (-len(loop.blocks), loop.header)
        )

    def _is_padding(self, index: int) -> bool:
        block = self.blocks[index]
        return block.successors == [index] and len(block.instructions) == 1

    def own_blocks(self, loop: Loop) -> list[Block]:
        """Return the blocks of a loop that are in no inner loop, in the order of their addresses."""
        inner: set[int] = set()
        for other in self.loops:
            if loop.contains(other):
                inner |= other.blocks
        return [self.blocks[index] for index in sorted(loop.blocks - inner)]

    def follows(self, first: Loop, second: Loop) -> bool:
        """Return whether a path leads from one loop to another; if none does either way, they are alternatives."""
        stack, seen = [first.header], {first.header}
        while stack:
            for successor in self.blocks[stack.pop()].successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append(successor)
        return second.header in seen

    def inner(self, loop: Loop) -> list[Loop]:
        """Return the loops inside a loop, at any depth."""
        return [other for other in self.loops if loop.contains(other)]

    @property
    def code_bytes(self) -> int:
        """Size of the code; an instruction has 16 bytes."""
        return 16 * len(self.instructions)


def parse(text: str | Iterable[str]) -> list[Function]:
    """Return the functions in the output of ``nvdisasm -c -gi``."""
    lines = text.splitlines() if isinstance(text, str) else text
    functions: list[Function] = []
    pending: list[str] = []  # labels of the next instruction
    chain: list[tuple[str, int]] = []
    continues = False
    for line in lines:
        if match := _SECTION.match(line):
            functions.append(Function(match[1], [], {}))
            pending, chain, continues = [], [], False
        elif not functions:
            continue
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            opcode, operands = match[3], match[4].strip()
            target = _TARGET.search(operands) if opcode.partition(".")[0] in ("BRA", "CALL", "WARPSYNC") else None
            function = functions[-1]
            for label in pending:
                function.labels[label] = address
            pending = []
            function.instructions.append(
                Instruction(address, match[2] or "", opcode, operands, target[1] if target else "", tuple(chain))
            )
            continues = False
        elif match := _SOURCE.match(line):
            if not continues:
                chain = []
            chain.append((match[1], int(match[2])))
            continues = bool(match[3])  # the next line is that of the call
        elif match := _LABEL.match(line):
            pending.append(match[1])
    return [function for function in functions if function.instructions]
