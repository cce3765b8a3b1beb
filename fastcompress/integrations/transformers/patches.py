"""Replace methods of single objects, and restore them.

A replacement is a bound method, so that a deep copy of a model gets its own, bound to the copy. It has the signature of
the method it replaces, because transformers, ``Trainer`` and pipelines inspect signatures.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Attribute of a patched object: a dict of its former instance attributes by method name; ``None``: the class's method.
_BEFORE = "_fastcompress_before"


def copies(module: Any) -> list[Any]:
    """Return a module; if peft wrapped it (``modules_to_save``), the original and the copy of each adapter."""
    if not hasattr(module, "modules_to_save"):
        return [module]
    return [module.original_module, *module.modules_to_save.values()]


def replace(target: Any, name: str, function: Callable[..., Any], like: Callable[..., Any] | None = None) -> None:
    """Replace a method of an object.

    Args:
        target: Object whose method is replaced.
        name: Name of the method.
        function: Replacement, called as ``function(self, *args, **kwargs)``.
        like: Bound method whose signature the replacement gets; ``None``: that of the replaced method.
    """
    before = target.__dict__.setdefault(_BEFORE, {})
    current = getattr(target, name)
    before[name] = target.__dict__.get(name)  # libraries such as accelerate also set instance methods

    # The replacements inspect signatures and tensor values, and dynamo would inline the original recursively.
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
    """Return the replaced method, bound to ``target``."""
    before = target.__dict__[_BEFORE][name]
    return before if before is not None else getattr(type(target), name).__get__(target)


def restore(*targets: Any) -> None:
    """Restore all replaced methods of objects.

    Raises:
        RuntimeError: Other code replaced a method again in the meantime. Nothing is restored, since restoring would
            drop that replacement, or undoing it later would restore ours.
    """
    for target in targets:
        for name in target.__dict__.get(_BEFORE, {}):
            if not hasattr(getattr(target.__dict__.get(name), "__func__", None), "of_fastcompress"):
                raise RuntimeError(
                    f"{name} of {type(target).__name__} was replaced after apply_to (for example by a hook of "
                    "accelerate); remove that replacement first"
                )
    for target in targets:
        for name, before in target.__dict__.pop(_BEFORE, {}).items():
            if before is None:
                del target.__dict__[name]
            else:
                target.__dict__[name] = before


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    signature = inspect.signature(method)
    bound = signature.bind_partial(*args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found
