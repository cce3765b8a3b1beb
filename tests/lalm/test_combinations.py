"""Random combinations of encoder, decoder, their sizes, rule and batch: each works or raises the expected error.

The combination is a function of the case's number, so that a failure can be repeated with ``-k "[17]"``.
"""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from fastcompress.lalm.encoders import WAVEFORM, WHISPER
from fastcompress.ops.segment_reduce import REDUCTIONS
from tests.support.reference_models import AUDIO, ENCODERS, MELS, TEXT

DECODERS = ("qwen2", "llama", "mistral", "gemma", "qwen3", "gemma3_text", "granite", "phi3", "mamba")
SHORTEST = 45  # minimum number of samples for one frame of the encoders in WAVE


@dataclass
class Combination:
    encoder: str
    decoder: str
    encoder_sizes: dict[str, int]
    decoder_sizes: dict[str, int]
    options: dict[str, Any]
    batch: dict[str, Any]
    audios: int  # in the batch

    def reason(self) -> str | None:
        """Return the error that must be raised; ``None`` if the combination must work."""
        o = self.options
        rule, units = o["rule"] or "", o["ctc_tokens"]
        if o["keys"] == "ctc" and not units:
            return "keys='ctc' needs ctc_tokens"
        if o["boundary_ratio"] is not None and rule:
            return "set boundary_ratio or rule, not both"
        if rule.startswith("label-change") and not units:
            return "needs ctc_tokens"
        if not self.audios:
            return None
        if o["normalize_features"] and self.encoder not in WHISPER:
            return "normalize_features must be False"
        if self.encoder in WAVEFORM and int(self.batch["feature_attention_mask"].sum(1).min()) < SHORTEST:
            return "the encoder returned no frame"
        return None


def draw_rule(g: random.Random) -> str | None:
    lengths = g.choice(["", ",min_len=2", ",max_len=4", ",min_len=2,max_len=5"])
    return g.choice(
        [
            None, "uniform:1", f"uniform:{g.randint(2, 9)}", "uniform:3,tail=drop",
            f"local-max:order={g.randint(1, 3)}{lengths}",
            f"local-max:threshold={g.uniform(0, 0.3):.3f}", "local-max:prominence=0.05", "local-max:normalize=True",
            f"threshold:{g.uniform(0.01, 1.2):.3f}{lengths}", f"top-k:rate={g.uniform(1, 6):.2f}",
            f"top-k:count={g.randint(1, 9)}", "label-change:blank=0", f"label-change:min_len={g.randint(1, 3)}",
            f"lookback:{g.randint(1, 4)},threshold=0.5{lengths}", f"peak-height:threshold=0.04{lengths}",
        ]
    )  # fmt: skip


def draw_encoder_sizes(g: random.Random, encoder: str) -> dict[str, int]:
    width, layers, heads = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if encoder == "whisper":
        width, layers, heads = ("d_model", "encoder_layers", "encoder_attention_heads")
    return {width: g.choice([16, 24, 48]), layers: g.randint(1, 3), heads: g.choice([1, 2, 4])}


def draw_decoder_sizes(g: random.Random, decoder: str) -> dict[str, int]:
    heads, size, layers = g.choice([1, 2, 4, 6]), g.choice([4, 8, 16]), g.randint(1, 3)
    if decoder == "mamba":
        return {"hidden_size": heads * size, "num_hidden_layers": layers}
    shared = g.choice([count for count in (1, 2, 3, 4, 6) if heads % count == 0])
    return {
        "hidden_size": heads * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": size,
        "intermediate_size": g.choice([16, 48]),
    }


