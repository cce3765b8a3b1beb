"""Table of the audio LLMs of vLLM that can be compressed, and of those that cannot, with reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Minor version of vLLM that the tests cover.
TESTED = "0.32"


@dataclass(frozen=True)
class Family:
    """Describe the model class of one family in vLLM.

    Attributes:
        title: Common name of the model.
        module: Module in ``vllm.model_executor.models``.
        architectures: Names in ``config.json`` under which vLLM registers the class.
        name: Name of the class; empty: that of the only architecture.
        method: Method of the class that returns the rows of each audio.
        expanded: Whether the prompt has all placeholders before vLLM's processor receives it.
        window: Function of the configuration that returns the number of rows of a full window; longer audio has several
            windows, which are pooled separately. ``None``: audio is not cut.
        embeds: Whether vLLM takes ``audio_embeds`` for this family.
        refused: Reason why the family cannot be compressed; empty: it can.
    """

    title: str
    module: str
    architectures: tuple[str, ...]
    name: str = ""
    method: str = "_process_audio_input"
    expanded: bool = False
    window: Callable[[Any], int] | None = None
    embeds: bool = False
    refused: str = ""

    @property
    def class_name(self) -> str:
        """Name of the class in the module."""
        return self.name or self.architectures[0]


def _ultravox_window(config: Any) -> int:
    return -(-config.audio_config.max_source_positions // config.stack_factor)


FAMILIES = (
    Family("Qwen2-Audio", "qwen2_audio", ("Qwen2AudioForConditionalGeneration",), embeds=True),
    Family(
        "GLM-ASR",
        "glmasr",
        ("GlmAsrForConditionalGeneration",),
        window=lambda config: config.audio_config.max_position_embeddings // 4,
        embeds=True,
    ),
    Family(
        "Audio Flamingo 3",
        "audioflamingo3",
        ("AudioFlamingo3ForConditionalGeneration",),
        window=lambda config: config.audio_config.max_source_positions // 2,
        embeds=True,
    ),
    Family("Granite Speech", "granite_speech", ("GraniteSpeechForConditionalGeneration",)),
    Family("Granite Speech Plus", "granite_speech_plus", ("GraniteSpeechPlusForConditionalGeneration",)),
    Family("Ultravox", "ultravox", ("UltravoxModel",), window=_ultravox_window, embeds=True),
    Family("Qwen3-ASR", "qwen3_asr", ("Qwen3ASRForConditionalGeneration",)),
    Family(
        "Voxtral",
        "voxtral",
        ("VoxtralForConditionalGeneration",),
        method="embed_multimodal",
        expanded=True,
        window=lambda config: config.audio_config.max_source_positions // config.audio_config.downsample_factor,
    ),
    Family(
        "Qwen2.5-Omni (thinker)",
        "qwen2_5_omni_thinker",
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
        name="Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    Family(
        "Qwen3-Omni (thinker)",
        "qwen3_omni_moe_thinker",
        ("Qwen3OmniMoeForConditionalGeneration",),
        name="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
)

_MARKERS = "it puts time markers between the placeholders of one audio"
_STREAMS = "it adds audio to the prompt step by step"

#: Families whose classes raise an error if their configuration has the key ``fastcompress``.
REFUSED = (
    Family(
        "MOSS-Transcribe-Diarize",
        "moss_transcribe_diarize",
        ("MossTranscribeDiarizeForConditionalGeneration",),
        embeds=True,
        refused=_MARKERS,
    ),
    Family("MOSS-Audio", "moss_audio", ("MossAudioModel",), refused=_MARKERS),
    Family("Fun-ASR", "funasr", ("FunASRForConditionalGeneration",), refused="this plug-in does not cover it yet"),
    Family("Voxtral Realtime", "voxtral_realtime", ("VoxtralRealtimeGeneration",), refused=_STREAMS),
    Family("Qwen3-ASR Realtime", "qwen3_asr_realtime", ("Qwen3ASRRealtimeGeneration",), refused=_STREAMS),
)
