"""The part of the plug-in that runs in vLLM's workers: model classes that pool audio before the decoder.

A class is made at its first use, from the stock class of vLLM. ``register`` gives vLLM the names of these classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import vllm
from torch import Tensor
from vllm.logger import init_logger

from fastcompress.integrations.vllm import processing, settings
from fastcompress.integrations.vllm.families import FAMILIES, REFUSED, Family
from fastcompress.integrations.vllm.settings import Compression
from fastcompress.version import __version__

logger = init_logger("vllm.fastcompress")
Base: Any = object  # the mixins below precede a model class of vLLM


class CompressedModel(Base):
    """Mixin for a model class of vLLM: read the rule, and check the number of tokens of each audio."""

    fastcompress_family: ClassVar[Family]
    fastcompress: Compression | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        family = self.fastcompress_family
        compression = settings.read(vllm_config.model_config.hf_config, family)
        if compression is not None and getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
            raise NotImplementedError(
                "enable_tower_connector_lora is not supported with compression; merge the adapter into the weights"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.fastcompress = compression
        if compression is None:
            logger.info("fastcompress %s: %s runs without compression", __version__, family.title)
        else:
            logger.info(
                "fastcompress %s: %s runs with %s; 750 rows of audio take %d tokens",
                __version__,
                family.title,
                compression,
                compression.count(750),
            )

    def fastcompress_pool(self, rows: Any) -> Any:
        """Pool the rows of a list of audios, which is ``None`` or empty if there is no audio."""
        if self.fastcompress is None or rows is None or not len(rows):
            return rows
        return self.fastcompress.pool(rows)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode the items of one modality.

        Raises:
            RuntimeError: The number of tokens of an audio differs from the number of its placeholders. vLLM itself
                drops surplus tokens without an error.
        """
        announced = kwargs.pop(processing.ANNOUNCED, None)
        found = self.fastcompress_embed(kwargs)
        if self.fastcompress is None or announced is None or found is None:
            return found
        counts, wanted = [len(tokens) for tokens in found], [int(count) for count in announced]
        if counts != wanted:
            raise RuntimeError(
                f"fastcompress {self.fastcompress}: the audios have {counts} tokens, but their prompts have {wanted} "
                "placeholders; all processes of the engine must have the same configuration"
            )
        return found

    def fastcompress_embed(self, kwargs: dict[str, Any]) -> Any:
        """Call the stock method, which calls ``_process_audio_input``."""
        return super().embed_multimodal(**kwargs)


class PoolsAudioInput(CompressedModel):
    """Mixin for a model with ``_process_audio_input``, which returns the rows of each audio."""

    def _process_audio_input(self, audio_input: Any) -> Sequence[Tensor]:
        rows = super()._process_audio_input(audio_input)
        return rows if _kind(audio_input) == "audio_embeds" else self.fastcompress_pool(rows)


class PoolsEmbeddings(CompressedModel):
    """Mixin for a model whose ``embed_multimodal`` encodes audio and no other modality."""

    def fastcompress_embed(self, kwargs: dict[str, Any]) -> Any:
        return self.fastcompress_pool(super().fastcompress_embed(kwargs))


class CountsPositions(CompressedModel):
    """Mixin for a model that computes positions from the length of the features."""

    def _compute_audio_token_count(self, audio_feature_length: int) -> int:
        rows = int(super()._compute_audio_token_count(audio_feature_length))
        return rows if self.fastcompress is None else self.fastcompress.count(rows)


class CountsUsage(CompressedModel):
    """Mixin for a model that reports the number of tokens of a transcription's audio."""

    @classmethod
    def get_num_audio_tokens(cls, audio_duration_s: float, stt_config: Any, model_config: Any) -> int | None:
        rows = super().get_num_audio_tokens(audio_duration_s, stt_config, model_config)
        compression = settings.read(model_config.hf_config, cls.fastcompress_family)
        return rows if rows is None or compression is None else compression.count(int(rows))


def _kind(audio_input: Any) -> Any:
    """Return the type of a stock audio input; some have none."""
    return audio_input.get("type") if hasattr(audio_input, "get") else None


def _combine(name: str, *bases: Any, **attributes: Any) -> Any:
    return type(name, bases, {"__module__": __name__, **attributes})


def make(family: Family, name: str) -> Any:
    """Make the model class of a family, with the stock class as its base.

    If the stock class lacks what the plug-in extends, the result raises an error for models with the key
    ``fastcompress``.
    """
    stock = getattr(importlib.import_module(f"vllm.model_executor.models.{family.module}"), family.class_name)
    factories = stock.__dict__.get("_processor_factory")
    if not family.refused and (factories is None or not hasattr(stock, family.method)):
        missing = "_processor_factory" if factories is None else family.method
        reason = f"the class of vLLM {vllm.__version__} has no {missing}, which this fastcompress extends"
        family = replace(family, refused=reason)
    marked = {"fastcompress_family": family}
    if family.refused:
        return _combine(name, CompressedModel, stock, **marked)
    mixins: list[Any] = [PoolsEmbeddings if family.method == "embed_multimodal" else PoolsAudioInput]
    mixins += [CountsPositions] if hasattr(stock, "_compute_audio_token_count") else []
    mixins += [CountsUsage] if hasattr(stock, "get_num_audio_tokens") else []
    expanded = processing.CompressedExpandedProcessor if family.expanded else processing.CompressedProcessor
    replaced = replace(
        factories,
        info=_combine(f"{name}Info", processing.CompressedInfo, factories.info, **marked),
        processor=_combine(f"{name}Processor", expanded, factories.processor),
    )
    return _combine(name, *mixins, stock, **marked, _processor_factory=replaced)


def __getattr__(name: str) -> Any:
    """Return the model class ``<architecture>_vllm_<version>``."""
    architecture = name.partition("_vllm_")[0]
    for family in (*FAMILIES, *REFUSED):
        if architecture in family.architectures:
            globals()[name] = make(family, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
