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


def test_every_method_runs():
    """Each line of the table of methods, and nothing there that is not exported."""
    import fastcompress as fc

    text = (ROOT / "docs" / "methods.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "`fc." in line]
    assert len(lines) >= 19
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g).cumsum(0)  # frames that are alike
    d = fc.adjacent_distance(x).nan_to_num()
    names = {
        "fc": fc, "torch": torch, "x": x, "keys": torch.randn(60, 4, generator=g),
        "labels": torch.randint(0, 4, (60,), generator=g), "attention": torch.rand(60, generator=g),
        "blank": torch.rand(60, generator=g), "alpha": torch.rand(60, generator=g),
        "novelty": d.roll(1).clamp_min(0) + 1e-6,
    }  # fmt: skip
    rules = set()
    for _, code, _ in lines:
        for snippet in re.findall(r"`(fc\.[^`]+)`", code):
            found = eval(snippet, dict(names))
            tokens = found if isinstance(found, int | torch.Tensor) else found.values
            assert isinstance(tokens, int) or 1 <= len(tokens) < 60, snippet
            rules |= set(re.findall(r'rule="([a-z-]+)', snippet))
    assert rules == set(fc.rules.RULES)  # none is left out
    exported = {"segment_pool", "greedy_segments", "bipartite_merge", "iterative_fusion", "integrate_and_fire"}
    assert all(f"fc.{name}" in text for name in exported) and "fc.nn.LearnedBoundary" in text
