"""Table of the audio LLMs of transformers that can be compressed, and of those that cannot, with reasons.

All supported models merge audio into the embeddings of a prompt, in ``model.model``, and then call ``language_model``
once; the integration intercepts that call. The table lists the differences between the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

#: Versions of transformers that the tests cover: the first and later, but before the second.
TESTED = ("5.24", "5.25")
#: First version with which budget mode is tested; serving engines pin older versions than training does.
TESTED_BUDGET = "5.16"


@dataclass(frozen=True)
class Family:
    """Describe one audio LLM.

    Attributes:
        title: Common name of the model.
        tokens_per_second: Tokens per second of audio, before compression.
        lengths: Function of the inner model and the arguments of ``forward`` that returns the number of audio rows in
            each window of the features, ``[A]`` int64.
        window: Function of the configuration that returns the largest number of rows of a window; longer audio has
            several windows. ``None``: audio is not cut.
        budget: Place where budget mode pools the audio: "features" (the output of ``get_audio_features``), "merge"
            (the input of ``get_merged_audio_embeddings``) or "projector" (its output). ``None``: no budget mode.
        why_no_budget: Reason for the missing budget mode.
        why_not_before: Reason why frames cannot be pooled before the projector; empty: they can.
        features: Arguments of ``forward`` for audio.
        mask: Argument of ``forward`` with the mask of the features.
        time: Dimension of the features that is time.
        refused: Arguments of ``forward`` that are not supported with compression.
        prompt_ids: Whether ``generate`` gets the ids of the compressed prompt. False where the model computes
            positions from them.
        adapters_hear: Whether ``generate`` enables or disables adapters depending on whether there is audio.
    """

    title: str
    tokens_per_second: float
    lengths: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    window: Callable[[Any], int] | None = None
    budget: str | None = "features"
    why_no_budget: str = ""
    why_not_before: str = ""
    features: tuple[str, ...] = ("input_features",)
    mask: str = "input_features_mask"
    time: int = -1
    refused: tuple[str, ...] = ()
    prompt_ids: bool = True
    adapters_hear: bool = False


def _by_tower(mask: str) -> Callable[[Any, Mapping[str, Any]], Tensor]:
    """Return a ``lengths`` function that calls the encoder's method; ``mask`` is the name of the feature mask."""

    def lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
        return core.audio_tower._get_feat_extract_output_lengths(arguments[mask].sum(-1).long())[1]

    return lengths


def _glmasr_lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
    frames = (arguments["input_features_mask"].sum(-1).long() - 1) // 2 + 1
    return (frames - 4) // 4 + 1


def _voxtral_lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
    features = arguments["input_features"]
    return torch.full((features.shape[0],), _voxtral_window(core.config), device=features.device)


def _voxtral_window(config: Any) -> int:
    audio = config.audio_config
    return audio.max_source_positions * audio.hidden_size // audio.intermediate_size


def _qwen3_asr_lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
    mask, tower = arguments["input_features_mask"], core.audio_tower
    chunks = mask.view(mask.shape[0], -1, 2 * tower.n_window).sum(-1).long()
    return tower._post_cnn_length(chunks).sum(-1)


def _vibevoice_lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
    samples, mask = arguments["input_values"], arguments.get("padding_mask")
    hop = core.config.acoustic_tokenizer_encoder_config.hop_length
    count = torch.full((len(samples),), samples.shape[-1], device=samples.device) if mask is None else mask.sum(-1)
    return (count + hop - 1) // hop


def _mask_lengths(core: Any, arguments: Mapping[str, Any]) -> Tensor:
    return arguments["input_features_mask"].sum(-1).long()


_PICTURES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_encoder_outputs")
_MARKERS = "it puts time markers between the placeholders of one audio"
_ADAPTOR = "its adaptor attends between frames"
_QFORMER = "its projector attends to frames in windows of a fixed size"
_GRANITE: dict[str, Any] = {"budget": "merge", "why_not_before": _QFORMER, "adapters_hear": True, "time": 1}
_FLAMINGO: dict[str, Any] = {
    "lengths": _by_tower("input_features_mask"),
    "window": lambda c: c.audio_config.max_source_positions // 2,
}

#: By ``model.config.model_type``.
FAMILIES: dict[str, Family] = {
    "qwen2_audio": Family(
        "Qwen2-Audio", 25, lengths=_by_tower("feature_attention_mask"), budget="projector",
        mask="feature_attention_mask",
    ),
    "audioflamingo3": Family("Audio Flamingo 3", 25, **_FLAMINGO),
    "musicflamingo": Family(
        "Music Flamingo", 25, **_FLAMINGO | {"budget": None},
        why_no_budget="it computes timestamps from the number of placeholders and checks them against the encoder's",
    ),
    "voxtral": Family("Voxtral", 12.5, lengths=_voxtral_lengths, window=_voxtral_window),
    "glmasr": Family(
        "GLM-ASR", 12.5, lengths=_glmasr_lengths, window=lambda c: c.audio_config.max_position_embeddings // 4,
    ),
    "granite_speech": Family("Granite Speech", 10, **_GRANITE),
    "granite_speech_plus": Family("Granite Speech Plus", 10, **_GRANITE),
    "qwen2_5_omni_thinker": Family(
        "Qwen2.5-Omni (thinker)", 25, budget=None, prompt_ids=False,
        why_no_budget="it computes positions of audio from the length of its features",
        why_not_before="its projector is inside the encoder",
        mask="feature_attention_mask", refused=_PICTURES,
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3-Omni (thinker)", 13, budget=None, prompt_ids=False,
        why_no_budget="it computes positions of audio from the length of its features",
        why_not_before="its projector is inside the encoder",
        mask="feature_attention_mask", refused=_PICTURES,
    ),
    "qwen3_asr": Family("Qwen3-ASR", 13, lengths=_qwen3_asr_lengths),
    "fun_asr_nano": Family("Fun-ASR-Nano", 16.7, lengths=_mask_lengths, why_not_before=_ADAPTOR, time=1),
    "vibevoice_asr": Family(
        "VibeVoice-ASR", 7.5, lengths=_vibevoice_lengths, features=("input_values",), mask="padding_mask",
        why_not_before="its projector combines the outputs of two encoders",
    ),
    "moss_transcribe_diarize": Family(
        "MOSS-Transcribe-Diarize", 12.5, budget=None, why_no_budget=_MARKERS, why_not_before=_MARKERS,
    ),
}  # fmt: skip

