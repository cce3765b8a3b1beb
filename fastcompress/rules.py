"""Segmentation rules: how boundaries are chosen.

A rule is a frozen dataclass. In this file, ``d[t]`` is the distance between frames ``t`` and ``t + 1`` of one sequence
(``fastcompress.adjacent_distance``). A *boundary* at frame ``t`` means that frame ``t`` starts a segment; the first
frame of every sequence always does.

A rule has a text form, ``"local-max:order=2,min_len=3"`` (``Rule.from_string``, ``str(rule)``), for command lines
and configuration files, and a dict form (``Rule.from_dict``, ``Rule.to_dict``) for JSON.
``fastcompress/reference/select_boundaries.py`` defines the boundaries of a rule; ``csrc/rule.h`` is its compiled form.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fastcompress.rule_fields import check_bool, take_float, take_int, take_length, take_lengths

#: Number of frames after which ``MinVariance`` begins a new block: those that the encoder of Whisper makes of 30 s.
MIN_VARIANCE_BLOCK = 1500


@dataclass(frozen=True)
class Rule:
    """Base class of all rules. Use one of its subclasses."""

    name: ClassVar[str] = ""
    #: True if the rule reads distances.
    needs_distance: ClassVar[bool] = True
    #: True if boundaries are computed by tensor operations on scalars (``fastcompress/ops/scalar_rules.py``), not by
    #: the kernels.
    scalar: ClassVar[bool] = False

    @property
    def fused(self) -> bool:
        """True if one kernel can compute distances, boundaries and means in a single pass with this rule."""
        return not self.scalar

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        """Return the rule as op arguments: name, size, threshold, prominence, min_len, max_len (0: none), keep_tail."""
        raise NotImplementedError(f"{type(self).__name__} must implement op_args to be passed to a kernel")

    def __str__(self) -> str:
        parts = []
        for position, field in enumerate(dataclasses.fields(self)):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(str(value) if position == 0 else f"{field.name}={value}")
            elif value != field.default:
                parts.append(f"{field.name}={value}")
        return ":".join([self.name, ",".join(parts)]) if parts else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the dict form, ``{"rule": name, field: value, ...}``, which [`from_dict`][] reads."""
        return {"rule": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Rule:
        """Make a rule from its dict form, as [`to_dict`][] returns it.

        Args:
            data: The name under ``"rule"``, and fields. Missing fields keep their defaults.

        Raises:
            TypeError: If ``data`` is not a dict.
            ValueError: If the rule or a field is unknown, or a value is invalid.
        """
        if not isinstance(data, dict):
            raise TypeError(f"data must be a dict, got {data!r}")
        if "rule" not in data:
            raise ValueError(f"data must have a 'rule', one of {', '.join(RULES)}, got {data!r}")
        fields = dict(data)
        cls = _rule_class(fields.pop("rule"))
        known = _field_names(cls)
        for key in fields:
            if key not in known:
                raise ValueError(f"rule {cls.name!r} has no field {key!r}; its fields are {', '.join(known)}")
        for key in known:
            if key not in fields and not hasattr(cls, key):  # a field with a default is an attribute of the class
                value = 3 if cls.__annotations__[key] == "int" else 0.15
                raise ValueError(f"rule {cls.name!r} needs {key}, as in '{cls.name}:{value}'")
        return cls(**fields)

    @staticmethod
    def from_string(text: str) -> Rule:
        """Make a rule from its text form.

        Args:
            text: ``name``, ``name:value`` (the value of the first field) or ``name:field=value,field=value``.

        Raises:
            TypeError: If ``text`` is not a string.
            ValueError: If the rule or a field is unknown, or a value is invalid.

        Examples:
            >>> Rule.from_string("uniform:3")
            Uniform(size=3, tail='keep')
            >>> str(Rule.from_string("local-max:order=2,min_len=3"))
            'local-max:order=2,min_len=3'
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {text!r}")
        name, _, rest = text.strip().partition(":")
        fields = _field_names(_rule_class(name.strip()))
        given: dict[str, Any] = {}
        for position, item in enumerate(rest.split(",") if rest.strip() else []):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                if position:
                    raise ValueError(f"rule {text!r}: {item.strip()!r} must have the form field=value")
                key, value = fields[0], key
            if key in given:
                raise ValueError(f"rule {text!r}: field {key!r} is given twice")
            given[key] = _parse_value(value)
        if "rule" in given:
            raise ValueError(f"rule {text!r} has no field 'rule'")
        return Rule.from_dict({"rule": name.strip(), **given})


def _field_names(cls: type[Rule]) -> list[str]:
    """Return the names of ``dataclasses.fields``, which ``torch.compile`` cannot trace."""
    return list(cls.__match_args__)


def _parse_value(text: str) -> Any:
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if "_" in text:  # int() and float() would ignore it, as in "1_000"
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class Uniform(Rule):
    """Start a segment every ``size`` frames, counted from the first frame of each sequence.

    With mean pooling this is average pooling with stride ``size``.

    Args:
        size: Frames per segment, at least 1.
        tail: What to do with the last segment if it has fewer than ``size`` frames. ``"keep"`` it (the number of
            segments is rounded up, as in Ultravox) or ``"drop"`` its frames (rounded down, as in SLAM-LLM and
            ``AvgPool1d``).

    Examples:
        >>> Uniform(4).num_segments(10)
        3
    """

    size: int
    tail: Literal["keep", "drop"] = "keep"

    name: ClassVar[str] = "uniform"
    needs_distance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        take_int(self, "size", 1)
        if self.tail not in ("keep", "drop"):
            raise ValueError(f"Uniform: tail must be 'keep' or 'drop', got {self.tail!r}")

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        return (self.name, self.size, 0.0, 0.0, 1, 0, self.tail == "keep")

    def num_segments(self, length: Any) -> Any:
        """Return the number of segments of a sequence.

        Args:
            length: Frames of the sequence, an int; or of several sequences, an integer tensor of any shape and dtype.

        Returns:
            An int, or a tensor of the shape and dtype of ``length``.

        Raises:
            TypeError: If ``length`` is neither an int nor an integer tensor.
            ValueError: If an int is negative. The values of a tensor are not read.
        """
        frames = take_length(length)
        if not isinstance(length, torch.Tensor):
            return (frames + self.size - 1) // self.size if self.tail == "keep" else frames // self.size
        count = frames // self.size
        if self.tail == "keep":
            count = count + (frames % self.size > 0)  # adding size - 1 could overflow
        return count.to(length.dtype)


@dataclass(frozen=True)
class LocalMax(Rule):
    """Start a segment after each strict local maximum of the distance (Bhati et al., arXiv 2511.20973).

    ``d[t]`` is a peak, and frame ``t + 1`` starts a segment, if ``d[t] > d[s]`` for every other ``s`` in
    ``[t - order, t + order]`` inside the sequence. The first and the last distance of a sequence are never peaks. The
    peaks are those of ``scipy.signal.argrelextrema(d, np.greater, order=order, mode="clip")``. A comparison with NaN is
    false.

    Args:
        order: Number of distances compared on each side, at least 1.
        threshold: Lower limit of a peak: ``d[t] > threshold``, with the threshold rounded to the dtype of ``d``.
        prominence: Smallest ``scipy.signal.peak_prominences`` of a peak, computed in fp64. With a prominence, pooling
            takes three passes (distances, boundaries, means) instead of one.
        normalize: If true, ``threshold`` and ``prominence`` apply to distances scaled to [0, 1] in each sequence by
            [`fastcompress.normalize_distance`][]; with a prominence this is Kreuk et al. (arXiv 2007.13465). Pooling
            takes three passes.
        min_len: Smallest length of a segment in frames, at least 1. Scanning from left to right, a boundary that would
            end a shorter segment is ignored. The last segment of a sequence may be shorter.
        max_len: Largest length of a segment in frames; longer segments are cut. ``None`` for no limit.

    Examples:
        >>> str(LocalMax(order=2, min_len=3))
        'local-max:order=2,min_len=3'
    """

    order: int = 1
    threshold: float | None = None
    prominence: float | None = None
    min_len: int = 1
    max_len: int | None = None
    normalize: bool = False

    name: ClassVar[str] = "local-max"

    def __post_init__(self) -> None:
        check_bool(self, "normalize")
        take_int(self, "order", 1)
        take_float(self, "threshold", optional=True)
        take_float(self, "prominence", optional=True)
        take_lengths(self)

    @property
    def fused(self) -> bool:
        return self.prominence is None and not self.normalize

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        if self.threshold == math.inf:
            return _cut_only(self.max_len)
        threshold = finite(-math.inf if self.threshold is None else self.threshold)  # every distance is above -inf
        prominence = 0.0 if self.prominence is None else finite(self.prominence)  # 0 accepts every peak
        return (self.name, self.order, threshold, prominence, self.min_len, self.max_len or 0, True)


@dataclass(frozen=True)
class Threshold(Rule):
    """Start a segment wherever the distance exceeds a threshold: at frame ``t + 1`` if ``d[t] > threshold``.

    0.15 is AdaTS (which merges frames while the cosine is at least 0.85). 1.0 is the router of H-Net
    (arXiv 2507.07955) at its initial weights, which starts a segment where the cosine is negative.

    Args:
        threshold: Distance that a boundary must exceed; rounded to the dtype of ``d``.
        min_len: See [`LocalMax`][].
        max_len: See [`LocalMax`][].
    """

    threshold: float
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        take_float(self, "threshold")
        take_lengths(self)

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        if self.threshold == math.inf:
            return _cut_only(self.max_len)
        return (self.name, 1, finite(self.threshold), 0.0, self.min_len, self.max_len or 0, True)


@dataclass(frozen=True)
class TopK(Rule):
    """Cut each sequence into a given number of segments, at its largest distances.

    The ratio is met exactly. FastAdaSP (arXiv 2410.03007) merges the ``r`` most similar neighbours of ``T`` frames,
    which is ``TopK(count=T - r)``; so is one round of FastLongSpeech (arXiv 2507.14815). Of equal distances the earlier
    one is cut first; NaN is cut last.

    Args:
        rate: Frames per segment, at least 1: a sequence of ``T`` frames gets ``ceil(T / rate)`` segments.
        count: Segments per sequence, at least 1; a sequence of fewer frames gets one segment per frame. Exactly one of
            ``rate`` and ``count`` must be given.

    Examples:
        >>> TopK(rate=3.5).num_segments(10)
        3
    """

    rate: float | None = None
    count: int | None = None

    name: ClassVar[str] = "top-k"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_float(self, "rate", optional=True)
        take_int(self, "count", 1, optional=True)
        if (self.rate is None) == (self.count is None):
            raise ValueError(f"TopK: one of rate and count must be given, got rate={self.rate}, count={self.count}")
        if self.rate is not None and not 1 <= self.rate < math.inf:
            raise ValueError(f"TopK: rate must be at least 1 and finite, got {self.rate}")

    def num_segments(self, length: Any) -> Any:
        """Return the number of segments of a sequence; see [`Uniform.num_segments`][]."""
        frames = take_length(length)
        if not isinstance(length, torch.Tensor):
            return torch.sym_min(frames, self.count) if self.rate is None else math.ceil(frames / self.rate)
        count = frames.clamp_max(self.count) if self.rate is None else (frames.double() / self.rate).ceil()
        return count.to(length.dtype)


@dataclass(frozen=True)
class MinVariance(Rule):
    """Cut each sequence into segments of the smallest variance, at an exact rate.

    Of all segmentations of ``T`` frames into ``ceil(T / rate)`` segments of at most ``max_len`` frames, take the one
    with the smallest sum of squared distances of the L2-normalized frames to the mean of their segment. Of equal
    optima, take the one with the lexicographically smallest starts. Sequences of more than 1,500 frames are cut into
    blocks of 1,500 frames, and each block is optimal and has an exact count. A frame that is not finite is as far from
    every other frame as a zero frame is. ``fastcompress/reference/min_variance.py`` defines the order of operations.

    Args:
        rate: Frames per segment, from 1 to ``max_len``.
        max_len: Largest length of a segment in frames, at least 1. The time to find the segments is proportional to it.

    Examples:
        >>> MinVariance(rate=4).num_segments(10)
        3
    """

    rate: float = 4.0
    max_len: int = 8

    name: ClassVar[str] = "min-variance"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_float(self, "rate")
        take_int(self, "max_len", 1)
        if not 1 <= self.rate <= self.max_len:
            raise ValueError(f"MinVariance: rate must be between 1 and max_len, {self.max_len}, got {self.rate}")

    @property
    def window(self) -> int:
        """Number of later frames to which the distances of each frame are needed."""
        return max(1, min(self.max_len, MIN_VARIANCE_BLOCK) - 1)

    def num_segments(self, length: Any) -> Any:
        """Return the number of segments of a sequence; see [`Uniform.num_segments`][]."""
        frames = take_length(length)
        blocks, rest = frames // MIN_VARIANCE_BLOCK, frames % MIN_VARIANCE_BLOCK
        per_block = math.ceil(MIN_VARIANCE_BLOCK / self.rate)
        if isinstance(length, torch.Tensor):
            return (blocks * per_block + (rest.double() / self.rate).ceil().long()).to(length.dtype)
        return blocks * per_block + math.ceil(rest / self.rate)


@dataclass(frozen=True)
class LabelChange(Rule):
    """Start a segment wherever the label of a frame differs from the previous one (Gaido et al., EACL 2021).

    This is CTC compression if the labels are the most likely units of a CTC head. They are passed as ``labels=`` to
    [`fastcompress.segment_pool`][] or [`fastcompress.select_boundaries`][].

    Args:
        blank: Label whose frames are dropped, as in CJST (arXiv 2411.07607). Equal labels on both sides of a blank are
            two segments. ``None`` drops no frame, as in Gaido et al.
        min_len: See [`LocalMax`][]; applies to the frames that are kept.
        max_len: See [`LocalMax`][]; applies to the frames that are kept.
    """

    blank: int | None = None
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "label-change"
    needs_distance: ClassVar[bool] = False
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_int(self, "blank", -(2**63), optional=True)
        take_lengths(self)


@dataclass(frozen=True)
class Lookback(Rule):
    """Start a segment at a frame that is far from all recent frames of the open segment.

    This is Affinity Pooling (arXiv 2604.06871). Frame ``t`` joins the open segment if its distance to one of the last
    ``min(window, length)`` frames of that segment is at most ``threshold``; otherwise it starts a segment. A comparison
    with NaN is false.

    Memory: ``max(window, min_len, max_len)`` int64 per frame, where lengths above that of the longest sequence do not
    count. A ``max_len`` of thousands costs gigabytes on long batches.

    Args:
        window: Number of frames to look back, at least 1.
        threshold: Largest distance, 1 - cosine, of a frame that joins; 0.2 for the cosine of 0.8 in the paper.
        min_len: Smallest length of a segment in frames: a frame always joins a shorter segment.
        max_len: Largest length of a segment in frames: a frame never joins a segment of this length.
    """

    window: int
    threshold: float
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "lookback"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_int(self, "window", 1)
        take_float(self, "threshold")
        take_lengths(self)


@dataclass(frozen=True)
class PeakHeight(Rule):
    """Start a segment after each peak that is higher than its neighbours by a threshold.

    This is the boundary detector of Segmental CPC (Bhati et al., arXiv 2106.02170). ``d`` is first scaled to [0, 1] in
    each sequence ([`fastcompress.normalize_distance`][]). ``h_k[t]`` is the smaller of ``d[t] - d[t - k]`` and
    ``d[t] - d[t + k]``, clamped to at least 0; an index outside the sequence means its first or last distance. ``d[t]``
    is a peak, and frame ``t + 1`` starts a segment, if ``h_1[t] > 0`` and ``max(h_1[t], h_2[t]) > threshold``.

    Args:
        threshold: Height that a peak must exceed, in [0, 1]; 0.04 in the published code.
        min_len: See [`LocalMax`][].
        max_len: See [`LocalMax`][].
    """

    threshold: float = 0.04
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "peak-height"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_float(self, "threshold")
        take_lengths(self)


def _cut_only(max_len: int | None) -> tuple[str, int, float, float, int, int, bool]:
    """Return the op arguments of a rule whose threshold no distance exceeds: segments of ``max_len`` frames."""
    return (Uniform.name, max_len or 2**63 - 1, 0.0, 0.0, 1, 0, True)


def finite(value: float) -> float:
    """Return the finite float64 next to ``value``: AOTInductor cannot load a package with an infinite op argument."""
    limit = torch.finfo(torch.float64).max  # not a global, which a compiled graph would treat as a variable
    return min(max(float(value), -limit), limit)


def max_segments(rule: str, size: int, min_len: int, max_len: int, num_rows: int, num_sequences: int) -> int:
    """Return an upper bound of the number of segments of a batch without row groups.

    With row groups every row can be a segment, so the bound is ``num_rows``.

    Args:
        rule: Name of the rule, as in ``Rule.op_args()``; likewise ``size``, ``min_len`` and ``max_len``.
        num_rows: Rows of the batch.
        num_sequences: Sequences of the batch.
    """
    if rule == Uniform.name:
        return num_rows // size + num_sequences
    # Peaks are never adjacent and the first distance is never a peak, so every segment but the last has at least two
    # frames. A cut by max_len can be followed by a segment of one frame, but the cut segment itself has at least three.
    if rule == LocalMax.name and (max_len == 0 or max_len >= 3):
        min_len = max(2, min_len)
    return num_rows // min_len + num_sequences


_ALL = (Uniform, LocalMax, Threshold, TopK, MinVariance, LabelChange, Lookback, PeakHeight)
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in _ALL}


def _rule_class(name: Any) -> type[Rule]:
    if not isinstance(name, str) or name not in RULES:
        near = difflib.get_close_matches(str(name)[:80], RULES, n=1)
        hint = f"did you mean {near[0]}? The" if near else "the"
        raise ValueError(f"unknown rule {name!r}; {hint} rules are {', '.join(RULES)}")
    return RULES[name]


def as_rule(rule: Rule | str) -> Rule:
    """Return ``rule`` itself, or the rule of a text form."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        return Rule.from_string(rule)
    raise TypeError(f"rule must be a fastcompress.Rule or a string, got {type(rule).__name__}")
