"""Checks of the fields of rules. Numbers of other types, such as those of NumPy, become Python numbers.

Errors name the rule and the field.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from fastcompress.checks import as_number, as_whole


def _set(rule: Any, field: str, value: float | None) -> None:
    """Set a field of a frozen rule to its Python form. Dynamo cannot trace this, and never needs to."""
    if value is not getattr(rule, field):
        object.__setattr__(rule, field, value)


def take_int(rule: Any, field: str, minimum: int, optional: bool = False) -> None:
    """Check a field that is an integer of at least ``minimum``, or ``None`` if ``optional``."""
    value = getattr(rule, field)
    if not (optional and value is None):
        _set(rule, field, as_whole(f"{type(rule).__name__}: {field}", value, minimum))


def take_float(rule: Any, field: str, optional: bool = False) -> None:
    """Check a field that is a number, or ``None`` if ``optional``."""
    value = getattr(rule, field)
    if optional and value is None:
        return
    try:
        _set(rule, field, as_number(f"{type(rule).__name__}: {field}", value))
    except TypeError as error:
        raise ValueError(str(error)) from None


def check_bool(rule: Any, field: str) -> None:
    """Check a field that is a bool."""
    if not isinstance(getattr(rule, field), bool):
        raise ValueError(f"{type(rule).__name__}: {field} must be True or False, got {getattr(rule, field)!r}")


def take_lengths(rule: Any) -> None:
    """Check ``min_len`` and ``max_len``."""
    take_int(rule, "min_len", 1)
    take_int(rule, "max_len", 1, optional=True)
    min_len, max_len = rule.min_len, rule.max_len
    if max_len is not None and min_len > max_len:
        raise ValueError(f"{type(rule).__name__}: min_len must not exceed max_len, got {min_len} > {max_len}")


def take_length(length: Any) -> Any:
    """Check the length of a sequence, or a tensor of lengths; return a tensor as int64, so that no sum overflows."""
    if isinstance(length, torch.Tensor):
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            raise TypeError(f"length must be an integer or a tensor of integers, got {length.dtype}")
        return length.long()
    if type(length) not in (int, torch.SymInt):
        if isinstance(length, bool) or not isinstance(length, Integral):
            raise TypeError(f"length must be an integer or a tensor of integers, got {length!r}")
        length = int(length)
    if not torch.compiler.is_compiling() and length < 0:  # a traced length may be symbolic
        raise ValueError(f"length must not be negative, got {length}")
    return length
