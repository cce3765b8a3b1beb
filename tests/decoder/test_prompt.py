"""Proportional attention and positions in time, held to the stock decoder run on every frame.

A row that stands for ``L`` frames gives the result of ``L`` equal rows at one position that attend to each other: with
``log(L)`` on its scores it weighs as much as they do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastcompress as fc
from fastcompress.decoder.prompt import Prompt, adapt, starting_from
from tests.support.decoders import DECODERS, decoder

#: Frames of each row of two samples; the first has text at both ends, the second ends with audio.
LENGTHS = ([1, 1, 3, 1, 4, 2, 1, 1], [1, 5, 1, 2])
#: Decoders that run in double precision and see the whole sample.
WHOLE = [kind for kind, extra in DECODERS.items() if "sliding_window" not in extra and kind != "qwen2_moe"]


def prompt_rows(model: Any, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    return [torch.randn(len(n), width, generator=generator, dtype=torch.float64) for n in LENGTHS]


def packed_prompt(rows: list[Tensor], positions: str = "time") -> fc.PackedInputs:
    """Pack the rows as text and audio, with the lengths of the audio."""
    longest = max(map(len, rows))
    groups = torch.full((len(rows), longest), -1, dtype=torch.int32)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    for i, row in enumerate(rows):
        embeds[i, : len(row)] = row
        groups[i, : len(row)] = torch.tensor([int(n > 1) for n in LENGTHS[i]])
    audio = torch.cat([row[torch.tensor(n) > 1] for row, n in zip(rows, LENGTHS, strict=True)])
    runs = [1 if g > 0 and (c == 0 or line[c - 1] <= 0) else 0 for line in groups.tolist() for c, g in enumerate(line)]
    place = torch.tensor(runs).cumsum(0).view(groups.shape)[groups > 0] - 1
    offsets = torch.nn.functional.pad(torch.bincount(place).cumsum(0), (1, 0))
    lengths = torch.tensor([n for line in LENGTHS for n in line if n > 1])
    return fc.pack(
        inputs_embeds=embeds,
        audio=audio,
        audio_cu_seqlens=offsets,
        audio_lengths=lengths,
        row_group=groups,
        positions=positions,
    )


def on_every_frame(model: Any, rows: Tensor, lengths: list[int], positions: str, new: int = 0) -> Tensor:
    """Return the logits of each row of one sample, computed by the stock decoder from repeated rows.

    The last ``new`` rows follow the compressed ones, and have the positions that follow.
    """
    length = torch.tensor([*lengths, *[1] * new])
    run = torch.repeat_interleave(torch.arange(len(rows)), length)
    seen = run[:, None] >= run  # the frames of a row see each other
    mask = torch.zeros(seen.shape, dtype=rows.dtype).masked_fill(~seen, torch.finfo(rows.dtype).min)[None, None]
    first = length.cumsum(0) - length
    place = first + (length - 1) // 2 if positions == "time" else torch.arange(len(rows))
    out = model(inputs_embeds=rows[run][None], attention_mask=mask, position_ids=place[run][None], use_cache=False)
    return out.logits[0, first]


@pytest.mark.parametrize("positions", ["time", "compact"])
@pytest.mark.parametrize("kind", WHOLE)
def test_packed_rows_weigh_as_much_as_their_frames(kind: str, positions: str):
    model, stock = decoder(kind).double(), decoder(kind, "eager").double()
    rows = prompt_rows(model)
    packed = packed_prompt(rows, positions)
    logits = model(**packed.model_inputs(proportional_attention=True)).logits[0]
    want = [on_every_frame(stock, r, n, positions) for r, n in zip(rows, LENGTHS, strict=True)]
    # The stock decoders compute their softmax in fp32.
    torch.testing.assert_close(logits, torch.cat(want), rtol=1e-5, atol=1e-5)
    plain = model(**packed.model_inputs()).logits[0]
    assert (plain - torch.cat(want)).abs().max() > 0.05


def test_the_bias_comes_after_a_soft_cap():
    model, stock = (decoder("gemma2", kind).double() for kind in ("fastcompress", "eager"))
    for one in (model, stock):  # a window that is longer than the samples
        one.config.sliding_window = 1000
        for layer in one.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = 1000
    rows = prompt_rows(model)
    packed = packed_prompt(rows)
    want = torch.cat([on_every_frame(stock, r, n, "time") for r, n in zip(rows, LENGTHS, strict=True)])
    logits = model(**packed.model_inputs(proportional_attention=True)).logits[0]
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    for use_cache in (False, True):
        padded, _ = run_padded(model, packed, "left", use_cache=use_cache)
        torch.testing.assert_close(padded, want, rtol=1e-5, atol=1e-5)


def run_padded(
    model: Any, packed: fc.PackedInputs, side: str, proportional: bool = True, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Run the decoder on the padded prompt and return the logits of its rows, and the cache."""
    embeds, mask = packed.unpack(side=side)
    arguments = {"inputs_embeds": embeds, "attention_mask": mask, **kwargs}
    with starting_from(Prompt.of(packed, side, proportional)):
        out = model(**adapt(model.model, arguments))
    return out.logits[mask.bool()], out.past_key_values if hasattr(out, "past_key_values") else out.cache


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_padded_equals_packed(kind: str, side: str, use_cache: bool):
    model = decoder(kind).double()
    packed = packed_prompt(prompt_rows(model))
    want = model(**packed.model_inputs(proportional_attention=True)).logits[0]
    found, _ = run_padded(model, packed, side, use_cache=use_cache)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def static(model: Any, batch: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=32)


def dynamic(model: Any, batch: int) -> Any:
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("kind", ["qwen2", "granite"])
def test_a_cache_continues_where_the_frames_end(kind: str, make_cache: Any, proportional: bool):
    """Rows that follow a prompt, one and several at a time, equal those of the stock decoder on every frame."""
    model, stock = decoder(kind).double(), decoder(kind, "eager").double()
    rows = prompt_rows(model)
    packed = packed_prompt(rows)
    new = torch.randn(2, 4, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    cache = make_cache(model, 2)
    _, found = run_padded(model, packed, "left", proportional, past_key_values=cache, use_cache=True)
    assert found is cache
    mask = packed.unpack(side="left")[1]
    outputs = []
    for part in (new[:, :1], new[:, 1:3], new[:, 3:]):
        mask = torch.cat([mask, mask.new_ones(2, part.shape[1])], 1)
        arguments = {"inputs_embeds": part, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        outputs.append(model(**adapt(model.model, arguments)).logits)
    outputs = torch.cat(outputs, 1)
    if not proportional:
        for i, (r, p) in enumerate(zip(rows, packed.position_ids.split([8, 4]), strict=True)):
            whole = torch.cat([r, new[i]])[None]
            place = torch.cat([p, packed.next_positions[i] + torch.arange(4)])[None]
            # Without a mask, transformers takes jumps of the positions for the starts of packed samples.
            ones = torch.ones(whole.shape[:2])
            want = stock(inputs_embeds=whole, position_ids=place, attention_mask=ones, use_cache=False).logits[0, -4:]
            torch.testing.assert_close(outputs[i], want, rtol=1e-5, atol=1e-5)
        return
    for i, (r, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        want = on_every_frame(stock, torch.cat([r, new[i]]), n, "time", new=4)[-4:]
        torch.testing.assert_close(outputs[i], want, rtol=1e-5, atol=1e-5)
