"""Settings of ``fastcompress train`` and ``fastcompress finetune``, declared once.

Each class is a group of ``--help``. Its annotations are the types, its defaults the defaults, and its docstring the
help texts of flags and YAML keys (``fastcompress.training.parsing``). A setting that ``transformers.TrainingArguments``
also has is named as it is there. This module imports neither transformers nor accelerate, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastcompress.ops.pack import POSITIONS
from fastcompress.ops.segment_reduce import Reduce
from fastcompress.rules import Rule

#: Texts, and what ``--help`` shows for their values.
Folder = Annotated[str, "FOLDER"]
Model = Annotated[str, "MODEL"]
Manifest = Annotated[str, "MANIFEST"]
RuleText = Annotated[str, "RULE"]


class SettingsError(ValueError):
    """A setting cannot be used. The message is one line, with the names of settings in backticks."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all groups. A group checks its values in ``__post_init__``.

    Raises:
        SettingsError: A value cannot be used.
    """

    group: ClassVar[str]
    #: Settings whose flag can be repeated; the values are joined by spaces.
    repeated: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, hint in type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise SettingsError(f"`{name}` must be one of {', '.join(get_args(hint))}, got {value!r}")
            if isinstance(value, float) and math.isnan(value):
                raise SettingsError(f"`{name}` must be a number, got nan")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise SettingsError(f"`{name}` must be less than 2**63")

    @classmethod
    def groups(cls) -> dict[str, list[str]]:
        """Return the names of the settings in each group, in the order of ``--help`` and ``run.yaml``."""
        classes = [c for c in cls.__mro__ if issubclass(c, Settings) and hasattr(c, "group")]
        found: dict[str, list[str]] = {c.group: [] for c in classes if c is not cls}
        declared: set[str] = set()
        names = {field.name for field in fields(cls)}
        for c in reversed(classes):
            for name in vars(c).get("__annotations__", {}):
                if name in names and name not in declared:
                    found[c.group].append(name)
                    declared.add(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name, in the order of ``groups``."""
        return {name: getattr(self, name) for names in self.groups().values() for name in names}

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"`{name}` must be at least {least}, got {value}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise SettingsError(f"`{name}` must be more than 0, got {getattr(self, name)}")


def type_hints(cls: type[Settings]) -> dict[str, Any]:
    """Return the types of the settings of a class by name, without metavars."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


# Groups that both commands have


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Input and output of a run.

    Attributes:
        output_dir: Folder of the run.
        data: Manifest to train on.
        dev: Development manifest.
        max_seconds: Skip audio that is longer, in seconds.
    """

    group: ClassVar[str] = "data"

    output_dir: Folder
    data: Manifest
    dev: Manifest | None = None
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("output_dir", "data"):
            if not getattr(self, name):
                raise SettingsError(f"`{name}` is missing")
        self._check_positive("max_seconds")


