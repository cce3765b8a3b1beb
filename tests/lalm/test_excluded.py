"""Excluded rows must not affect values or gradients of the reference model, whatever their values are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastcompress import nn as fnn
from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from fastcompress.lalm.encoders import WAVEFORM, WHISPER, encode
from tests.support import audio_llms
from tests.support.encoders import ENCODERS, encoder_of
from tests.support.slow import some

BAD = (torch.nan, torch.inf, -1e30)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["window", "longest"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_has_no_effect_on_frames(kind: str, padding: str, training: bool):
    encoder = encoder_of(kind).train(training)
    for name in ("dropout", "attention_dropout", "hidden_dropout", "feat_proj_dropout", "activation_dropout",
                 "layerdrop", "encoder_layerdrop", "apply_spec_augment", "conformer_conv_dropout"):  # fmt: skip
        if hasattr(encoder.config, name):
            setattr(encoder.config, name, type(getattr(encoder.config, name))(0))
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lengths = torch.tensor([180, 96, 150] if kind not in WAVEFORM else [1800, 960, 1500])
    shape = (3, int(lengths.max()) + 7) if kind in WAVEFORM else (3, 16, int(lengths.max()) + 7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(shape[-1]) < lengths[:, None]
    inside = mask if kind in WAVEFORM else mask[:, None].expand(shape)
    found = []
    for bad in (0.0, *BAD):
        state = torch.random.get_rng_state()
        given = torch.where(inside, x, bad)
        given.requires_grad_(not (training and kind in WAVEFORM))  # which then takes leaves alone
        frames, counts = encode(encoder, given, mask.long(), padding if kind in WHISPER else "window")
        valid = torch.arange(frames.shape[1]) < counts[:, None]
        kept = frames[valid]
        grad = torch.zeros_like(given)
        if given.requires_grad:
            (grad,) = torch.autograd.grad(kept.square().sum(), given, retain_graph=True)
        weights = torch.autograd.grad(
            kept.square().sum(), [p for p in encoder.parameters() if p.requires_grad], allow_unused=True
        )
        found.append([kept.detach(), grad, *(w for w in weights if w is not None)])
        torch.random.set_rng_state(state)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert found[0][0].isfinite().all() and (found[0][1][~inside] == 0).all()


def test_masks_that_are_not_0_and_1():
    encoder = encoder_of("whisper")
    x = torch.randn(2, 16, 100)
    inside = torch.arange(100) < torch.tensor([[100], [60]])
    additive = torch.where(inside, 0.0, -1e9)
    holed = inside.long()
    holed[1, 30] = 0
    for mask in (additive, 2 * inside.long()):
        with pytest.raises(ValueError, match="feature_attention_mask must be bool or contain only 0 and 1"):
            encode(encoder, x, mask)
    for mask in (holed, inside.flip(1)):
        with pytest.raises(ValueError, match="must be 1 for each audio and 0 after its end, got 0 before 1 in audio 1"):
            encode(encoder, x, mask)
    for mask in (inside, inside.long(), inside.float()):
        assert encode(encoder, x, mask)[1].tolist() == [50, 30]


def model_of(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = FastCompressConfig(
        audio_llms.WHISPER | {"model_type": "whisper"}, audio_llms.TEXT | {"model_type": "qwen2"},
        audio_token_id=audio_llms.AUDIO, train_encoder=True, **kwargs,
    )  # fmt: skip
    return FastCompressForConditionalGeneration(config)


UNITS = {"ctc_tokens": ["a", "b", "c"]}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "settings",
    some(
        [
            {"rule": None}, {"rule": "uniform:3"}, {"rule": "local-max"}, {"rule": "top-k:rate=3"},
            {"rule": "uniform:3", "reduce": "max"}, UNITS | {"rule": "label-change"},
            UNITS | {"rule": "local-max", "keys": "ctc"}, {"boundary_ratio": 3.0},
            {"boundary_ratio": 3.0, "boundary_kind": "cif"}, {"rule": "uniform:3", "projector_hidden_size": 16},
        ],
        {"rule": "local-max"}, UNITS | {"rule": "label-change"}, UNITS | {"rule": "local-max", "keys": "ctc"},
        {"boundary_ratio": 3.0}, {"boundary_ratio": 3.0, "boundary_kind": "cif"},
    ),
    ids=str,
)  # fmt: skip
def test_frames_after_the_end_have_no_effect(settings: dict[str, Any], packed: bool):
    """Of frames that the caller encoded; those of the encoder are finite."""
    model = model_of(**settings)
    model._runs_packed = packed
    ids = torch.tensor([[5, audio_llms.AUDIO, 6, 7], [8, audio_llms.AUDIO, 9, 0]])
    lengths = torch.tensor([12, 7])
    frames = torch.randn(2, 15, 24)
    units = torch.tensor([[1, 2], [3, -100]]) if settings.get("ctc_tokens") else None
    found = []
    for bad in (0.0, *BAD):
        x = torch.where((torch.arange(15) < lengths[:, None])[..., None], frames, bad).requires_grad_()
        out = model(
            ids, (ids != 0).long(), frames=x, frame_lengths=lengths, ctc_labels=units,
            labels=ids.masked_fill((ids == 0) | (ids == audio_llms.AUDIO), -100),
        )  # fmt: skip
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        found.append([out.loss.detach(), out.logits.detach(), x.grad, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(t.isfinite().all() for t in found[0])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more threads, the bits of a matrix product depend on its number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("compressor", [None, fnn.GreedySegments(0.9), fnn.BipartiteMerge(2.0), fnn.NoveltyPool(0.9)])
def test_samples_have_no_effect_on_others(compressor: Any, one_thread: None):
    model = model_of(rule="local-max").eval()
    if compressor is not None:
        model.use_compressor(compressor)
    ids = torch.tensor([[5, audio_llms.AUDIO, 6, 7]] * 3)
    found = []
    for bad in (None, *BAD):
        x = torch.randn(3, 15, 24, generator=torch.Generator().manual_seed(0))
        if bad is not None:
            x[0, 5] = bad
        x.requires_grad_()
        packed = model.pack(ids, frames=x, frame_lengths=torch.tensor([15, 9, 12]))
        rows, mask = packed.unpack(model(ids, frames=x, frame_lengths=torch.tensor([15, 9, 12])).logits)
        (grad,) = torch.autograd.grad(rows[1:][mask[1:].bool()].sum(), x)
        found.append((rows[1:][mask[1:].bool()].detach(), grad[1:]))
    for values, grad in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(grad, found[0][1])
