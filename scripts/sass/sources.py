"""Find the C++ function that contains a line of a source file."""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from pathlib import Path

_SKIPPED = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:\\\n|[^\n])*", re.S | re.M
)
_SCOPE = re.compile(r"\b(?:namespace|struct|class|enum|union|extern)\b")


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def function_spans(text: str) -> list[tuple[int, int, str]]:
    """Return (first line, last line, name) of each function in a C++ source; lambdas are part of their function."""
    code = _SKIPPED.sub(_blank, text)
    spans: list[tuple[int, int, str]] = []
    start = depth = 0  # of the statement; of braces inside the current function
    name, first = "", 0
    for position, letter in enumerate(code):
        if letter not in "{};":
            continue
        if depth:
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                spans.append((first, code.count("\n", 0, position) + 1, name))
                start = position + 1
            continue
        if letter == "{":
            head = re.sub(r"template\s*<[^{};]*?>\s*(?=\w)", "", code[start:position])
            head = re.sub(r"__launch_bounds__\s*\([^)]*\)|alignas\s*\([^)]*\)", "", head)
            called = re.search(r"(~?\w+|operator\s*\S+?)\s*\(", head)
            if called and not _SCOPE.search(head[: called.start()]):
                name, depth = called[1], 1
                first = code.count("\n", 0, start + len(code[start:position]) - len(code[start:position].lstrip())) + 1
            elif not called and re.search(r"=\s*$|\w\s*$", head) and not _SCOPE.search(head):
                name, depth, first = "", 1, code.count("\n", 0, position) + 1  # an initializer
        start = position + 1
    return [span for span in spans if span[2]]


@functools.cache
def _spans(path: str) -> tuple[list[int], list[tuple[int, int, str]]]:
    spans = sorted(function_spans(Path(path).read_text(encoding="utf-8", errors="replace")))
    return [first for first, _, _ in spans], spans


@functools.cache
def function_at(path: str, line: int) -> str:
    """Return the name of the function at a line, or the name of the file if there is none or it is not readable."""
    if not Path(path).is_file():
        return Path(path).name
    firsts, spans = _spans(path)
    index = bisect_right(firsts, line) - 1
    if index >= 0 and spans[index][0] <= line <= spans[index][1]:
        return spans[index][2]
    return Path(path).name


@functools.cache
def text_at(path: str, line: int) -> str:
    """Return a line of a source file without indentation."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""
