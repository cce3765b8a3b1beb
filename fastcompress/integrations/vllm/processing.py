"""The part of the plug-in that runs in vLLM's front end: prompts with fewer placeholders per audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from fastcompress.integrations.vllm import settings
from fastcompress.integrations.vllm.families import Family
from fastcompress.integrations.vllm.settings import Compression

Base: Any = object  # the mixins below precede a class of vLLM

#: Argument of ``embed_multimodal``: the number of placeholders of each audio, ``[B]`` int64.
ANNOUNCED = "fastcompress_tokens"


class CompressedInfo(Base):
    """Mixin for ``BaseProcessingInfo``."""

    fastcompress_family: ClassVar[Family]

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.compression = settings.read(ctx.model_config.hf_config, self.fastcompress_family)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any = None) -> Mapping[str, int] | None:
        """Return the largest number of tokens per item.

        Without this method, vLLM would accept more audio than it profiled.
        """
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        if self.compression is None or not most or "audio" not in most:
            return most
        return {**most, "audio": self.compression.count(most["audio"])}


class CompressedProcessor(Base):
    """Mixin for ``BaseMultiModalProcessor`` with a ``CompressedInfo``."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        compression = self.info.compression
        if compression is None:
            return updates
        if self.info.ctx.get_merged_mm_kwargs(hf_processor_mm_kwargs).get("use_audio_in_video"):
            raise ValueError(
                "use_audio_in_video is not supported with compression, since the tokens of audio and video alternate; "
                "pass the audio as an item of its own, or serve the model without the key fastcompress"
            )
        if {"audio_embeds", "audio_num_tokens"} & set(out_mm_kwargs.get_data()):
            return updates
        return [
            replace(update, replacement=_shortened(update.replacement, compression))
            if update.modality == "audio"
            else update
            for update in updates
        ]

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        """Return the updates of each item, and pass the number of its placeholders on to the model."""
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if self.info.compression is not None:
            for item, (update, *_) in zip(out_mm_kwargs.get("audio", ()), updates.get("audio", ()), strict=True):
                count = self._count_placeholders(update.content)
                item[ANNOUNCED] = MultiModalFieldElem(
                    data=torch.tensor(count), field=MultiModalBatchedField(keep_on_cpu=True)
                )
        return updates

    def _count_placeholders(self, details: PromptUpdateDetails) -> int:
        return len(_places(details))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Return the cache keys of each item. They depend on the rule, so that servers may share caches."""
        hashes = super()._get_mm_hashes(inputs)
        compression = self.info.compression
        if compression is None or "audio" not in hashes:
            return hashes
        return {**hashes, "audio": [f"{found}-{compression.identity}" for found in hashes["audio"]]}


class CompressedExpandedProcessor(CompressedProcessor):
    """Mixin for a processor whose prompts already have all placeholders, which mistral_common writes."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        return super(CompressedProcessor, self)._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    def _count_placeholders(self, details: PromptUpdateDetails) -> int:
        return len(_places(shorten(details, self.info.compression)))

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        """Find the placeholders in the prompt, and remove surplus ones."""
        ids, placeholders = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        compression = self.info.compression
        if compression is None or "audio" not in placeholders:
            return ids, placeholders
        kept: list[int] = []
        moved: list[Any] = []
        end = 0
        for audio in sorted(placeholders["audio"], key=lambda found: found.start_idx):
            kept += ids[end : audio.start_idx]
            end = audio.start_idx + len(audio.tokens)
            tokens = shorten(PromptUpdateDetails(audio.tokens), compression).full
            moved.append(replace(audio, start_idx=len(kept), tokens=tokens))
            kept += tokens
        return [*kept, *ids[end:]], {**placeholders, "audio": moved}


def _shortened(content: Any, compression: Compression) -> Callable[[int], PromptUpdateDetails]:
    """Return the content of a prompt update with fewer placeholders, as a function of the item's index."""

    def resolve(index: int) -> PromptUpdateDetails:
        found = content(index) if callable(content) else content
        return shorten(
            found if isinstance(found, PromptUpdateDetails) else PromptUpdateDetails.from_seq(found), compression
        )

    return resolve


def shorten(details: PromptUpdateDetails, compression: Compression) -> PromptUpdateDetails:
    """Shorten the placeholders of one audio.

    Raises:
        ValueError: The rule drops the whole audio.
        RuntimeError: Other tokens are between the placeholders.
    """
    places = _places(details)
    rows = len(places)
    if rows and places[-1] - places[0] + 1 != rows:
        raise RuntimeError(f"the {rows} placeholders of an audio must be adjacent, got the places {list(places)}")
    tokens = compression.count(rows)
    if not tokens:
        raise ValueError(
            f"the audio is too short for the rule {compression}: it has {rows} rows and would get no token"
        )
    full = list(details.full)
    return replace(details, full=full[: places[0] + tokens] + full[places[0] + rows :])


def _places(details: PromptUpdateDetails) -> Sequence[int]:
    """Return the places of the tokens that embeddings replace."""
    if details.is_embed is None:
        return range(len(details.full))
    return details.is_embed(list(details.full)).nonzero()[:, 0].tolist()
