"""Read the compression of a served model from its configuration, count tokens and pool rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastcompress.integrations.vllm.families import Family
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.segment_reduce import REDUCTIONS, Reduce
from fastcompress.rules import MinVariance, Rule, TopK, Uniform

#: Rules whose number of tokens is a function of the number of rows.
COUNTED = (Uniform, MinVariance, TopK)


@dataclass(frozen=True)
class Compression:
    """How the audio of a served model is pooled.

    Attributes:
        rule: Rule with a ``num_segments``.
        reduce: Reduction of a segment.
        window: Number of rows of a full window; ``None``: audio is not cut.
    """

    rule: Uniform | MinVariance | TopK
    reduce: Reduce = "mean"
    window: int | None = None

    def __str__(self) -> str:
        return str(self.rule) + ("" if self.reduce == "mean" else f", reduce={self.reduce}")

    @property
    def identity(self) -> str:
        """Text that differs between compressions, for the keys of caches."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def windows(self, rows: int) -> list[int]:
        """Return the number of rows of each window of an audio."""
        if self.window is None:
            return [rows]
        full, rest = divmod(rows, self.window)
        return [self.window] * full + ([rest] if rest else [])

    def count(self, rows: int) -> int:
        """Return the number of tokens of an audio of ``rows`` rows."""
        return sum(int(self.rule.num_segments(length)) for length in self.windows(rows))

    def pool(self, audios: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Pool the rows of all audios in one call, without waiting for the device.

        Args:
            audios: Rows of each audio, ``[N, D]``.

        Returns:
            The tokens of each audio, ``[M, D]``, where ``M`` is ``count(N)``.

        Raises:
            RuntimeError: The number of segments differs from the number of placeholders.
        """
        audios = tuple(audios)
        if not audios:
            return ()
        lengths = [length for rows in audios for length in self.windows(len(rows))]
        counts = [int(self.rule.num_segments(length)) for length in lengths]
        rows = audios[0] if len(audios) == 1 else torch.cat(audios)
        offsets, wanted = (
            torch.tensor([0, *sizes]).cumsum(0).int().to(rows.device, non_blocking=True) for sizes in (lengths, counts)
        )
        pooled = segment_pool(rows.contiguous(), self.rule, cu_seqlens=offsets, reduce=self.reduce, compact=False)
        # vLLM drops surplus tokens without an error.
        torch._assert_async(
            (pooled.cu_seqlens == wanted).all(),
            f"fastcompress: {self} made numbers of tokens that differ from those of the prompts",
        )
        sizes = [self.count(len(rows)) for rows in audios]
        return pooled.values[: sum(sizes)].split(sizes)


def find(config: Any) -> Any:
    """Return the value of the key ``fastcompress`` of a configuration or of its ``thinker_config``, or ``None``."""
    found = getattr(config, "fastcompress", None)
    return getattr(getattr(config, "thinker_config", None), "fastcompress", None) if found is None else found


def read(config: Any, family: Family) -> Compression | None:
    """Read the compression of a model.

    Args:
        config: Configuration of the model. Its key ``fastcompress`` is what ``apply_to`` saves with the weights. Only
            the field ``rule`` is necessary.
        family: Family of the model.

    Returns:
        The compression; ``None`` if there is no such key.

    Raises:
        NotImplementedError: vLLM cannot serve the family or the rule, or lacks a part with which the model was saved.
        ValueError: The value of the key is invalid.
    """
    data = find(config)
    if data is None:
        return None
    # This module imports transformers, which costs seconds in a process that loads no model.
    from fastcompress.decoder.saved_rule import KEY, VERSION, SavedRule

    if isinstance(data, Mapping):
        data = {"version": VERSION, "mode": "budget", "before_projector": False, **data}
    saved = SavedRule.from_dict(data)
    otherwise = " or pool outside of vLLM and pass audio_embeds (docs/serving.md)" if family.embeds else ""
    if family.refused:
        raise NotImplementedError(
            f"{family.title} cannot be compressed in vLLM: {family.refused}; remove {KEY} from its config.json"
            + (f",{otherwise}" if otherwise else "")
        )
    if saved.rule is None:
        raise NotImplementedError(
            f"{KEY} names the module {saved.compressor}, which vLLM cannot run; use a rule"
            + (f",{otherwise}" if otherwise else "")
        )
    rule = Rule.from_string(saved.rule)
    if not isinstance(rule, COUNTED):
        raise NotImplementedError(
            f"vLLM counts the tokens of an audio before it runs the encoder, but with the rule {rule} their number "
            "depends on the audio; use uniform, min-variance or top-k" + (f",{otherwise}" if otherwise else "")
        )
    _check_parts(saved, rule)
    reduce = cast(Reduce, saved.reduce or "mean")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce of {KEY} must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return Compression(rule, reduce, None if family.window is None else family.window(config))


def _check_parts(saved: Any, rule: Rule) -> None:
    """Raise an error if a model was saved with a part that vLLM lacks."""
    lacking = {
        "proportional attention": saved.proportional_attention,
        "positions in time": saved.positions == "time",
        "pooling before the projector": saved.before_projector,
        "a setting of silence": saved.silence is not None,
    }
    found = [part for part, asked in lacking.items() if asked]
    if found:
        kept = {"rule": str(rule)} | ({} if saved.reduce in (None, "mean") else {"reduce": saved.reduce})
        raise NotImplementedError(
            f"the model was saved with {' and '.join(found)}, which vLLM does not have; to serve it without, at a cost "
            f"in accuracy, pass --hf-overrides '{json.dumps({'fastcompress': kept})}'"
        )
