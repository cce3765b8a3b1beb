"""Compressors that keep some frames and drop the others, by a score that the model itself gives each frame.

They have no parameters and score without gradients. Gradients flow from tokens to the kept frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc


class FrameSelection(torch.nn.Module):
    """Base class of compressors: each frame for which ``keep`` returns True becomes a token, unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self._of: tuple[Any, ...] = ()

    def attach(self, model: Any) -> None:
        """Set the model that scores. It is not registered as a submodule, which would register its parameters twice."""
        self._of = (model,)

    @property
    def model(self) -> Any:
        """The scoring ``FastCompressForConditionalGeneration``."""
        return self._of[0]

    def keep(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map frames ``[A, F, D]`` and lengths ``[A]`` to ``[A, F]`` bool; values of padding are ignored."""
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor) -> fc.Pooled:
        with torch.no_grad():
            groups = torch.where(self.keep(x, lengths), 1, -1).int()
        return fc.segment_pool(x, lengths=lengths, row_group=groups, rule="uniform:1")


class BlankRemoval(FrameSelection):
    """Drop frames whose blank probability in the CTC head exceeds ``threshold`` (Speech-LLaMA, arXiv 2307.03917).

    An audio that has no other frames gives no token.
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
    """Keep the ``ceil(T / rate)`` frames to which the first text token attends most, in the first decoder layer.

    This is the part of SpeechPrune (arXiv 2412.12009) that applies to requests without words. SpeechPrune first ranks
    by similarity to the words of a question, then by approximate attention of the first layer. Attention here is the
    mean over heads of the softmax over frames, without rotary embeddings, since positions are unknown before frames
    are dropped.
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
        """Return attention ``[A, F]`` fp32; each row sums to 1."""
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
