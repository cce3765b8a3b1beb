"""The Python in the documentation runs, one file after another from its first block to its last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
#: What a block may need and not define.
GIVEN = {"wheels.md": "import fastcompress, torch; x = torch.randn(20, 8)"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_snippets(path: Path):
    if path.name == "wheels.md":
        pytest.importorskip("triton", reason="a snippet chooses the backend triton")
    if path.name in ("packing.md", "speech.md"):
        pytest.importorskip("transformers", reason="a snippet builds a decoder")
    names: dict[str, object] = {}
    exec(GIVEN.get(path.name, ""), names)
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(path), "exec"), names)  # errors name the line of the file
    assert any(isinstance(value, torch.Tensor) or hasattr(value, "values") for value in names.values())
