"""Attention over packed sequences on a GPU: accuracy, gradients, and independence of samples.

Run ``pytest --device cuda tests/gpu/test_attention.py``. ``--device cpu`` runs the tests on any machine.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import offsets

pytest.importorskip("transformers", "5", reason="needs transformers 5 or later")
from fastcompress.decoder.packed_attention import packed_attention  # noqa: E402

LENGTHS = (0, 5, 1, 600, 0, 257)


@pytest.fixture(autouse=True)
def gpu(device: torch.device | None) -> torch.device:
    if device is None:
        pytest.skip("needs --device")
    return device


def alone(tensors: list[Tensor], window: int | None, causal: bool) -> Tensor:
    """Compute attention for each sequence separately, in the dtype of the tensors, with a full mask."""
    outputs, begin = [], 0
    for length in LENGTHS:
        query, key, value = (t[begin : begin + length].transpose(0, 1) for t in tensors)  # [H, S, D]
        key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
        row = torch.arange(length, device=query.device)
        seen = row[:, None] >= row if causal else torch.ones(length, length, dtype=torch.bool, device=query.device)
        if window is not None:
            seen = seen & (row[:, None] - row < window)
        scores = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
        begin += length
    return torch.cat(outputs)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"causal": False}], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 64), (torch.float16, 20), (torch.float32, 64)], ids=str)
def test_short_attention(gpu: torch.device, dtype: torch.dtype, width: int, heads: tuple[int, int], options: Any):
    """The error against fp64 is at most twice that of plain attention in the same dtype.

    For gradients the factor is four, because the backward pass rounds the scores again."""
    g = torch.Generator().manual_seed(1)
    shapes = [(sum(LENGTHS), h, width) for h in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=g).to(gpu, dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=g).to(gpu, dtype)
    forms = {"ours": packed_attention(*tensors, offsets(LENGTHS).to(gpu), max_seqlen=max(LENGTHS), **options)}
    window, causal = options.get("window"), options.get("causal", True)
    forms["same dtype"] = alone(tensors, window, causal)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = alone(exact, window, causal)
    wanted = [wanted.detach(), *torch.autograd.grad(wanted, exact, grad.double())]
    found = {name: [out, *torch.autograd.grad(out, tensors, grad)] for name, out in forms.items()}
    pairs = zip(found["ours"], found["same dtype"], wanted, strict=True)
    for part, (ours, plain, true) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        error, allowed = (float((t.detach().double() - true).abs().max()) for t in (ours, plain))
        times = 2 if part == "out" else 4
        assert error <= times * allowed + 1e-5 * float(true.abs().max()), f"{part}: {error}, {allowed}"


def test_half_types_take_the_kernel(gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
    if gpu.type != "cuda" or torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("needs a GPU that the kernel supports")
    monkeypatch.setattr(sys.modules[packed_attention.__module__], "attend", None)
    q = torch.randn(sum(LENGTHS), 2, 64, device=gpu, dtype=torch.bfloat16)
    assert packed_attention(q, q, q, offsets(LENGTHS).to(gpu)).isfinite().all()
    narrow = q[..., :20]
    with pytest.raises(TypeError):  # this width needs the loop over samples, which is None here
        packed_attention(narrow, narrow, narrow, offsets(LENGTHS).to(gpu))


def test_offsets_are_checked_on_request(gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
    q = torch.randn(9, 2, 64, device=gpu, dtype=torch.bfloat16)
    for cu, longest, message in (([0, 5], 9, "must end at the number of rows, 9, got 5"), ([0, 5, 9], 4, "max_seqlen")):
        with pytest.raises(ValueError, match=message):
            packed_attention(q, q, q, torch.tensor(cu, device=gpu), max_seqlen=longest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_no_sample_sees_another(gpu: torch.device, kind: str, dtype: torch.dtype):
    """A change of sample 0 changes no bit of the others. Packing is as accurate as one sample at a time."""
    from tests.support.decoders import LENGTHS as SAMPLES
    from tests.support.decoders import decoder, packed_batch, samples

    model = decoder(kind).to(gpu)
    embeds = [e.to(gpu, dtype) for e in samples(model)[0]]
    with torch.no_grad():
        exact = torch.cat([model.double()(inputs_embeds=e.double()).logits[0] for e in embeds])
        model = model.to(dtype)
        one_by_one = torch.cat([model(inputs_embeds=e).logits[0] for e in embeds])
        first = model(**packed_batch(embeds).model_inputs()).logits[0]
        embeds[0] = torch.randn_like(embeds[0])
        second = model(**packed_batch(embeds).model_inputs()).logits[0]
        loose = model(**packed_batch(embeds, compact=False).model_inputs()).logits[0]
    n = SAMPLES[0]
    assert not torch.equal(first[:n], second[:n]) and torch.equal(first[n:], second[n:])
    error, allowed = (float((t.double() - exact).abs().mean()) for t in (first, one_by_one))
    assert error <= 2 * allowed + 1e-6, f"{error}, {allowed}"
    assert float((loose[: len(second)] - second).abs().max()) <= 4 * float((one_by_one - exact).abs().max()) + 1e-5


def test_gradients_and_training(gpu: torch.device):
    """Packed samples give the gradients of single samples, in fp32 and under bf16 autocast."""
    from tests.support.decoders import decoder, packed_batch, samples

    model = decoder("qwen2").to(gpu).train()
    embeds, labels = samples(model)
    embeds, labels = [e.to(gpu) for e in embeds], [t.to(gpu) for t in labels]

    def gradients(packed: fc.PackedInputs | None, autocast: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast(gpu.type, torch.bfloat16, enabled=autocast):
            if packed is not None:
                loss = model(**packed.model_inputs()).loss
            else:
                losses = [
                    torch.nn.functional.cross_entropy(
                        model(inputs_embeds=e).logits[0, :-1].float(), t[0, 1:], reduction="sum"
                    )
                    for e, t in zip(embeds, labels, strict=True)
                ]
                loss = sum(losses) / sum(t.shape[1] - 1 for t in labels)
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.dim() > 1], allow_unused=True))

    packed = packed_batch(embeds, labels)
    for a, b in zip(gradients(packed, False), gradients(None, False), strict=True):
        if a is not None:
            assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6
    for a, b in zip(gradients(packed, True), gradients(None, True), strict=True):
        if a is not None:
            assert float((a - b).norm()) <= 0.1 * float(b.norm()) + 1e-6