def draw(number: int) -> Combination:
    g = random.Random(number)
    encoder, decoder = g.choice(list(ENCODERS)), g.choice(DECODERS)
    sizes_of = draw_encoder_sizes(g, encoder), draw_decoder_sizes(g, decoder)
    learned = g.random() < 0.2
    options = {
        "rule": draw_rule(g) if not learned or g.random() < 0.1 else None,
        "reduce": g.choice(["mean", *REDUCTIONS]),
        "ctc_tokens": g.choice([None, ["a", "b", "c"]]),
        "keys": g.choice(["frames", "frames", "ctc"]),
        "boundary_ratio": g.uniform(1.5, 6) if learned else None,
        "boundary_kind": g.choice(["h-net", "cif"]),
        "projector_hidden_size": g.choice([None, 20]),
        "train_encoder": g.random() < 0.5,
        "normalize_features": g.random() < 0.15,
        "audio_padding": g.choice(["window", "longest"]),
    }
    samples = [[g.randint(3, 59) for _ in range(g.randint(1, 8))] for _ in range(g.randint(1, 4))]
    for row in samples:
        for _ in range(g.choice([0, 1, 1, 1, 2])):
            row.insert(g.randint(0, len(row)), AUDIO)
    longest, left = max(map(len, samples)), g.random() < 0.5
    ids, mask = torch.zeros(len(samples), longest, dtype=torch.int64), torch.zeros(len(samples), longest).long()
    for i, row in enumerate(samples):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    batch["labels"] = ids.masked_fill((mask == 0) | (ids == AUDIO), -100)
    audios = int((ids == AUDIO).sum())
    if audios:
        noise = torch.Generator().manual_seed(number)
        if encoder in WAVEFORM:
            sizes = [g.randint(SHORTEST if g.random() < 0.97 else 20, 1500) for _ in range(audios)]
            batch["input_features"] = torch.randn(audios, max(sizes), generator=noise)
        else:
            most = 260 if encoder in WHISPER else 120
            sizes = [g.randint(8 if encoder == "parakeet_encoder" else 1, most) for _ in range(audios)]
            batch["input_features"] = torch.randn(audios, MELS, max(sizes), generator=noise)
        batch["feature_attention_mask"] = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
    return Combination(encoder, decoder, *sizes_of, options, batch, audios)


def build(c: Combination) -> FastCompressForConditionalGeneration:
    audio = transformers.AutoConfig.for_model(c.encoder, **ENCODERS[c.encoder] | c.encoder_sizes)
    if c.decoder == "mamba":
        text = transformers.MambaConfig(vocab_size=60, state_size=4, pad_token_id=0, **c.decoder_sizes)
    else:
        text = transformers.AutoConfig.for_model(c.decoder, **TEXT | c.decoder_sizes)
    torch.manual_seed(0)
    model = FastCompressForConditionalGeneration(FastCompressConfig(audio, text, audio_token_id=AUDIO, **c.options))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1.0 / p.shape[1] ** 0.5)
    return model.eval()


def works(c: Combination) -> None:
    model = build(c)
    out = model(**c.batch)
    labels = out.packed.labels[1:] != -100
    assert out.loss.isfinite() and out.logits.isfinite().all()
    assert out.logits.shape == (1, int(labels.sum()), 60)
    assert (out.num_audio_tokens > 0) <= (c.audios > 0) and out.num_audio_tokens <= out.num_frames
    out.loss.backward()
    weight = next(model.projector.parameters()).grad
    # Each audio token that is followed by a label in its sample affects the loss. CIF may fire no token, and windows
    # with a dropped tail may have none.
    audio, label = out.packed.source >= c.batch["input_ids"].numel(), out.packed.labels != -100
    assert int(audio.sum()) == int(out.num_audio_tokens)
    samples = zip(*(part.split(out.packed.cu_seqlens.diff().tolist()) for part in (audio, label)), strict=True)
    has_say = any(bool((a.cumsum(0)[:-1] > 0)[b[1:]].any()) for a, b in samples)
    assert weight is not None and weight.isfinite().all() and bool(weight.any()) >= has_say
    if model._runs_packed:  # compare with the same decoder on a padded batch
        model._runs_packed = False
        with torch.no_grad():
            padded = model(**c.batch)
        model._runs_packed = True
        assert padded.num_audio_tokens == out.num_audio_tokens
        torch.testing.assert_close(padded.logits, out.logits, rtol=1e-3, atol=1e-3)
    prompt: dict[str, Tensor] = {name: value for name, value in c.batch.items() if name != "labels"}
    tokens = model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    samples, longest = prompt["input_ids"].shape
    assert tokens.shape == (samples, longest + 2)
    assert torch.equal(tokens[:, :longest], prompt["input_ids"])


def check(number: int) -> bool:
    """Return whether the combination works; otherwise assert that it raises the expected error."""
    c = draw(number)
    reason = c.reason()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the decoder runs padded")
        warnings.filterwarnings("ignore", ".*generation flags are not valid.*")
        if reason is None:
            works(c)
            return True
        with pytest.raises(ValueError, match=re.escape(reason)):
            works(c)
        return False


@pytest.mark.parametrize("number", range(18))
def test_combination(number: int):
    check(number)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_combinations(part: int):
    worked, failed = 0, []
    for number in range(1000 + 100 * part, 1100 + 100 * part):
        try:
            worked += check(number)
        except Exception as error:
            failed.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
    assert not failed, "\n".join(failed)
    assert worked > 50
