"""Types of the installed package; `make lint` and pre-commit run the same tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# mypy reports each `type: ignore` that is not needed, so the lines with one must have type errors.
USER = """
from typing import Any
import torch
from torch import Tensor
from typing_extensions import assert_type
import fastcompress as fc

x, cu = torch.randn(9, 4), torch.tensor([0, 4, 9])
pooled = fc.segment_pool(x, cu_seqlens=cu, rule=fc.LocalMax(order=2, min_len=2))
assert_type(pooled, fc.Pooled)
assert_type(pooled.values, Tensor)
assert_type(pooled.cu_seqlens, Tensor)
assert_type(pooled.segments, fc.Segments)
assert_type(pooled.segments.padded_length, int | None)
assert_type(pooled.to_padded(), tuple[Tensor, Tensor])
fc.segment_pool(x, cu)  # type: ignore[call-arg]
fc.segment_pool(x, rule=3)  # type: ignore[arg-type]

d = fc.adjacent_distance(x, cu_seqlens=cu)
assert_type(d, Tensor)
segments = fc.select_boundaries(d, fc.Threshold(0.1), cu_seqlens=cu)
assert_type(segments, fc.Segments)
assert_type(segments.ids(), Tensor)
assert_type(fc.segment_reduce(x, segments, "sum"), Tensor)
assert_type(fc.segment_expand(pooled.values, pooled.segments), Tensor)

packed = fc.pack(inputs_embeds=x[None], row_group=torch.ones(1, 9).int(), rule="uniform:3")
assert_type(packed, fc.PackedInputs)
assert_type(packed.inputs_embeds, Tensor)
assert_type(packed.labels, Tensor | None)
assert_type(packed.max_seqlen, int)
assert_type(packed.unpack(), tuple[Tensor, Tensor])
assert_type(packed.model_inputs(), dict[str, Any])

assert_type(fc.integrate_and_fire(x, torch.rand(9)), fc.Fired)
assert_type(fc.Rule.from_string("uniform:3"), fc.Rule)
assert_type(fc.Uniform(3).size, int)
fc.Uniform("3")  # type: ignore[arg-type]
fc.Uniform(3).size = 4  # type: ignore[misc]

stream = fc.StreamingSegmentPool(fc.Uniform(3))
assert_type(stream(x), fc.Streamed)
assert_type(fc.nn.SegmentPool("uniform:3").rule, fc.Rule)
with fc.backend("reference"):
    pass
"""


@pytest.mark.slow
def test_code_that_uses_the_package_is_checked_strictly(tmp_path: Path):
    pytest.importorskip("mypy")
    site = tmp_path / "site"
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", site]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "Success: no issues found in 1 source file\n"


def test_pre_commit_and_make_lint_run_the_same_tools():
    yaml = pytest.importorskip("yaml")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    made = [re.sub(r"\$\(\w+\)", "", line).strip() for line in recipe[1].replace("$(BIN)/", "").splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].replace(".venv/bin/", "") for repo in config["repos"] for hook in repo["hooks"]]
    assert [command.removesuffix(" .") for command in made] == hooks
