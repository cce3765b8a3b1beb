"""The package without a compiled library, and the modules that ``import fastcompress`` loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fastcompress
from tests.support import processes

PACKAGE = Path(fastcompress.__file__).parent

USE = """
import io, json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastcompress as fc
from fastcompress.dispatch.library import COMPILED
ours = [(w.category.__name__, str(w.message), w.filename) for w in caught if "fastcompress" in str(w.message)]

torch.manual_seed(0)
def batch(*lengths):
    return torch.randn(sum(lengths), 8), torch.tensor([0, *lengths]).cumsum(0).int()
def pool(x, cu):
    return fc.segment_pool(x, cu_seqlens=cu, rule=fc.LocalMax(order=2), compact=False)
def equal(a, b):
    return torch.equal(a.values, b.values) and torch.equal(a.segments.starts, b.segments.starts)

small, large = batch(5, 0, 9), batch(20, 3, 1, 12)
x = small[0].clone().requires_grad_()
pooled = fc.segment_pool(x, cu_seqlens=small[1])
pooled.values.sum().backward()
# The gradients of the frames of each segment sum to 1.
runs = bool(torch.allclose(x.grad.sum(), torch.tensor(8.0 * len(pooled.values))))
result = dict(file=fc.__file__, library=COMPILED, warnings=ours, runs=runs)
"""

# This part is slow and does not depend on the reason why there is no library, so it runs once.
USE_IN_GRAPHS = """
compiled = {}
for backend in ("eager", "aot_eager"):
    f = torch.compile(pool, fullgraph=True, dynamic=True, backend=backend)
    compiled[backend] = all(equal(f(*b), pool(*b)) for b in (small, large))

class Pool(torch.nn.Module):
    def forward(self, x, cu):
        return pool(x, cu)
shapes = {"x": {0: torch.export.Dim.DYNAMIC}, "cu": {0: torch.export.Dim.DYNAMIC}}
file = io.BytesIO()
torch.export.save(torch.export.export(Pool(), small, dynamic_shapes=shapes), file)
file.seek(0)
exported = equal(torch.export.load(file).module()(*large), pool(*large))
result |= dict(exported=exported, **compiled)
"""

MODULES = """
import json, sys
import torch
before = set(sys.modules)
import fastcompress
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def python(code: str, path: Path) -> subprocess.CompletedProcess:
    return processes.run(["-c", code], env={**os.environ, "PYTHONPATH": str(path)}, cwd=path)


def last_line(code: str, path: Path):
    result = python(code, path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the Python files of the package."""
    shutil.copytree(PACKAGE, tmp_path / "fastcompress", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    "library, reason",
    [
        (None, "is missing"),
        (b"\x7fELF garbage, no library" * 100, "cannot be loaded"),
        (b"", "cannot be loaded"),
    ],
    ids=["missing", "garbage", "empty"],
)
def test_works_on_the_reference_without_a_library(copy: Path, library: bytes | None, reason: str):
    if library is not None:
        (copy / "fastcompress" / "_C.so").write_bytes(library)
    graphs = library is None
    result = last_line(USE + (USE_IN_GRAPHS if graphs else "") + "print(json.dumps(result))", copy)
    assert Path(result.pop("file")).parent == copy / "fastcompress"
    (warning,) = result.pop("warnings")
    category, message, file = warning
    assert category == "RuntimeWarning"
    for words in (str(copy / "fastcompress" / "_C.so"), reason, "correct but slow", "Install a wheel", "make build"):
        assert words in message
    assert "\n" not in message and len(message) < 500 + len(str(copy))
    assert result == dict(library=False, runs=True) | (
        dict(exported=True, eager=True, aot_eager=True) if graphs else {}
    )


def test_import_loads_no_extra():
    modules = last_line(MODULES, PACKAGE.parent)
    assert "fastcompress.reference" in modules
    roots = {name.split(".")[0] for name in modules}
    extras = {"transformers", "triton", "av", "soundfile", "soxr", "matplotlib", "scipy", "tqdm", "pandas", "PIL"}
    assert not roots & extras
    parts = {name.split(".")[1] for name in modules if name.startswith("fastcompress.")}
    assert not parts & {"audio", "cli", "inspection", "integrations", "lalm", "synthesis", "training", "__main__"}


def test_import_prints_nothing_with_a_library():
    if not fastcompress.dispatch.library.COMPILED:
        pytest.skip("no compiled library")
    result = python("import fastcompress", PACKAGE.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
