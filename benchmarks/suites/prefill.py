"""What compression saves when an audio LLM reads its prompt: tokens, time to the first word, cache, peak memory.

A Qwen2-Audio whose decoder is as wide as Qwen2-7B's, behind an encoder of next to nothing, is given stock inputs: text
and an audio each. Stock, and through ``apply_to`` with each rule, it generates one token.

Floor, for T rows of prompt, L layers of P weights each: 2 T L P multiplications and additions. Attention adds
2 T^2 L H, 1 % of that at T = 800 and H = 3584. Time should then fall as tokens do, and the cache does exactly.

``python -m benchmarks.suites.prefill FORM THREADS SIZE`` prints the peak of one form as JSON.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.harness.memory import high_water
from benchmarks.suites.checks import WrongResult

STOCK = "stock"
#: Rules, by the name of the form; in bytes and time the last depends on what is heard.
FORMS: dict[str, str | None] = {
    STOCK: None,
    "uniform:2": "uniform:2",
    "uniform:3": "uniform:3",
    "local-max": "local-max",
}
TEXT = 50  # ids before and behind the audio, together


@dataclass(frozen=True)
class Size:
    """Of the decoder, and of the batch.

    Attributes:
        width, layers, heads, key_heads, inner, vocabulary: of the decoder.
        seconds: of each audio, 25 tokens a second.
        count: samples.
    """

    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    seconds: int
    count: int


#: Qwen2-7B, of which a machine without a GPU takes two layers, and no words.
SIZES = {
    "quick": Size(64, 2, 4, 2, 128, 200, 2, 2),
    "cpu": Size(3584, 2, 28, 4, 18944, 1000, 30, 1),
    "gpu": Size(3584, 28, 28, 4, 18944, 152064, 30, 8),
}


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def build(
    size: Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """The stock model, with random weights, and a batch for it."""
    import transformers

    audio_id = size.vocabulary - 1
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64, "max_source_positions": 50 * size.seconds, "num_mel_bins": 80,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": size.vocabulary, "hidden_size": size.width,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.key_heads,
            "intermediate_size": size.inner, "max_position_embeddings": 32768, "tie_word_embeddings": False,
        },
        audio_token_index=audio_id,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    g = torch.Generator().manual_seed(1)
    frames, tokens = 100 * size.seconds, 25 * size.seconds
    text = torch.randint(1, audio_id, (size.count, TEXT), generator=g)
    ids = torch.cat([text[:, :10], torch.full((size.count, tokens), audio_id), text[:, 10:]], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(size.count, 80, frames, generator=g).to(dtype),
        "feature_attention_mask": torch.ones(size.count, frames, dtype=torch.long),
    }
    return model, {name: value.to(device) for name, value in inputs.items()}


def compressed(model: Any, form: str) -> Any:
    """The model of a form, with the same weights, not copied."""
    from fastcompress.integrations.transformers import apply_to

    other = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    rule = FORMS[form]
    return other if rule is None else apply_to(other, rule)


@torch.inference_mode()
def first_word(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Reads the prompt and writes one token."""
    written: Tensor = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return written[:, -1]


@torch.inference_mode()
def check(form: str, model: Any, stock: Any, inputs: dict[str, Tensor], tolerance: float) -> tuple[int, int]:
    """Rows of the prompts and bytes of their cache, after checking what a form gives.

    ``generate`` must write what the logits say; they must be the same packed and with a cache; and, of the stock model,
    those of an identity compressor.

    Raises:
        WrongResult: it is not so.
    """
    from fastcompress.integrations.transformers import apply_to

    out = model(**inputs, use_cache=True)
    cache = getattr(out, "cache", None)
    cache = out.past_key_values if cache is None else cache
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    other = compressed(stock, STOCK)
    if form == STOCK:
        apply_to(other, "uniform:1")
        packed = other(**inputs)
        tokens = inputs["input_ids"].numel()
    else:
        packed = model(**inputs)
        tokens = len(packed.compressed.source)
    found, expected = packed.logits[:, -1].float(), out.logits[:, -1].float()
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= tolerance:
        raise WrongResult(f"{form}: logits are off by {error:.2g} of their norm, of which {tolerance:g} is allowed")
    if not torch.equal(first_word(model, inputs), out.logits[:, -1].argmax(-1)):
        raise WrongResult(f"{form}: generate writes something else than the logits say")
    return tokens, size


@dataclass(frozen=True)
class PrefillTable:
    """Rows of all prompts, bytes of the cache, times in seconds and peaks in bytes, by form."""

    threads: int
    size: Size
    tokens: dict[str, int]
    cache: dict[str, int]
    samples: dict[str, Samples]
    peaks: dict[str, int | None]
    disturbance: Disturbance


def measure(threads: int, reps: int, size: str, tries: int) -> PrefillTable:
    """All forms.

    Raises:
        WrongResult: one of them is wrong.
    """
    torch.set_num_threads(threads)
    stock, inputs = build(SIZES[size])
    models = {form: compressed(stock, form) for form in FORMS}
    found = {form: check(form, model, stock, inputs, 1e-4) for form, model in models.items()}
    functions = {form: lambda i, model=model: first_word(model, inputs) for form, model in models.items()}
    samples, disturbance = interleave(functions, reps, max_seconds=60, tries=tries)
    del stock, models, functions
    peaks = {form: peak(form, threads, size) for form in FORMS}
    return PrefillTable(
        threads,
        SIZES[size],
        {form: tokens for form, (tokens, _) in found.items()},
        {form: cache for form, (_, cache) in found.items()},
        samples,
        peaks,
        disturbance,
    )


def peak(form: str, threads: int, size: str) -> int | None:
    """Bytes beyond weights and input that a prefill needs at its peak; ``None`` where the system does not tell."""
    command = [sys.executable, "-m", "benchmarks.suites.prefill", form, str(threads), size]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def rows(table: PrefillTable) -> list[Sequence[str]]:
    """For ``report.align``."""
    stock = table.samples[STOCK].median
    lines: list[Sequence[str]] = [["", "tokens", "fewer", "ms", "p10", "p90", "reps", "faster", "cache MB", "peak MB"]]
    for form in FORMS:
        sample, tokens = table.samples[form], table.tokens[form]
        times = [f"{seconds * 1e3:.0f}" for seconds in (sample.median, sample.p10, sample.p90)]
        at_most = table.peaks[form]
        memory = "" if at_most is None else f"{at_most / 1e6:.0f}"
        lines.append(
            [
                form,
                str(tokens),
                f"{table.tokens[STOCK] / tokens:.2f}",
                *times,
                str(len(sample.seconds)),
                f"{stock / sample.median:.2f}",
                f"{table.cache[form] / 1e6:.1f}",
                memory,
            ]
        )
    return lines


if __name__ == "__main__":
    _form, _threads, _size = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _stock, _inputs = build(SIZES[_size])
    _model = compressed(_stock, _form)
    print(json.dumps(high_water(lambda: first_word(_model, _inputs))))