_CODEC = "it models streams of discrete codes and has no frames to pool"
#: Reasons why other models cannot be compressed, by ``model_type``.
REFUSED: dict[str, str] = {
    "voxtral_realtime": "it adds audio to the text embeddings step by step and has no rows of audio to pool",
    "kyutai_speech_to_text": _CODEC,
    "csm": _CODEC,
    "higgs_audio_v2": _CODEC,
    "moshi": _CODEC,
    "gemma3n": "its decoder has further inputs per row (per_layer_inputs), which would also have to be pooled",
    "gemma4": "its attention masks depend on the type of each row (mm_token_type_ids)",
    "gemma4_unified": "its attention masks depend on the type of each row (mm_token_type_ids)",
    "phi4_multimodal": "it has no separate language_model that takes merged embeddings",
    "qwen2_5_omni": "its talker needs one thinker state per row of the uncompressed prompt; compress model.thinker",
    "qwen3_omni_moe": "its talker needs one thinker state per row of the uncompressed prompt; compress model.thinker",
    "nemo_speechlm": "its generation keeps encoder states outside of the prompt",
}


def check_version(mode: str) -> None:
    """Warn if transformers is newer than the tested versions.

    Raises:
        ImportError: transformers is older than the tested versions of this mode.
    """
    import warnings

    first = TESTED_BUDGET if mode == "budget" else TESTED[0]
    version, oldest, newest = (
        tuple(int(part) for part in text.split(".")[:2]) for text in (transformers.__version__, first, TESTED[1])
    )
    if version < oldest:
        raise ImportError(
            f"{mode} mode needs transformers {first} or later, got {transformers.__version__}: install a newer one"
            + ("" if mode == "budget" else f", or use budget mode, which needs {TESTED_BUDGET}")
        )
    if version >= newest:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the tested versions ({TESTED[0]} to before "
            f"{TESTED[1]}); check that the rule uniform:1 reproduces the stock model",
            stacklevel=3,
        )


def family_of(model: Any) -> Family:
    """Return the family of a model.

    Raises:
        NotImplementedError: The model is not supported. The message has the reason where it is known.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind in REFUSED:
        raise NotImplementedError(f"{kind} cannot be compressed: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise NotImplementedError(
            f"{kind} is not a supported audio LLM; supported: {', '.join(sorted(FAMILIES))} "
            "(`fastcompress info --models` prints details)"
        )
    if not hasattr(model, "generate") or not hasattr(model, "model"):
        raise NotImplementedError(
            f"model must be the one with a head, such as Qwen2AudioForConditionalGeneration, got {type(model).__name__}"
        )
    return FAMILIES[kind]


def support() -> dict[str, dict[str, Any]]:
    """Return what is supported for each ``model_type``, and the reasons for what is not, as plain data."""
    found: dict[str, dict[str, Any]] = {
        kind: {
            "name": family.title,
            "tokens_per_second": family.tokens_per_second,
            "dynamic": True,
            "packed": True,
            "before_projector": not family.why_not_before,
            "why_not_before": family.why_not_before or None,
            "budget": family.budget is not None,
            "why_no_budget": family.why_no_budget or None,
        }
        for kind, family in FAMILIES.items()
    }
    found["whisper"] = {
        "name": "Whisper",
        "tokens_per_second": 50,
        "dynamic": True,
        "packed": False,
        "before_projector": True,
        "why_not_before": None,
        "budget": False,
        "why_no_budget": "its prompt has no audio",
    }
    return found | {kind: {"refused": reason} for kind, reason in REFUSED.items()}


def table() -> str:
    """Return [`support`][] as a text table."""
    from tabulate import tabulate

    columns = ("name", "tokens_per_second", "dynamic", "packed", "before_projector", "budget")
    header = ("model_type", "name", "tokens/s", "dynamic", "packed", "before projector", "budget")
    rows: list[tuple[str, ...]] = []
    notes, refused = [], []
    for kind, found in support().items():
        if "refused" in found:
            refused.append(f"{kind}: {found['refused']}")
            continue
        cells = [found[column] for column in columns]
        rows.append((kind, *(("yes" if c else "no") if isinstance(c, bool) else f"{c}" for c in cells)))
        notes += [f"{kind}: no budget, {found['why_no_budget']}"] if not found["budget"] else []
        notes += [f"{kind}: not before the projector, {found['why_not_before']}"] if found["why_not_before"] else []
    lines = tabulate(rows, header, "plain", disable_numparse=True)
    tested = f"tested with transformers {TESTED[0]} to before {TESTED[1]}; packed where all layers are attention"
    return "\n".join([lines, "", tested, *notes, "", "refused:", *refused])
