"""Tiny random text decoders, made from the real classes of transformers, and packed batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import fastcompress as fc

SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
WINDOW = 9
#: The configuration of each model type, in addition to SIZES.
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "granite": {"attention_multiplier": 0.3},
    "phi3": {"sliding_window": WINDOW},
    # In this model only the mask has the window; the attention layers have no window attribute.
    "qwen2_moe": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "olmo2": {},
    "smollm3": {},
}
LENGTHS = (37, 5, 300, 1, 23)


def decoder(kind: str, implementation: str = "fastcompress") -> Any:
    """Return a tiny decoder with random weights, which are the same in each call."""
    config = transformers.AutoConfig.for_model(kind, **SIZES, **DECODERS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for p in model.parameters():
        if p.dim() > 1:  # larger weights: scores differ, so that a wrong mask changes the result
            torch.nn.init.normal_(p, std=1.5 / p.shape[1] ** 0.5)
    return model.eval()


def samples(model: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the embeddings and labels of each sample."""
    g = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(1, n, model.config.hidden_size, generator=g) for n in lengths]
    return embeds, [torch.randint(0, 60, (1, n), generator=g) for n in lengths]


def packed_batch(embeds: list[Tensor], labels: list[Tensor] | None = None, compact: bool = True) -> fc.PackedInputs:
    """Pack a padded batch in the form that a collator returns."""
    longest = max(e.shape[1] for e in embeds)
    rows = [torch.nn.functional.pad(e[0], (0, 0, 0, longest - e.shape[1])) for e in embeds]
    mask = torch.tensor([[1] * e.shape[1] + [0] * (longest - e.shape[1]) for e in embeds])
    given = None
    if labels is not None:
        given = torch.stack([torch.nn.functional.pad(t[0], (0, longest - t.shape[1]), value=-100) for t in labels])
    return fc.pack(inputs_embeds=torch.stack(rows), attention_mask=mask, labels=given, compact=compact)
