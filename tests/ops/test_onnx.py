"""What docs/export.md says of ONNX: pooling by ``Uniform`` exports as average pooling, and ops are refused by name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcompress as fc
from tests.support import ROOT

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)
pytestmark = pytest.mark.filterwarnings("ignore")


def documented() -> dict[str, Any]:
    """Return the names that the code of the page defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_uniform_exports_as_average_pooling(tmp_path: Path):
    import onnxruntime

    pool, x = documented()["AveragePool"](3), torch.randn(2, 50, 16)
    dims = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.onnx.export(pool, (x,), dynamo=True, dynamic_shapes=dims, verbose=False)
    program.save(str(tmp_path / "pool.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "pool.onnx"))
    for shape in ((2, 50, 16), (3, 57, 16), (1, 3, 16)):
        x = torch.randn(shape)
        (tokens,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(tokens), fc.segment_pool(x, "uniform:3").to_padded()[0])


def test_ops_are_refused_by_name():
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fc.segment_pool(x, "uniform:3", compact=False).values

    with warnings.catch_warnings(), pytest.raises(Exception) as error:
        warnings.simplefilter("ignore")
        torch.onnx.export(Model(), (torch.randn(40, 16),), dynamo=True, verbose=False)
    assert "fastcompress" in str(error.value) or "fastcompress" in str(error.value.__cause__)
