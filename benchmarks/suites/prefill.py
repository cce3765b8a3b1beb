"""Suite ``prefill``: what compression saves when an audio LLM reads its prompt: rows, time, cache, peak memory.

A Qwen2-Audio whose decoder is as wide as Qwen2-7B's, with a very small encoder, gets stock inputs: text and one audio
each. Stock, and through ``apply_to`` with each rule, it generates one token.

T rows of prompt need 2 T L P multiplications and additions in L layers of P weights each, and attention 2 T^2 L H,
which is 1 % of that at T = 800 and H = 3584. Time should fall as the rows do, and the cache falls exactly so.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.compare import Bench, Implementation, Job, WrongResult, compare
from benchmarks.harness.memory import high_water, in_process
from benchmarks.results import OURS
from benchmarks.suites.decoder import check_logits, settings

NAME, STOCK = "prefill", "stock"
#: Forms, which are named by their rules; how many rows the last keeps depends on the audio.
FORMS = (STOCK, "uniform:2", "uniform:3", "local-max")
#: Ids before and after the audio, together.
TEXT = 50
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


@dataclass(frozen=True)
class Size:
    """Size of the decoder; the seconds of each audio, of 25 rows per second; and the number of samples."""

    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    seconds: int
    count: int


#: Qwen2-7B, of which a machine without a GPU takes two layers and a small vocabulary.
SIZES = {
    "quick": Size(64, 2, 4, 2, 128, 200, 2, 2),
    "cpu": Size(3584, 2, 28, 4, 18944, 1000, 30, 1),
    "gpu": Size(3584, 28, 28, 4, 18944, 152064, 30, 8),
}


def build(
    size: Size, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """Build the stock model, with random weights, and a batch for it."""
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
    """Return the model of a form, which shares the weights."""
    from fastcompress.integrations.transformers import apply_to

    other = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    # The committed records were measured without these settings, whose keys are wider.
    settings: dict[str, Any] = {"proportional_attention": False, "positions": "compact"}
    return other if form == STOCK else apply_to(other, form, **settings)


@torch.inference_mode()
def first_token(model: Any, _: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Read the prompt and generate one token."""
    written: Tensor = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return written[:, -1]


def peak(form: str, threads: int, size: Size) -> int:
    """Return the peak memory of one form in this process, which should be fresh."""
    torch.set_num_threads(threads)
    stock, inputs = build(size)
    return high_water(functools.partial(first_token, compressed(stock, form), None, inputs))


@torch.inference_mode()
def check_form(form: str, model: Any, inputs: dict[str, Tensor], token: Tensor) -> dict[str, Any]:
    """Check a form, and return the rows of its prompts and the bytes of its cache.

    ``generate`` must return the most likely token; the logits must be the same packed and with a cache; and those of
    the stock model must be those of an identity compressor.
    """
    out = model(**inputs, use_cache=True)
    cache = getattr(out, "cache", None)
    cache = out.past_key_values if cache is None else cache
    packed = (compressed(model, "uniform:1") if form == STOCK else model)(**inputs)
    tokens = inputs["input_ids"].numel() if form == STOCK else len(packed.compressed.source)
    check_logits(form, packed.logits[:, -1], out.logits[:, -1], TOLERANCE[inputs["input_features"].dtype])
    if not torch.equal(token, out.logits[:, -1].argmax(-1)):
        raise WrongResult(f"{form}: generate returns another token than the most likely one")
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"tokens": tokens, "cache_bytes": size}


def job(bench: Bench, name: str, dtype: torch.dtype, threads: int) -> Job:
    """Make the job of one setting."""
    size = SIZES[name]
    stock, inputs = build(size, bench.device, dtype)
    models = {form: compressed(stock, form) for form in FORMS}
    implementations = [
        Implementation(form, STOCK if form == STOCK else OURS, functools.partial(first_token, model))
        for form, model in models.items()
    ]
    return Job(
        NAME, f"{size.layers} layers x {size.width}", dtype, threads, implementations,
        lambda form, x, token, *_: check_form(form, models[form], inputs, token), batch=inputs, strict=True, reps=7,
        max_seconds=60, wall=True, peak=lambda form, direction: in_process(peak, form, threads, size),
        details=dict(vars(size)),
    )  # fmt: skip


def why_not() -> str:
    """Return why this suite cannot run with the installed transformers, or "". It builds no model."""
    from fastcompress.integrations.transformers.families import check_version

    try:
        check_version("dynamic")
    except ImportError as error:
        return str(error)
    return ""


def run(bench: Bench) -> None:
    """Measure one size."""
    for size, dtype, threads in settings(bench, NAME):
        if reason := why_not():  # before a model of 15 GB is built
            return print(f"prefill: not measured: {reason}")
        try:
            one = job(bench, size, dtype, threads)
        except torch.OutOfMemoryError as error:
            return print(f"prefill: not measured: {error}")
        compare(bench, one)
