"""Segmentation rules: how boundaries are chosen.

A rule is a small frozen dataclass. ``d[t]`` below is the distance between frames ``t`` and ``t + 1`` of one sequence
(:func:`fastcompress.adjacent_distance`), and a *boundary* at frame ``t`` means that frame ``t`` starts a segment; the
first frame of every sequence does.

A rule has a text form, ``"local-max:order=2,min_len=3"`` (:meth:`Rule.from_string`, ``str(rule)``), for command lines
and configuration files, and a dict form (:meth:`Rule.from_dict`, :meth:`Rule.to_dict`) for JSON.
``fastcompress/reference/select_boundaries.py`` defines what a rule does; ``csrc/rule.h`` is its compiled form.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch

from fastcompress.checks import check_number, check_whole

#: Every distance is above it. It is finite because a package of AOTInductor does not load an infinity.
NO_THRESHOLD = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Rule:
    """Base of all rules; use one of its subclasses."""

    name: ClassVar[str] = ""
    #: Whether the rule reads distances at all.
    needs_distance: ClassVar[bool] = True
    #: Whether boundaries come from a few steps over scalars (``fastcompress/ops/scalar_rules.py``) and not from the
    #: kernels' state machine.
    scalar: ClassVar[bool] = False

    @property
    def fused(self) -> bool:
        """Whether one op scores, selects and reduces: Uniform, Threshold, and LocalMax without what it cannot do."""
        return not self.scalar

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        """The rule as the ops take it: name, size, threshold, prominence, min_len, max_len (0: none), keep_tail."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the ops take it")

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
        """``{"rule": name, field: value, ...}``; :meth:`from_dict` reads it back."""
        return {"rule": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Rule:
        """The rule that :meth:`to_dict` wrote; fields left out keep their defaults.

        Raises:
            TypeError: not a dict.
            ValueError: an unknown rule or field, or a value that the rule refuses.
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
                raise ValueError(f"rule {cls.name!r} has no field {key!r}; it has {', '.join(known)}")
        try:
            return cls(**fields)
        except TypeError as error:  # a field without a default is missing
            raise ValueError(f"rule {cls.name!r}: {error}") from None

    @staticmethod
    def from_string(text: str) -> Rule:
        """Reads ``name``, ``name:value`` (the first field) or ``name:field=value,field=value``.

        Raises:
            TypeError: not a string.
            ValueError: an unknown rule or field, or a value that does not fit.

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
                    raise ValueError(f"rule {text!r}: {item.strip()!r} is not field=value")
                key, value = fields[0], key
            if key in given:
                raise ValueError(f"rule {text!r}: field {key!r} is given twice")
            given[key] = _parse_value(value)
        if "rule" in given:
            raise ValueError(f"rule {text!r} has no field 'rule'")
        return Rule.from_dict({"rule": name.strip(), **given})


def _field_names(cls: type[Rule]) -> list[str]:
    """Those of ``dataclasses.fields``, which ``torch.compile`` cannot trace."""
    return list(cls.__match_args__)


def _parse_value(text: str) -> Any:
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if "_" in text:  # which int() and float() would read past
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check_int(rule: Rule, field: str, minimum: int, optional: bool = False) -> None:
    check_whole(f"{type(rule).__name__}: {field}", getattr(rule, field), minimum, optional)


def _check_float(rule: Rule, field: str, optional: bool = False) -> None:
    value = getattr(rule, field)
    if optional and value is None:
        return
    try:
        check_number(f"{type(rule).__name__}: {field}", value)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _check_bool(rule: Rule, field: str) -> None:
    if not isinstance(getattr(rule, field), bool):
        raise ValueError(f"{type(rule).__name__}: {field} must be True or False, got {getattr(rule, field)!r}")


def _check_lengths(rule: LocalMax | Threshold | LabelChange | Lookback | PeakHeight) -> None:
    _check_int(rule, "min_len", 1)
    _check_int(rule, "max_len", 1, optional=True)
    min_len, max_len = rule.min_len, rule.max_len
    if max_len is not None and min_len > max_len:
        raise ValueError(f"{type(rule).__name__}: min_len must not exceed max_len, got {min_len} > {max_len}")


def _check_length(length: Any) -> None:
    if isinstance(length, torch.Tensor):
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            raise TypeError(f"length must be an integer or a tensor of integers, got {length.dtype}")
    elif isinstance(length, bool) or not isinstance(length, (Integral, torch.SymInt)):
        raise TypeError(f"length must be an integer or a tensor of integers, got {length!r}")
    elif not torch.compiler.is_compiling() and length < 0:  # a traced number may depend on data
        raise ValueError(f"length must not be negative, got {length}")


@dataclass(frozen=True)
class Uniform(Rule):
    """A segment every ``size`` frames, counted from the first frame of each sequence (average pooling, stride = size).

    Args:
        size: frames a segment, at least 1.
        tail: what happens to the last segment when fewer than ``size`` frames are left: ``"keep"`` it short (ceil, as
            Ultravox does by padding) or ``"drop"`` its frames (floor, as SLAM-LLM and ``AvgPool1d`` do).
    """

    size: int
    tail: str = "keep"

    name: ClassVar[str] = "uniform"
    needs_distance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_int(self, "size", 1)
        if self.tail not in ("keep", "drop"):
            raise ValueError(f"Uniform: tail must be 'keep' or 'drop', got {self.tail!r}")

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        return (self.name, self.size, 0.0, 0.0, 1, 0, self.tail == "keep")

    def num_segments(self, length: Any) -> Any:
        """Segments of a sequence of ``length`` frames, an int or an integer tensor.

        Raises:
            TypeError: ``length`` is neither.
            ValueError: a negative int; the values of a tensor are not read.
        """
        _check_length(length)
        return (length + self.size - 1) // self.size if self.tail == "keep" else length // self.size


@dataclass(frozen=True)
class LocalMax(Rule):
    """A boundary after each strict local maximum of the distance (Bhati et al., arXiv 2511.20973).

    ``d[t]`` is a peak, and frame ``t + 1`` starts a segment, iff ``d[t] > d[s]`` for every other ``s`` in
    ``[t - order, t + order]`` inside the sequence; the first and the last distance of a sequence are never peaks. This
    is ``scipy.signal.argrelextrema(d, np.greater, order=order, mode="clip")``. A comparison with NaN is false.

    Args:
        order: distances compared on each side, at least 1.
        threshold: a peak also needs ``d[t] > threshold`` (rounded to the dtype of ``d``, as torch compares).
        prominence: a peak also needs at least this ``scipy.signal.peak_prominences``, computed in fp64. The fused
            kernel does not do this: distances, selection and reduction run one after the other.
        normalize: threshold and prominence are of distances scaled to [0, 1] in each sequence (Kreuk et al.,
            arXiv 2007.13465, with a prominence): :func:`fastcompress.normalize_distance`. Not fused either.
        min_len: a boundary closer than this to the last one is ignored, left to right; at least 1.
        max_len: a segment that reaches this length is cut. The last segment of a sequence may be shorter than
            ``min_len``.
    """

    order: int = 1
    threshold: float | None = None
    prominence: float | None = None
    min_len: int = 1
    max_len: int | None = None
    normalize: bool = False

    name: ClassVar[str] = "local-max"

    def __post_init__(self) -> None:
        _check_bool(self, "normalize")
        _check_int(self, "order", 1)
        _check_float(self, "threshold", optional=True)
        _check_float(self, "prominence", optional=True)
        _check_lengths(self)

    @property
    def fused(self) -> bool:
        return self.prominence is None and not self.normalize

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        threshold = NO_THRESHOLD if self.threshold is None else max(float(self.threshold), NO_THRESHOLD)
        prominence = 0.0 if self.prominence is None else float(self.prominence)  # every peak has a positive one
        return (self.name, self.order, threshold, prominence, self.min_len, self.max_len or 0, True)


@dataclass(frozen=True)
class Threshold(Rule):
    """A boundary wherever the distance exceeds a threshold: ``d[t] > threshold`` starts a segment at ``t + 1``.

    0.15 is AdaTS (merge while the cosine is at least 0.85); 1.0 is H-Net's router at its initial weights (a negative
    cosine).

    Args:
        threshold: compared strictly, after rounding to the dtype of ``d``, as torch compares.
        min_len, max_len: as in :class:`LocalMax`.
    """

    threshold: float
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        _check_float(self, "threshold")
        _check_lengths(self)

    def op_args(self) -> tuple[str, int, float, float, int, int, bool]:
        return (self.name, 1, float(self.threshold), 0.0, self.min_len, self.max_len or 0, True)


@dataclass(frozen=True)
class TopK(Rule):
    """So many segments a sequence, cut where the distance is largest: a target rate, kept exactly.

    FastAdaSP (arXiv 2410.03007) merges the ``r`` most similar neighbours of ``T`` frames; that is to keep the
    ``T - 1 - r`` largest distances as boundaries, ``TopK(count=T - r)``. One round of FastLongSpeech
    (arXiv 2507.14815) is the same. Ties go to the lower index; NaN comes last.

    Args:
        rate: frames a segment: a sequence of ``T`` frames gets ``ceil(T / rate)`` segments; at least 1.
        count: segments of each sequence, or as many as it has frames; at least 1. One of the two must be given.
    """

    rate: float | None = None
    count: int | None = None

    name: ClassVar[str] = "top-k"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_float(self, "rate", optional=True)
        _check_int(self, "count", 1, optional=True)
        if (self.rate is None) == (self.count is None):
            raise ValueError(f"TopK: one of rate and count must be given, got {self.rate} and {self.count}")
        if self.rate is not None and not 1 <= self.rate < math.inf:
            raise ValueError(f"TopK: rate must be at least 1 and finite, got {self.rate}")

    def num_segments(self, length: Any) -> Any:
        """As :meth:`Uniform.num_segments`."""
        _check_length(length)
        if self.count is not None:
            least = torch.clamp_max if isinstance(length, torch.Tensor) else torch.sym_min
            return least(length, self.count)
        assert self.rate is not None  # one of the two is given
        if isinstance(length, torch.Tensor):
            return (length.double() / self.rate).ceil().to(length.dtype)
        return math.ceil(length / self.rate)


@dataclass(frozen=True)
class LabelChange(Rule):
    """A boundary wherever the label of a frame differs from the one before (CTC compression: Gaido et al., EACL 2021).

    The labels, such as the most likely unit of a CTC head, are given with the call: ``labels=`` of
    :func:`fastcompress.segment_pool` and :func:`fastcompress.select_boundaries`.

    Args:
        blank: frames of this label are dropped (as in CJST, arXiv 2411.07607); equal labels on both sides of one stay
            two segments. ``None``: it is a label like any other, as in the paper.
        min_len, max_len: as in :class:`LocalMax`, of what is left.
    """

    blank: int | None = None
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "label-change"
    needs_distance: ClassVar[bool] = False
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_int(self, "blank", -(2**63), optional=True)
        _check_lengths(self)


@dataclass(frozen=True)
class Lookback(Rule):
    """A frame joins its segment if it is close to one of the segment's last frames (Affinity Pooling,
    arXiv 2604.06871).

    Frame ``t`` joins iff the distance to one of the last ``min(window, length)`` frames of the open segment is at most
    ``threshold``; else it starts a segment. A comparison with NaN is false.

    Args:
        window: frames looked back at, at least 1.
        threshold: the largest distance, 1 - cosine: 0.2 for the paper's cosine of 0.8.
        min_len, max_len: a frame joins a segment shorter than ``min_len``, and none that has ``max_len``.

    The scan over all frames at once keeps ``max(window, min_len, max_len)`` int64 a frame (lengths beyond the longest
    sequence are not counted): a ``max_len`` of thousands costs gigabytes on long batches.
    """

    window: int
    threshold: float
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "lookback"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_int(self, "window", 1)
        _check_float(self, "threshold")
        _check_lengths(self)


@dataclass(frozen=True)
class PeakHeight(Rule):
    """A boundary after each peak that stands out from its neighbours (Segmental CPC: Bhati et al., arXiv 2106.02170).

    With ``d`` scaled to [0, 1] in each sequence (:func:`fastcompress.normalize_distance`), ``h_k[t]`` is the smaller of
    ``d[t] - d[t - k]`` and ``d[t] - d[t + k]``, or 0 if that is negative; beyond the ends of a sequence stands its
    first or last distance. ``d[t]`` is a peak, and frame ``t + 1`` starts a segment, iff ``h_1[t] > 0`` and
    ``max(h_1[t], h_2[t]) > threshold``.

    Args:
        threshold: 0.04 in the published code.
        min_len, max_len: as in :class:`LocalMax`.
    """

    threshold: float = 0.04
    min_len: int = 1
    max_len: int | None = None

    name: ClassVar[str] = "peak-height"
    scalar: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_float(self, "threshold")
        _check_lengths(self)


def max_segments(rule: str, size: int, min_len: int, max_len: int, num_rows: int, num_sequences: int) -> int:
    """Upper bound of the number of segments of ``num_rows`` frames in ``num_sequences`` sequences without row groups.

    The first four are of ``Rule.op_args()``. With row groups every row can be a segment: ``num_rows`` is the bound.
    """
    if rule == Uniform.name:
        return num_rows // size + num_sequences
    # Peaks are never adjacent and the first distance is none, so every segment but the last has two frames; a forced
    # cut of three or more frames makes up for the one-frame segment that can follow it.
    if rule == LocalMax.name and (max_len == 0 or max_len >= 3):
        min_len = max(2, min_len)
    return num_rows // min_len + num_sequences


_ALL = (Uniform, LocalMax, Threshold, TopK, LabelChange, Lookback, PeakHeight)
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in _ALL}


def _rule_class(name: Any) -> type[Rule]:
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"unknown rule {name!r}; the rules are {', '.join(RULES)}")
    return RULES[name]


def as_rule(rule: Rule | str) -> Rule:
    """``rule`` itself, or the rule that a string names."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        return Rule.from_string(rule)
    raise TypeError(f"rule must be a fastcompress.Rule or a string, got {type(rule).__name__}")
