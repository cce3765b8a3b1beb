"""One engine per family, in a process of its own: it writes the ids that transformers writes in budget mode.

Both run greedily, in fp32, with the parts that vLLM has: no proportional attention, and positions that count tokens.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.served_llms import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
RULES = {
    "qwen2_audio": "uniform:3",
    "glmasr": "uniform:4",
    "audioflamingo3": "min-variance:rate=3",
    "qwen3_asr": "top-k:rate=3",
}


@functools.cache
def run(name: str) -> dict[str, Any]:
    """Run the engine of a family, and return what it and transformers write."""
    command = [sys.executable, "-m", "tests.support.vllm_engine", name, RULES[name]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stdout[-4000:] + done.stderr[-4000:]
    return {"log": done.stdout + done.stderr, **json.loads(lines[0].removeprefix("RESULT "))}


def ids(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["ids"] for output in outputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_those_of_transformers(name: str):
    """A batch of mixed lengths, with two audios or several windows, whose prefill cuts audios."""
    found = run(name)
    assert [output["prompt"] for output in found["vllm"]] == [output["prompt"] for output in found["transformers"]]
    assert ids(found["vllm"]) == ids(found["transformers"])
    with_audio = list(zip(found["stock"], found["vllm"], strict=True))[:-1]  # the last prompt is text
    assert all(output["prompt"] < stock for stock, output in with_audio)
    assert any(output["prompt"] > 2 * 64 for output in found["vllm"])  # more steps than one


@pytest.mark.parametrize("name", FAMILIES)
def test_prefixes_are_cached(name: str):
    """The same prompts again, and the same audio with another ending."""
    found = run(name)
    assert ids(found["again"]) == ids(found["vllm"])
    assert ids(found["vllm_second"]) == ids(found["second"])
    assert max(output["cached"] for output in found["again"]) >= 64
    assert max(output["cached"] for output in found["vllm_second"]) >= 64
    assert ids(found["vllm"]) != ids(found["vllm_second"])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.embeds])
def test_embeddings_of_a_rule_that_looks_at_the_audio(name: str):
    """``embed`` makes the tokens of dynamic mode, and the engine does not pool them again."""
    found = run(name)["embeds"]
    assert found["vllm"] == found["transformers"]
    assert found["tokens"] > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_reports_the_rule_and_checks_counts(name: str):
    found = run(name)
    assert f"runs with {RULES[name]}; 750 rows of audio take" in found["log"]
    assert "tokens, but their prompts have" in found["error"]
