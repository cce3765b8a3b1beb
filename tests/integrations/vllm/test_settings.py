"""What the plug-in reads from a configuration, and how it counts and pools. None of this needs vLLM."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastcompress as fc
from fastcompress.integrations.vllm.families import FAMILIES, REFUSED
from fastcompress.integrations.vllm.settings import Compression, read
from tests.support import ROOT, processes

QWEN, GLM, GRANITE = FAMILIES[0], FAMILIES[1], FAMILIES[3]
SAVED = {"version": 1, "mode": "budget", "before_projector": False, "rule": "uniform:3", "reduce": "mean"}
RULES = ("uniform:3", "uniform:size=4,tail=drop", "top-k:rate=3", "top-k:count=5", "min-variance:rate=3.5")


def config(key: Any = None, **others: Any) -> Any:
    audio = SimpleNamespace(max_position_embeddings=1500, max_source_positions=1500)
    return SimpleNamespace(
        audio_config=audio, stack_factor=8, **others, **({} if key is None else {"fastcompress": key})
    )


def refusal(key: Any, family: Any = QWEN) -> str:
    with pytest.raises(NotImplementedError) as found:
        read(config(key), family)
    return str(found.value)


def test_importing_the_plugin_imports_neither_vllm_nor_transformers():
    code = "import fastcompress.integrations.vllm, sys; print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = processes.run(["-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "'torch'" in done.stdout
    assert "'vllm'" not in done.stdout and "'transformers'" not in done.stdout


def test_the_key():
    assert read(config(), QWEN) is None
    assert read(config({"rule": "uniform:3"}), QWEN) == Compression(fc.Uniform(3))
    assert read(config(SAVED), QWEN) == Compression(fc.Uniform(3))
    assert read(config(SAVED | {"mode": "dynamic", "reduce": "max"}), QWEN) == Compression(fc.Uniform(3), "max")
    assert read(config({"rule": "top-k:rate=3"}), GLM) == Compression(fc.TopK(rate=3), window=375)
    inner = config(thinker_config=SimpleNamespace(fastcompress={"rule": "uniform:2"}))
    assert read(inner, QWEN) == Compression(fc.Uniform(2))
    windows = {family.title: family.window(config()) for family in FAMILIES if family.window and not family.expanded}
    assert windows == {"GLM-ASR": 375, "Audio Flamingo 3": 750, "Ultravox": 188}
    for key, problem in (
        ("uniform:3", "fastcompress must be an object"),
        ({"rule": "uniform:3", "speed": 2}, "unknown field 'speed'"),
        ({"rule": "uniform:0"}, "size must be"),
        (SAVED | {"version": 2}, "must have version 1, got 2"),
        ({"rule": "uniform:3", "reduce": "median"}, "reduce of fastcompress must be one of mean, .*, got 'median'"),
        ({}, "must have a rule or a compressor"),
    ):
        with pytest.raises(ValueError, match=problem):
            read(config(key), QWEN)


def test_the_saved_key_is_read():
    """``apply_to`` saves what the plug-in reads."""
    transformers = pytest.importorskip("transformers")
    from fastcompress.decoder.saved_rule import KEY, SavedRule

    saved = SavedRule("budget", False, rule="min-variance:rate=3", reduce="max")
    kept = transformers.PretrainedConfig(**{KEY: saved.to_dict()})
    assert read(kept, QWEN) == Compression(fc.MinVariance(3.0), "max")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"proportional_attention": True}, "proportional attention"),
        ({"positions": "time"}, "positions in time"),
        ({"before_projector": True}, "pooling before the projector"),
        ({"silence": "pool"}, "a setting of silence"),
        ({"proportional_attention": True, "positions": "time"}, "proportional attention and positions in time"),
    ],
)
def test_parts_that_vllm_lacks(changes: dict[str, Any], part: str):
    """The error names the part and an override that serves the model without it."""
    message = refusal(SAVED | changes | {"reduce": "max"})
    assert f"saved with {part}, which vLLM does not have" in message
    override = json.loads(message.partition("--hf-overrides '")[2].removesuffix("'"))
    assert read(config(override["fastcompress"]), QWEN) == Compression(fc.Uniform(3), "max")


def test_refused_rules_and_families():
    for rule in ("local-max", "threshold:0.15", "lookback:window=4,threshold=0.2"):
        message = refusal({"rule": rule})
        assert "depends on the audio" in message and "audio_embeds" in message
        assert "audio_embeds" not in refusal({"rule": rule}, GRANITE)  # vLLM does not take them for this family
    assert "Gate" in refusal({"compressor": "Gate"}) and "audio_embeds" in refusal({"compressor": "Gate"})
    for family in REFUSED:
        assert read(config(), family) is None
        assert f"{family.title} cannot be compressed in vLLM: {family.refused}" in refusal(SAVED, family)
    assert "audio_embeds" in refusal(SAVED, REFUSED[0]) and "time markers" in refusal(SAVED, REFUSED[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [None, 10])
def test_windows_are_pooled_by_themselves(rule: str, window: int | None):
    compression = Compression(fc.Rule.from_string(rule), window=window)  # type: ignore[arg-type]
    audios = [torch.randn(rows, 6) for rows in (4, 9, 10, 11, 20, 37)]
    found = compression.pool(audios)
    for rows, tokens in zip(audios, found, strict=True):
        parts = [fc.segment_pool(part, rule).values for part in rows.split(window or len(rows))]
        assert torch.equal(tokens, torch.cat(parts))
        assert len(tokens) == compression.count(len(rows))
    (single,) = compression.pool(audios[-1:])
    assert torch.equal(single, found[-1])
    assert compression.pool([]) == ()


def test_counts_equal_those_of_the_processor_of_transformers():
    integration = pytest.importorskip("fastcompress.integrations.transformers")
    for family, kind in ((QWEN, "qwen2_audio"), (GLM, "glmasr"), (FAMILIES[2], "audioflamingo3")):
        for rule in RULES:
            kept = config(SAVED | {"rule": rule}, model_type=kind, audio_token_id=5)
            compression, processor = read(kept, family), integration.BudgetProcessor.from_config(None, kept)
            assert compression is not None
            around = [border + step for border in (0, 375, 750, 1500) for step in range(-7, 8)]
            for rows in [rows for rows in around if rows > 0]:
                assert compression.count(rows) == processor.count(rows), (kind, rule, rows)


def test_a_wrong_count_raises():
    class Wrong(fc.Uniform):
        def num_segments(self, length: Any) -> Any:
            return super().num_segments(length) - (length == 9)

    compression = Compression(Wrong(3))
    assert len(compression.pool([torch.randn(8, 4)])[0]) == 3
    with pytest.raises(RuntimeError, match="uniform:3 made numbers of tokens that differ"):
        compression.pool([torch.randn(9, 4), torch.randn(8, 4)])


def test_identities_differ():
    one = Compression(fc.Uniform(3))
    others = [replace(one, rule=fc.Uniform(4)), replace(one, reduce="max"), replace(one, window=10)]
    assert len({other.identity for other in [one, *others]}) == 4
    assert Compression(fc.Uniform(3)).identity == one.identity
    assert str(one) == "uniform:3" and str(others[1]) == "uniform:3, reduce=max"
