"""Configuration of the reference audio LLM."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fastcompress.ops.pack import POSITIONS
from fastcompress.ops.segment_reduce import REDUCTIONS
from fastcompress.rules import LabelChange, Rule

#: Values of ``audio_padding``.
PADDINGS = ("window", "longest")
#: Values of ``keys``.
KEYS = ("frames", "ctc")
#: Values of ``boundary_kind``.
BOUNDARIES = ("h-net", "cif")


class FastCompressConfig(PreTrainedConfig):
    """Configure [`FastCompressForConditionalGeneration`][].

    Args:
        audio_config: Configuration of the speech encoder, as a transformers object or a dict; ``None``: Whisper's
            default.
        text_config: Configuration of the decoder, in the same form; ``None``: Qwen2's default.
        rule: Text form of the compression rule, such as ``"uniform:3"``; ``None``: every frame is kept. The labels of
            ``label-change`` are the most likely units of the CTC head.
        reduce: Reduction of a segment, as in [`fastcompress.segment_reduce`][]: ``"mean"``, ``"first"``, ...
        keys: Vectors whose distances the rule uses: ``"frames"``, the encoder's, or ``"ctc"``, the CTC head's
            probabilities.
        proportional_attention: Whether a token of ``L`` frames weighs as much as its frames in the decoder's attention:
            ``log(L)`` is added to its scores.
        positions: ``"time"``: a token has the position of its segment's middle frame, and the text that follows has the
            position that it has without compression. ``"compact"``: rows are numbered 0, 1, 2, ...
        audio_token_id: Id of the audio token; ``input_ids`` have one per audio.
        projector_hidden_size: Width of the projector's hidden layer; ``None``: the projector is one linear layer.
        train_encoder: Whether the encoder is trained. A frozen encoder always stays in evaluation mode.
        normalize_features: Whether to subtract the mean of each audio's features and multiply the result by 2, which
            reduces the effect of level and recording. Only for encoders trained with it.
        audio_padding: ``"window"``: pad to the encoder's window, as Whisper was trained. ``"longest"``: pad to the
            longest audio of the batch and mask the padding, for encoders trained on short audio.
        ctc_tokens: Units, such as phones, of an auxiliary CTC loss on the encoder. Unit ``i`` of the list has label
            ``i + 1``; 0 is the blank. ``None``: no CTC loss.
        ctc_weight: Weight of the CTC loss.
        boundary_ratio: Target ratio of learned boundaries, in frames per token; replaces ``rule``. ``None``: no
            boundaries are learned.
        boundary_kind: ``"h-net"`` ([`fastcompress.nn.LearnedBoundary`][]) or ``"cif"``
            ([`fastcompress.nn.IntegrateAndFire`][]).
        boundary_weight: Weight of the loss of learned boundaries.
        compressor: Class name of a custom module that replaces the rule
            ([`FastCompressForConditionalGeneration.use_compressor`][]). The module itself is not saved and must be
            set again after loading.
        part_dtypes: Dtype names of the submodules whose dtype differs from ``dtype``, such as ``{"language_model":
            "bfloat16"}``. ``save_pretrained`` sets it.

    Raises:
        TypeError: ``audio_config`` or ``text_config`` is neither a configuration nor a dict.
        ValueError: A setting has an unknown value, or two settings exclude each other.
    """

    model_type = "fastcompress"
    sub_configs: ClassVar[dict[str, Any]] = {"audio_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "packed"]

    def __init__(
        self,
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        rule: str | None = None,
        reduce: str = "mean",
        keys: str = "frames",
        proportional_attention: bool = False,
        positions: str = "compact",
        audio_token_id: int = 0,
        projector_hidden_size: int | None = None,
        train_encoder: bool = False,
        normalize_features: bool = False,
        audio_padding: str = "window",
        ctc_tokens: list[str] | None = None,
        ctc_weight: float = 1.0,
        boundary_ratio: float | None = None,
        boundary_kind: str = "h-net",
        boundary_weight: float = 0.1,
        compressor: str | None = None,
        part_dtypes: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.audio_config: PreTrainedConfig = _as_config("audio_config", audio_config, "whisper")
        self.text_config: PreTrainedConfig = _as_config("text_config", text_config, "qwen2")
        if rule is not None:
            rule = str(rule if isinstance(rule, Rule) else Rule.from_string(rule))
        for name, value, known in (
            ("audio_padding", audio_padding, PADDINGS),
            ("reduce", reduce, REDUCTIONS),
            ("keys", keys, KEYS),
            ("positions", positions, POSITIONS),
            ("proportional_attention", proportional_attention, (False, True)),
            ("boundary_kind", boundary_kind, BOUNDARIES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        if ctc_tokens is not None and not ctc_tokens:
            raise ValueError("ctc_tokens must hold at least one unit, got an empty list")
        if keys == "ctc" and not ctc_tokens:
            raise ValueError("keys='ctc' needs ctc_tokens, got None")
        if boundary_ratio is not None and rule is not None:
            raise ValueError(f"set boundary_ratio or rule, not both, got {boundary_ratio} and {rule!r}")
        if rule is not None and isinstance(Rule.from_string(rule), LabelChange) and not ctc_tokens:
            raise ValueError(f"rule {rule!r} needs ctc_tokens, got None")
        self.boundary_ratio = boundary_ratio
        self.boundary_kind = boundary_kind
        self.boundary_weight = boundary_weight
        self.compressor = compressor
        self.rule = rule
        self.reduce = reduce
        self.keys = keys
        self.proportional_attention = proportional_attention
        self.positions = positions
        self.audio_token_id = audio_token_id
        self.projector_hidden_size = projector_hidden_size
        self.train_encoder = train_encoder
        self.normalize_features = normalize_features
        self.audio_padding = audio_padding
        self.ctc_tokens = ctc_tokens
        self.ctc_weight = ctc_weight
        self.part_dtypes = part_dtypes
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        # Without an entry per submodule, transformers would reset these settings of models passed to from_parts.
        for name in ("attn_implementation", "experts_implementation"):
            if kwargs.get(name) is None:
                kwargs[name] = {part: {} for part in self.sub_configs}
        super().__init__(**kwargs)


def _as_config(name: str, config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    if config is None:
        return CONFIG_MAPPING[default]()
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(f"{name} must be a transformers configuration or a dict, got {type(config).__name__}")
    values = dict(config)
    kind = values.pop("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{name} has model_type {kind!r}, which the installed transformers does not know")
    return CONFIG_MAPPING[kind](**values)


def warn_of_missing_compressor(config: FastCompressConfig) -> None:
    """Warn if the model was saved with a custom compressor, which the checkpoint does not contain."""
    if config.compressor is not None:
        warnings.warn(
            f"this model was saved with compressor {config.compressor}, which the checkpoint does not contain; every "
            "frame is kept until use_compressor sets it again",
            stacklevel=4,
        )


AutoConfig.register(FastCompressConfig.model_type, FastCompressConfig, exist_ok=True)
