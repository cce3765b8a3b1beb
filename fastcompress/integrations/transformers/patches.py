"""Replacing methods of one object, and putting them back.

What replaces a method is a bound one, so that a deep copy of a model has its own; and it has the signature of what it
replaces, which transformers, ``Trainer`` and pipelines look at.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Of an object: what its methods were before, by name; ``None``: the class's.
_BEFORE = "_fastcompress_before"


def replace(target: Any, name: str, function: Callable[..., Any], like: Callable[..., Any] | None = None) -> None:
    """Makes ``function(self, *args, **kwargs)`` the method of an object.

    ``like`` is a bound method with the signature that it is to have; ``None``: that of what is replaced.
    """
    before = target.__dict__.setdefault(_BEFORE, {})
    current = getattr(target, name)
    before[name] = target.__dict__.get(name)  # set by others, such as accelerate

    # It looks at signatures and at values, and dynamo would find it again in its own original.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    @functools.wraps(current)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    del method.__wrapped__
    signature = inspect.signature(current if like is None else like)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    method.of_fastcompress = True
    target.__dict__[name] = types.MethodType(method, target)


def original(target: Any, name: str) -> Callable[..., Any]:
    """The method that was replaced."""
    before = target.__dict__[_BEFORE][name]
    return before if before is not None else getattr(type(target), name).__get__(target)


def restore(*targets: Any) -> None:
    """Puts back all methods of objects.

    Raises:
        RuntimeError: one was replaced again since, by something that would be lost, or would bring ours back; nothing
            is put back then.
    """
    for target in targets:
        for name in target.__dict__.get(_BEFORE, {}):
            if not hasattr(getattr(target.__dict__.get(name), "__func__", None), "of_fastcompress"):
                raise RuntimeError(
                    f"{name} of {type(target).__name__} was replaced after apply_to, such as by a hook of accelerate: "
                    "undo that first"
                )
    for target in targets:
        for name, before in target.__dict__.pop(_BEFORE, {}).items():
            if before is None:
                del target.__dict__[name]
            else:
                target.__dict__[name] = before


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    signature = inspect.signature(method)
    bound = signature.bind_partial(*args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found
