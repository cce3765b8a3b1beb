"""``pack`` takes an ``nn.Embedding`` in place of its table, unless the module does more than look up rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

IDS = torch.tensor([[5, 9, 7, 0], [1, 1, 9, 2]])
AUDIO, AUDIO_CU = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 2, 3])


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": True}, {"dtype": torch.bfloat16}], ids=str)
def test_an_embedding_is_its_table(options: dict):
    module, mask = nn.Embedding(10, 4, **options), (IDS > 0).long()
    audio = AUDIO.to(module.weight.dtype)
    packed, expected = (
        fc.pack(IDS, embedding, audio, placeholder=9, audio_cu_seqlens=AUDIO_CU, attention_mask=mask)
        for embedding in (module, module.weight)
    )
    assert_same_bits(packed.inputs_embeds.detach(), expected.inputs_embeds.detach())
    packed.inputs_embeds.float().square().sum().backward()
    assert module.weight.grad is not None and bool(module.weight.grad[1].any())


def test_modules_that_do_more_are_refused_with_the_fix():
    scaled = Scaled(10, 4)
    for module, error in (
        (scaled, "embedding must only look up rows, but Scaled has a forward or a max_norm of its own"),
        (nn.Embedding(10, 4, max_norm=1.0), "but Embedding has a forward or a max_norm of its own"),
    ):
        with pytest.raises(ValueError, match=f"{error}.*; pass inputs_embeds=embedding.input_ids."):
            fc.pack(IDS, module, AUDIO, placeholder=9, audio_cu_seqlens=AUDIO_CU)
    with pytest.raises(TypeError, match="must be a tensor or a torch.nn.Embedding, got Linear; pass inputs_embeds="):
        fc.pack(IDS, nn.Linear(4, 10), AUDIO, placeholder=9, audio_cu_seqlens=AUDIO_CU)
    packed = fc.pack(IDS, None, AUDIO, inputs_embeds=scaled(IDS), placeholder=9, audio_cu_seqlens=AUDIO_CU)
    assert_same_bits(packed.inputs_embeds[0].detach(), 2 * scaled.weight[5].detach())


def test_without_an_embedding_the_error_says_what_is_needed():
    with pytest.raises(ValueError, match="pack needs input_ids and embedding, or inputs_embeds"):
        fc.pack(IDS, None)
