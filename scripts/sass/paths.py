"""Paths through a control-flow graph: the longest iteration of a loop, the shortest path that does some work."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import cast

from scripts.sass.disassembly import Block, Function, Instruction, Loop


def _longest(function: Function, blocks: frozenset[int], start: int, inner: list[Loop]) -> list[int]:
    """Return the longest path through ``blocks`` from ``start`` back to ``start``, or to the end of the function.

    Inner loops count as one block without instructions. Rare paths are left out: those through a call, where the
    compiler moves the division of subnormal numbers, and those that only diverged warps take.
    """
    outermost = [loop for loop in inner if not any(other.contains(loop) for other in inner)]
    into = {index: loop.header for loop in outermost for index in loop.blocks}
    exits = {
        loop.header: [s for b in sorted(loop.blocks) for s in function.blocks[b].successors if s not in loop.blocks]
        for loop in outermost
    }
    rank = {index: i for i, index in enumerate(function.reachable)}

    def weight(index: int) -> int:
        return 0 if index in into else len(function.blocks[index].instructions)

    best: dict[int, tuple[int, list[int]]] = {start: (weight(start), [start])}
    closed: tuple[int, list[int]] = (-1, [])
    for index in sorted({into.get(index, index) for index in blocks if index in rank}, key=rank.__getitem__):
        block = function.blocks[index]
        if index not in best or (index not in exits and block.calls):
            continue
        length, path = best[index]
        successors = exits[index] if index in exits else [s for s in block.successors if s != block.diverged]
        if not successors:
            closed = max(closed, (length, path))
        for successor in (into.get(s, s) for s in successors if s in blocks):
            if successor == start:
                closed = max(closed, (length, path))
            elif rank[successor] > rank[index]:
                best[successor] = max(best.get(successor, (-1, [])), (length + weight(successor), [*path, successor]))
    return [index for index in closed[1] if index not in into]


def longest_iteration(function: Function, loop: Loop) -> list[Instruction]:
    """Return the instructions on the longest path of one iteration of a loop, without those of the loops in it."""
    chosen = _longest(function, loop.blocks, loop.header, function.inner(loop))
    chosen = chosen or [block.index for block in function.own_blocks(loop)]
    return [i for index in chosen for i in function.blocks[index].instructions]


Work = Callable[[Block], Mapping[str, int]]


def fewest_path(
    function: Function,
    work: Work,
    least: Mapping[str, int],
    most: Mapping[str, int] | None = None,
    loop: Loop | None = None,
    free: frozenset[int] = frozenset(),
) -> list[Instruction] | None:
    """Return the instructions of the shortest path that does some work, or ``None`` if no path does it.

    Args:
        function: The kernel.
        work: Returns the amounts of work that a block does.
        least: Amounts that the path must do at least.
        most: Amounts that it must not exceed.
        loop: The loop whose iteration is meant; ``None`` means a path from the entry to the end of the kernel.
        free: Blocks whose instructions are not counted, and not returned.

    No execution that does this work can be shorter, so their number is a lower bound.
    """
    most = most or {}
    names = list(dict.fromkeys((*least, *most)))
    goal = tuple(least.get(name, 0) for name in names)
    caps = tuple(most.get(name, -1) for name in names)
    amounts = {
        index: tuple(work(function.blocks[index]).get(name, 0) for name in names) for index in function.reachable
    }
    inside = loop.blocks if loop else frozenset(function.reachable)

    def after(done: tuple[int, ...], index: int) -> tuple[int, ...] | None:
        total = [a + b for a, b in zip(done, amounts[index], strict=True)]
        if any(0 <= cap < t for t, cap in zip(total, caps, strict=True)):
            return None
        return tuple(min(t, max(low, cap)) for t, low, cap in zip(total, goal, caps, strict=True))

    def weight(index: int) -> int:
        return 0 if index in free else len(function.blocks[index].instructions)

    start = loop.header if loop else 0
    first = after((0,) * len(names), start)
    if first is None:
        return None
    Node = tuple[int, tuple[int, ...]]
    queue: list[tuple[int, Node, Node | None]] = [(weight(start), (start, first), None)]
    before: dict[Node, Node | None] = {}
    while queue:
        cost, node, previous = heapq.heappop(queue)
        if node in before:
            continue
        before[node] = previous
        index, done = node
        block = function.blocks[index]
        ends = (loop is None and any(i.base == "EXIT" for i in block.instructions)) or (
            loop is not None and loop.header in block.successors
        )
        if ends and all(d >= low for d, low in zip(done, goal, strict=True)):
            path, at = [], cast("Node | None", node)
            while at is not None:
                path.append(at[0])
                at = before[at]
            return [i for index in reversed(path) if index not in free for i in function.blocks[index].instructions]
        for successor in block.successors:
            if successor not in inside or (loop and successor == loop.header) or successor == block.diverged:
                continue
            following = after(done, successor)
            if following is not None:
                heapq.heappush(queue, (cost + weight(successor), (successor, following), node))
    return None
