"""Errors of ``pack``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastcompress as fc

AUDIO = 99  # the placeholder
TABLE, IDS, ROWS = torch.randn(100, 4), torch.tensor([[1, 2, AUDIO], [AUDIO, AUDIO, 3]]), torch.randn(5, 4)
CU = torch.tensor([0, 2, 5])
EMBEDS = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({}, ValueError, "pack needs input_ids and embedding, or inputs_embeds"),
        ({"input_ids": IDS}, ValueError, "pack needs input_ids and embedding"),
        ({"input_ids": IDS.float(), "embedding": TABLE}, TypeError, "input_ids must be int32 or int64, got torch.float32"),
        ({"input_ids": IDS[None], "embedding": TABLE}, ValueError, "input_ids must have shape [B, L] or [N], got [1, 2, 3]"),
        ({"input_ids": IDS[:0], "embedding": TABLE}, ValueError, "input_ids must hold at least one sample and one row, got shape [0, 3]"),
        ({"inputs_embeds": EMBEDS[:, :0]}, ValueError, "inputs_embeds must hold at least one sample and one row, got shape [2, 0]"),
        ({"inputs_embeds": EMBEDS, "attention_mask": torch.zeros(2, 3)}, ValueError, "nothing is left to pack: every row of the 2 samples is dropped"),
        ({"input_ids": IDS, "embedding": TABLE, "row_group": torch.full((2, 3), -1).int()}, ValueError, "nothing is left to pack: every row of the 2 samples"),
        ({"input_ids": IDS, "embedding": TABLE[None]}, ValueError, "embedding must have shape [V, H], got [1, 100, 4]"),
        ({"input_ids": IDS, "embedding": TABLE.int()}, TypeError, "embedding must be float32, float16, bfloat16 or float64"),
        ({"input_ids": IDS + 50, "embedding": TABLE}, ValueError, "input_ids must lie in [0, 100), the rows of embedding, got 149 in sample 0 at position 2"),
        ({"input_ids": IDS - 2, "embedding": TABLE}, ValueError, "got -1 in sample 0 at position 0"),
        ({"inputs_embeds": EMBEDS, "embedding": TABLE}, ValueError, "embedding and inputs_embeds cannot be combined"),
        ({"inputs_embeds": EMBEDS, "input_ids": IDS[:1]}, ValueError, "input_ids must have shape [2, 3], got [1, 3]"),
        ({"inputs_embeds": EMBEDS, "placeholder": 3}, ValueError, "placeholder needs input_ids, which is missing"),
        ({"inputs_embeds": EMBEDS, "labels": IDS[0]}, ValueError, "labels must have shape [2, 3], got [3]"),
        ({"inputs_embeds": EMBEDS, "labels": IDS.float()}, TypeError, "labels must be int32 or int64"),
        ({"inputs_embeds": EMBEDS, "rule": "uniform:0", "row_group": torch.ones(2, 3).int()}, ValueError, "size must be at least 1"),
        ({"inputs_embeds": EMBEDS, "rule": "uniform:3"}, ValueError, "rule and keys need placeholder or row_group"),
        ({"inputs_embeds": EMBEDS, "audio_cu_seqlens": CU}, ValueError, "audio_cu_seqlens needs audio, which is missing"),
        ({"inputs_embeds": EMBEDS, "row_group": torch.ones(2, 3)}, TypeError, "row_group must be int32"),
        ({"inputs_embeds": EMBEDS, "lengths": torch.tensor([2, 4])}, ValueError, "lengths must lie in [0, 3], the padded length, got 4 at index 1"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder": AUDIO, "lengths": torch.tensor([2, 4])}, ValueError, "got 4 at index 1"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder": True}, TypeError, "placeholder must be an integer, got True"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder_counts": 1}, ValueError, "placeholder_counts needs placeholder"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder": AUDIO, "placeholder_counts": 2}, ValueError, "placeholder_counts must be None, 1 or a tensor, got 2"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder": AUDIO, "row_group": IDS.int()}, ValueError, "placeholder and row_group cannot be combined"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": CU, "placeholder": AUDIO, "rule": "local-max"}, ValueError, "rule and keys need inputs_embeds without audio"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS.half(), "placeholder": AUDIO}, TypeError, "audio must have the dtype of the text, torch.float32, got torch.float16"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS[:, :3], "placeholder": AUDIO}, ValueError, "audio must have shape [M, 4], rows as wide as the text, got [5, 3]"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS.to("meta"), "placeholder": AUDIO}, ValueError, "audio must be on the device of the input, cpu, got meta"),
        ({"input_ids": IDS.to("meta"), "embedding": TABLE}, ValueError, "input_ids must be on the device of the input, cpu, got meta"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": CU.float(), "placeholder": AUDIO}, TypeError, "audio_cu_seqlens must be int32 or int64"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": CU[:2], "placeholder": AUDIO}, ValueError, "audio_cu_seqlens must end at the number of audio rows, 5, got 2"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": torch.tensor([0, 6, 5]), "placeholder": AUDIO}, ValueError, "audio_cu_seqlens must not decrease, got 6 and then 5 at index 2"),
        # More audios than places, and fewer.
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "placeholder": AUDIO}, ValueError, "sample 1 needs 1 audios after the 1 of the samples before it, but audio has only 1 audios"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": torch.tensor([0, 1, 2, 3, 5]), "placeholder": AUDIO}, ValueError, "audio has 4 audios, but the samples have only 2 places for them: audio 2 has no place after sample 1, the last"),
        ({"input_ids": IDS, "embedding": TABLE, "placeholder": AUDIO}, ValueError, "sample 0 needs 1 audios after the 0 of the samples before it, but audio has only 0 audios"),
        ({"input_ids": IDS, "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": CU}, ValueError, "audio has 2 audios, but the samples have only 0 places"),
        ({"inputs_embeds": EMBEDS, "input_ids": IDS, "placeholder": AUDIO, "placeholder_counts": torch.tensor([1, 3])}, ValueError, "sample 1 has 2 of its 2 left for audio 1, which needs 3"),
        ({"inputs_embeds": EMBEDS, "input_ids": IDS, "placeholder": AUDIO, "placeholder_counts": torch.tensor([1, 1])}, ValueError, "sample 1 has 2 of them, 1 more than the 2 audios need"),
        ({"inputs_embeds": EMBEDS, "input_ids": IDS, "placeholder": AUDIO, "placeholder_counts": torch.tensor([1, 2, 1])}, ValueError, "placeholder_counts must match the placeholders: it has 3 audios, but there are placeholders for only 2 up to the last sample, 1"),
        ({"inputs_embeds": EMBEDS, "input_ids": torch.tensor([[AUDIO, 3, AUDIO], [1, 2, AUDIO]]), "placeholder": AUDIO, "placeholder_counts": torch.tensor([2, 1])}, ValueError, "the 2 placeholders of audio 0 must be next to each other, but sample 0 has others between its positions 0 and 2"),
        # As many runs of placeholders as audios, and as many placeholders as counted.
        ({"input_ids": torch.tensor([[AUDIO, 3, AUDIO], [AUDIO, 2, 2]]), "embedding": TABLE, "audio": ROWS, "audio_cu_seqlens": torch.tensor([0, 1, 5]), "placeholder": AUDIO, "placeholder_counts": torch.tensor([1, 2])}, ValueError, "sample 0 has 1 of its 2 left for audio 1, which needs 2"),
        ({"inputs_embeds": EMBEDS, "input_ids": IDS, "placeholder": AUDIO, "placeholder_counts": torch.tensor([1, 0, 2])}, ValueError, "placeholder_counts must be at least 1, got 0 at index 1"),
    ],
)  # fmt: skip
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        fc.pack(**kwargs)
