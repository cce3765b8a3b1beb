"""Configuration of the reference audio LLM."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fastcompress.ops.segment_reduce import REDUCTIONS
from fastcompress.rules import LabelChange, Rule

#: How audio that is shorter than a window of its encoder is padded.
PADDINGS = ("window", "longest")
#: Between what a rule takes distances.
KEYS = ("frames", "ctc")
#: How boundaries are learned.
BOUNDARIES = ("h-net", "cif")


class FastCompressConfig(PreTrainedConfig):
    """Configuration of :class:`FastCompressForConditionalGeneration`.

    Args:
        audio_config: of the speech encoder, a configuration of transformers or its dict; ``None``: Whisper's.
        text_config: of the decoder likewise; ``None``: Qwen2's.
        rule: text form of the compression rule, such as ``"uniform:3"``; ``None``: every frame of the encoder is kept.
            ``label-change`` takes the most likely unit of the CTC head.
        boundary_ratio: frames a token that boundaries which are learned aim at, in place of a rule; ``None``: nothing
            is learned.
        boundary_kind: how: ``"h-net"``, :class:`fastcompress.nn.LearnedBoundary`, or ``"cif"``,
            :class:`fastcompress.nn.IntegrateAndFire`.
        boundary_weight: of their loss.
        compressor: name of a module that compresses in place of a rule
            (:meth:`FastCompressForConditionalGeneration.use_compressor`): whoever loads the model has to give it again.
        reduce: what a segment becomes, as in :func:`fastcompress.segment_reduce`: ``"mean"``, ``"first"``, ...
        keys: between what the rule takes distances: ``"frames"`` of the encoder, or ``"ctc"``, the CTC head's
            probabilities of them.
        audio_token_id: the id that stands for an audio in ``input_ids``, one for each.
        projector_hidden_size: width of the hidden layer between encoder and decoder; ``None``: one linear layer.
        train_encoder: whether the encoder is trained; else it is frozen and never in training mode.
        normalize_features: whether the mean of each audio's features is removed and what is left doubled: level and
            recording then matter less. Not for encoders that were trained without.
        audio_padding: ``"window"``: to the window of the encoder, as Whisper was trained; ``"longest"``: to the longest
            of the batch, padding masked, for encoders that were trained here on short audio.
        ctc_tokens: units, such as phones, of an auxiliary CTC loss on the encoder, 1 to their number beside the blank
            0; ``None``: no such loss.
        ctc_weight: of that loss.
        part_dtypes: names of the dtypes of the model's parts that are not in ``dtype``, such as ``{"language_model":
            "bfloat16"}``; ``save_pretrained`` sets it.
    """

    model_type = "fastcompress"
    sub_configs: ClassVar[dict[str, Any]] = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        rule: str | None = None,
        reduce: str = "mean",
        keys: str = "frames",
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
            ("boundary_kind", boundary_kind, BOUNDARIES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if ctc_tokens is not None and not ctc_tokens:
            raise ValueError("ctc_tokens must hold at least one unit, got none")
        if keys == "ctc" and not ctc_tokens:
            raise ValueError("keys 'ctc' need ctc_tokens")
        if boundary_ratio is not None and rule is not None:
            raise ValueError(f"boundary_ratio excludes a rule, got {boundary_ratio} and {rule!r}")
        if rule is not None and isinstance(Rule.from_string(rule), LabelChange) and not ctc_tokens:
            raise ValueError(f"rule {rule!r} needs ctc_tokens")
        self.boundary_ratio = boundary_ratio
        self.boundary_kind = boundary_kind
        self.boundary_weight = boundary_weight
        self.compressor = compressor
        self.rule = rule
        self.reduce = reduce
        self.keys = keys
        self.audio_token_id = audio_token_id
        self.projector_hidden_size = projector_hidden_size
        self.train_encoder = train_encoder
        self.normalize_features = normalize_features
        self.audio_padding = audio_padding
        self.ctc_tokens = ctc_tokens
        self.ctc_weight = ctc_weight
        self.part_dtypes = part_dtypes
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        for name in ("attn_implementation", "experts_implementation"):  # or those of models at hand would be cleared
            if kwargs.get(name) is None:
                kwargs[name] = {part: {} for part in self.sub_configs}
        super().__init__(**kwargs)


def _as_config(name: str, config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    if config is None:
        return CONFIG_MAPPING[default]()
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(f"{name} must be a configuration of transformers or a dict, got {type(config).__name__}")
    values = dict(config)
    kind = values.pop("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{name} has model_type {kind!r}, which this transformers does not know")
    return CONFIG_MAPPING[kind](**values)


def warn_of_missing_compressor(config: FastCompressConfig) -> None:
    """Of a model that was saved with a compressor of somebody's own."""
    if config.compressor is not None:
        warnings.warn(
            f"this model was compressed by {config.compressor}, which is not saved with it: without use_compressor "
            "every frame is kept",
            stacklevel=4,
        )


AutoConfig.register(FastCompressConfig.model_type, FastCompressConfig, exist_ok=True)
