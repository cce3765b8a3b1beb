"""Compressors that keep some frames and drop the others, by what the model itself makes of each frame.

They learn nothing, and score without gradients; tokens give theirs to the frames that are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc


class FrameSelection(torch.nn.Module):
    """Base: frames for which :meth:`keep` says so are tokens, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self._of: tuple[Any, ...] = ()

    def attach(self, model: Any) -> None:
        """From now on this model scores; it is no part of this module, whose parameters it would share."""
        self._of = (model,)

    @property
    def model(self) -> Any:
        """A ``FastCompressForConditionalGeneration``."""
        return self._of[0]

    def keep(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``[A, F, D]`` and ``[A]`` -> ``[A, F]`` bool; what it says of padding does not matter."""
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor) -> fc.Pooled:
        with torch.no_grad():
            groups = torch.where(self.keep(x, lengths), 1, -1).int()
        return fc.segment_pool(x, lengths=lengths, row_group=groups, rule="uniform:1")


class BlankRemoval(FrameSelection):
    """Drops frames whose blank has a probability above ``threshold`` in the CTC head (Speech-LLaMA, arXiv 2307.03917).

    An audio in which all frames are so gives no token.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold: float = threshold

    def keep(self, x: Tensor, lengths: Tensor) -> Tensor:
        blank: Tensor = self.model.ctc_head(x).float().softmax(-1)[..., 0]
        return blank <= self.threshold

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class AttentionSelection(FrameSelection):
    """Keeps the ``ceil(T / rate)`` of ``T`` frames that the token which begins the text attends to most, in the first
    layer of the decoder.

    What is left of SpeechPrune (arXiv 2412.12009) where a request has no words: it ranks by likeness to the words of a
    question first, and then by approximate attention of the first layer. Here attention is the mean over heads of the
    softmax over frames, without the rotation that says where they lie, which is not known before some are dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate: float = rate

    def keep(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        score = self.attention(x, padding).masked_fill(padding, -1.0)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank < (lengths[:, None].double() / self.rate).ceil()

    def attention(self, x: Tensor, padding: Tensor) -> Tensor:
        """``[A, F]`` fp32, each row adding to 1."""
        decoder = self.model.get_decoder()
        layer = decoder.layers[0]
        begin = torch.tensor(self.model.config.text_config.bos_token_id, device=x.device)
        width = layer.self_attn.head_dim
        frames = layer.input_layernorm(self.model.projector(x))
        query = layer.self_attn.q_proj(layer.input_layernorm(decoder.embed_tokens(begin))).unflatten(-1, (-1, width))
        key = layer.self_attn.k_proj(frames).unflatten(-1, (-1, width))  # [A, F, heads of keys, width]
        shared = query.unflatten(0, (key.shape[2], -1))  # [heads of keys, queries of each, width]
        logits = torch.einsum("hqd,afhd->ahqf", shared.float(), key.float()) / math.sqrt(width)
        return logits.masked_fill(padding[:, None, None], -torch.inf).softmax(-1).mean((1, 2))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
