"""Selection of frames by the model's own scores, against the definitions, one audio at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.__main__ import SHIPPED
from experiments.selection import AttentionSelection, BlankRemoval, FrameSelection
from fastcompress.lalm.loading import load_model

LENGTHS = torch.tensor([37, 0, 1, 20])


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(SHIPPED)[0]


def audio(kind: str) -> Tensor:
    """Return frames ``[4, 37, 128]`` with large values, so that some CTC probabilities are close to 1."""
    x = 3 * torch.randn(4, 37, 128, generator=torch.Generator().manual_seed(0))
    if kind == "silence":
        x[:, 5:12] = 0
    elif kind == "constant":
        x[:] = x[:, :1].clone()
    elif kind == "nan":
        x[0, 3], x[3, 7, 5] = torch.nan, torch.inf
    return x


def check(selection: FrameSelection, model: Any, x: Tensor, wanted: list[list[int]]) -> None:
    selection.attach(model)
    assert not list(selection.parameters()) and not selection.state_dict()
    x = x.requires_grad_()
    out = selection(x, lengths=LENGTHS)
    rows = torch.tensor([a * x.shape[1] + t for a, kept in enumerate(wanted) for t in kept])
    assert out.segments.starts.tolist() == rows.tolist() and (out.segments.lengths == 1).all()
    assert out.cu_seqlens.diff().tolist() == [len(kept) for kept in wanted]
    assert torch.equal(out.values.nan_to_num(), x.detach().flatten(0, 1)[rows].nan_to_num())
    (grad,) = torch.autograd.grad(out.values, x, torch.ones_like(out.values))
    assert grad.flatten(0, 1).any(1).nonzero()[:, 0].tolist() == rows.tolist()


@pytest.mark.parametrize("kind", ("noise", "silence", "constant", "nan"))
@pytest.mark.parametrize("threshold", (0.1, 0.5, 1.0))
def test_blank_removal(model: Any, threshold: float, kind: str):
    x = audio(kind)
    wanted = []
    for frames, length in zip(x, LENGTHS.tolist(), strict=True):
        kept = []
        for t in range(length):
            units = model.ctc_head(frames[t]).detach().double().exp()
            if float(units[0] / units.sum()) <= threshold:  # false for a frame with NaN
                kept.append(t)
        wanted.append(kept)
    if kind == "noise":
        assert 0 < sum(map(len, wanted)) and (threshold == 1.0) == (sum(map(len, wanted)) == LENGTHS.sum())
    check(BlankRemoval(threshold), model, x, wanted)


def attention(model: Any, frames: Tensor) -> Tensor:
    """Return the attention of the decoder's first layer from a token after the frames to the frames.

    All rows have the same position, and the attention of the token to itself is left out."""
    decoder = copy.deepcopy(model.get_decoder())
    decoder.config._attn_implementation = "eager"
    begin = decoder.embed_tokens(torch.tensor([[model.config.text_config.bos_token_id]]))
    rows = torch.cat([model.projector(frames)[None], begin], 1)
    place = torch.zeros(1, rows.shape[1], dtype=torch.int64)
    layer = decoder.layers[0]
    _, weights = layer.self_attn(layer.input_layernorm(rows), decoder.rotary_emb(rows, place), None)
    ours = weights[0, :, -1, :-1]  # the last row of each head
    return (ours / ours.sum(-1, keepdim=True)).mean(0)


@pytest.mark.parametrize("kind", ("noise", "silence"))
@pytest.mark.parametrize("rate", (1.0, 3.0, 50.0))
@torch.no_grad()
def test_attention_selection(model: Any, rate: float, kind: str):
    x = audio(kind)
    selection = AttentionSelection(rate)
    selection.attach(model)
    found = selection.attention(x, torch.arange(37) >= LENGTHS[:, None])
    wanted = []
    for row, frames, length in zip(found, x, LENGTHS.tolist(), strict=True):
        score = attention(model, frames[:length]) if length else torch.zeros(0)
        torch.testing.assert_close(row[:length], score, rtol=1e-4, atol=1e-6)
        order = sorted(range(length), key=lambda t: (-float(row[t]), t))  # noqa: B023  (called at once)
        wanted.append(sorted(order[: math.ceil(length / rate)]))
    with torch.enable_grad():
        check(selection, model, x, wanted)


def test_equal_attention_keeps_the_earlier(model: Any):
    check(AttentionSelection(2.0), model, audio("constant"), [list(range(math.ceil(n / 2))) for n in LENGTHS.tolist()])


def test_a_frame_with_nan_affects_no_other_audio(model: Any):
    selection = AttentionSelection(3.0)
    selection.attach(model)
    x = audio("noise")
    clean = selection(x, lengths=LENGTHS)
    x[0, 3] = torch.nan
    found = selection(x, lengths=LENGTHS)
    first = int(clean.cu_seqlens[1])
    assert torch.equal(found.cu_seqlens, clean.cu_seqlens)
    assert torch.equal(found.segments.starts[first:], clean.segments.starts[first:]) and first < len(clean.values)


def test_names():
    assert str(AttentionSelection(3.0)) == "AttentionSelection(rate=3.0)"
    assert str(BlankRemoval(0.5)) == "BlankRemoval(threshold=0.5)"