@dataclass(frozen=True, kw_only=True)
class CompressionSettings(Settings):
    """Compression of audio frames into tokens.

    Attributes:
        rule: Compression rule, such as uniform:3 or local-max; none keeps every frame.
        proportional_attention: Whether a token weighs as much as its frames in the decoder's attention; by default as
            the model was trained, and true if it was trained without compression; false in budget mode.
        positions: time gives a token the position of its middle frame, compact numbers the tokens; by default as the
            model was trained, and time if it was trained without compression; compact in budget mode.
    """

    group: ClassVar[str] = "compression"

    rule: RuleText | None = None
    proportional_attention: bool | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in (None, *POSITIONS):
            raise SettingsError(f"`positions` must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        for rule in self.rules:
            if rule != "none":
                try:
                    Rule.from_string(rule)
                except ValueError as error:
                    raise SettingsError(f"`rule`: {error}") from error

    @property
    def rules(self) -> list[str]:
        """Text forms of the rules."""
        return [] if self.rule is None else [self.rule]


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """LoRA on the decoder's attention and MLP.

    Attributes:
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter; it is divided by the rank.
        lora_dropout: Dropout of the adapter's input.
    """

    group: ClassVar[str] = "LoRA"

    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(0, "lora_rank", "lora_dropout")
        if not self.lora_dropout < 1:
            raise SettingsError(f"`lora_dropout` must be less than 1, got {self.lora_dropout}")


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(Settings):
    """Updates of the weights.

    Attributes:
        max_steps: Updates of the weights.
        per_device_train_batch_size: Utterances per process and batch.
        gradient_accumulation_steps: Batches per update.
        learning_rate: Highest learning rate.
        warmup_steps: Updates in which the learning rate rises from 0; a cosine follows.
        weight_decay: Weight decay of AdamW.
        adam_beta1: Decay of AdamW's first moment.
        adam_beta2: Decay of AdamW's second moment.
        max_grad_norm: Norm to which gradients are clipped.
        bf16: Compute in bfloat16. Trained weights and the moments of AdamW are in fp32 either way.
        gradient_checkpointing: Compute activations twice to save memory.
        seed: Seed of weights, order of examples, dropout and augmentation.
    """

    group: ClassVar[str] = "optimization"

    max_steps: int = 1000
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
        self._check_least(0, "warmup_steps", "weight_decay")
        self._check_positive("learning_rate", "max_grad_norm")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"`{name}` must be at least 0 and less than 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Checkpoints and log of a run.

    Attributes:
        save_steps: Updates between checkpoints.
        save_total_limit: Checkpoints to keep.
        logging_steps: Updates between lines of the log.
    """

    group: ClassVar[str] = "checkpoints and log"

    save_steps: int = 500
    save_total_limit: int = 2
    logging_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "save_total_limit", "logging_steps")
        self._check_least(0, "save_steps")


# fastcompress train


@dataclass(frozen=True, kw_only=True)
class TrainDataSettings(DataSettings):
    """Data of the reference model.

    Attributes:
        dev: Manifest whose loss is logged.
        cache: Keep features in memory.
        encode_once: Run a frozen encoder once per utterance and keep its frames; needs --no-augment.
    """

    cache: bool = True
    encode_once: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainModelSettings(Settings):
    """Source of the reference model. By default a small model with random weights is made for the data.

    Attributes:
        model: Folder of a model or run to start from.
        audio_model: Pretrained encoder, folder or name; needs --text-model.
        text_model: Pretrained decoder, folder or name; needs --audio-model.
        train_encoder: Train the encoder; by default if there is neither LoRA nor a pretrained encoder.
        audio_padding: Padding before the encoder: window, 30 s for Whisper, or longest; by default the model's.
    """

    group: ClassVar[str] = "model"

    model: Folder | None = None
    audio_model: Model | None = None
    text_model: Model | None = None
    train_encoder: bool | None = None
    audio_padding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audio_padding not in (None, "window", "longest"):
            raise SettingsError(f"`audio_padding` must be window or longest, got {self.audio_padding!r}")
        if (self.audio_model is None) != (self.text_model is None):
            given, missing = ("audio_model", "text_model")[:: 1 if self.text_model is None else -1]
            raise SettingsError(f"`{given}` needs `{missing}`")
        if self.model is not None and self.audio_model is not None:
            raise SettingsError("`model` excludes `audio_model` and `text_model`")


@dataclass(frozen=True, kw_only=True)
class TrainCompressionSettings(CompressionSettings):
    """Compression of the reference model.

    Attributes:
        rule: Compression rule, such as uniform:3 or local-max; none keeps every frame; by default the model's. If it is
            given several times, or is a text with spaces between rules, one is drawn for each batch; the trained model
            has the first.
        rate_warmup_steps: Updates in which the rates of the rules rise from 1.
        proportional_attention: Whether a token weighs as much as its frames in the decoder's attention; by default as
            the model was trained, and true if it was trained without compression; false in budget mode.
        positions: time gives a token the position of its middle frame, compact numbers the tokens; by default as the
            model was trained, and time if it was trained without compression; compact in budget mode.
        reduce: Reduction of a segment: mean, first, max, ...; by default the model's.
        keys: Vectors whose distances the rule uses: frames or ctc; by default the model's.
        boundary_ratio: Target of learned boundaries in frames per token; replaces the rule.
        boundary_kind: Kind of learned boundaries.
    """

    repeated: ClassVar[tuple[str, ...]] = ("rule",)

    rate_warmup_steps: int = 0
    reduce: str | None = None
    keys: str | None = None
    boundary_ratio: float | None = None
    boundary_kind: Literal["h-net", "cif"] = "h-net"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("reduce", get_args(Reduce)), ("keys", ("frames", "ctc"))):
            value = getattr(self, name)
            if value not in (None, *known):
                raise SettingsError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")
        if len(self.rules) > 1 and self.rules[0] == "none":
            raise SettingsError(f"`rule`: the first of several must not be none, got {self.rule!r}")
        self._check_least(0, "rate_warmup_steps")
        if self.rate_warmup_steps and self.rules in ([], ["none"]):
            raise SettingsError("`rate_warmup_steps` needs a `rule`")
        if self.boundary_ratio is None:
            return
        if not self.boundary_ratio > 1:
            raise SettingsError(f"`boundary_ratio` must be more than 1, got {self.boundary_ratio}")
        if self.rule not in (None, "none"):
            raise SettingsError(f"`boundary_ratio` excludes `rule`, got {self.boundary_ratio} and {self.rule!r}")

    @property
    def rules(self) -> list[str]:
        # Spaces next to a sign are inside a rule: "uniform: 3, tail=drop".
        return [] if self.rule is None else re.split(r"(?<![:,=\s])\s+(?![:,=\s])", self.rule.strip())


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """Distillation from another model.

    Attributes:
        teacher: Folder of a model or run whose next-token distributions are learned as well, with the compression that
            it was trained with.
        teacher_weight: Weight of the divergence from the teacher; that of the labels' cross entropy is 1.
    """

    group: ClassVar[str] = "distillation"

    teacher: Folder | None = None
    teacher_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("teacher_weight")


@dataclass(frozen=True, kw_only=True)
class TrainLoraSettings(LoraSettings):
    """LoRA of the reference model.

    Attributes:
        lora_rank: Rank of the adapter, which freezes all other weights; 0 trains the decoder in full.
        merge: Write the final model with the adapter merged into the decoder.
    """

    lora_rank: int = 0
    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainOptimizationSettings(OptimizationSettings):
    """Updates of the reference model.

    Attributes:
        warmup_steps: Updates in which the learning rate rises from 0; a cosine to --min-lr-rate follows.
        min_lr_rate: Last learning rate, as a share of the highest.
        projector_learning_rate: Highest learning rate of the projector; by default --learning-rate.
        augment: SpecAugment: mask features, warp voices and tempos.
    """

    min_lr_rate: float = 0.03
    projector_learning_rate: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(0, "min_lr_rate", "projector_learning_rate")


@dataclass(frozen=True, kw_only=True)
class TrainCheckpointSettings(CheckpointSettings):
    """Checkpoints and log of the reference model.

    Attributes:
        save_steps: Updates between checkpoints, a multiple of --logging-steps; 0 writes only the last.
        logging_steps: Updates between lines of log.csv.
        eval_steps: Updates between losses on --dev, a multiple of --logging-steps; 0 computes only the last.
    """

    eval_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(0, "eval_steps")
        for name in ("save_steps", "eval_steps"):  # otherwise a resumed run would log other means
            if getattr(self, name) % self.logging_steps:
                raise SettingsError(
                    f"`{name}` must be a multiple of `logging_steps` ({self.logging_steps}), got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(TrainOptimizationSettings, TrainCheckpointSettings):
    """Settings of ``fastcompress.training.trainer.Training``, which gets the model and the examples as arguments."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the highest."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.max_steps)))
        return rising * (falling * (1 - self.min_lr_rate) + self.min_lr_rate)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    TrainDataSettings,
    TrainModelSettings,
    TrainCompressionSettings,
    TeacherSettings,
    TrainLoraSettings,
    TrainerSettings,
):
    """Settings of ``fastcompress train``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encode_once and self.augment:
            raise SettingsError("`encode_once` excludes `augment`: frames that are kept cannot be augmented")


# fastcompress finetune


@dataclass(frozen=True, kw_only=True)
class FinetuneDataSettings(DataSettings):
    """Data of a stock audio LLM.

    Attributes:
        dev: Manifest that is scored at the end.
        prompt: Instruction for utterances whose manifest line has no prompt.
        max_new_tokens: Longest answer, in tokens, when --dev is scored.
        normalize: Normalization of answers and references before they are compared; whisper is for English.
    """

    max_seconds: float = 30.0
    prompt: str = "Transcribe the audio."
    max_new_tokens: int = 128
    normalize: Literal["none", "basic", "whisper"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class FinetuneModelSettings(Settings):
    """The stock audio LLM.

    Attributes:
        model: Folder or name of a stock audio LLM.
        train_projector: Train the projector in full.
    """

    group: ClassVar[str] = "model"

    model: Model
    train_projector: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise SettingsError("`model` is missing")


@dataclass(frozen=True, kw_only=True)
class FinetuneCompressionSettings(CompressionSettings):
    """Compression of a stock audio LLM.

    Attributes:
        rule: Compression rule, such as uniform:3 or local-max.
        proportional_attention: Whether a token weighs as much as its frames in the decoder's attention; by default as
            the model was trained, and true if it was trained without compression; false in budget mode.
        positions: time gives a token the position of its middle frame, compact numbers the tokens; by default as the
            model was trained, and time if it was trained without compression; compact in budget mode.
        mode: dynamic, or budget for engines that count audio tokens before they encode.
        before_projector: Pool the encoder's frames instead of the projector's.
    """

    rule: RuleText = "uniform:3"
    mode: Literal["dynamic", "budget"] = "dynamic"
    before_projector: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizationSettings(OptimizationSettings):
    """Updates of a stock audio LLM, with the values of ``transformers.TrainingArguments`` where the paper has none.

    Attributes:
        bf16: Keep frozen weights and compute in bfloat16. Trained weights and AdamW's moments are in fp32 either way.
    """

    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    bf16: bool = True
    gradient_checkpointing: bool = True


@dataclass(frozen=True, kw_only=True)
class FinetuneCheckpointSettings(CheckpointSettings):
    """Checkpoints and log of a stock audio LLM."""

    save_steps: int = 200


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(
    FinetuneDataSettings,
    FinetuneModelSettings,
    FinetuneCompressionSettings,
    LoraSettings,
    FinetuneOptimizationSettings,
    FinetuneCheckpointSettings,
):
    """Settings of ``fastcompress finetune``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "lora_rank", "save_steps")
