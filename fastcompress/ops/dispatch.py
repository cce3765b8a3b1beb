"""How a wrapper calls an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastcompress._library  # noqa: F401  (the implementations)


def call(op: Callable[..., Any], args: tuple[Any, ...], needs_grad: bool, explain: Callable[[], None]) -> Any:
    """Calls ``op``, below the autograd key when no gradient is needed: the key's Python formula costs microseconds.

    ``explain`` runs when a kernel refuses its input, to raise an error that names the argument and the values.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if needs_grad:
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError:
        explain()
        raise


def differentiable_once(backward: str) -> None:
    """Makes differentiating the op ``backward`` an error; without this it would give zeros."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"fastcompress: {backward.removesuffix('_backward')} is differentiable once only")

    torch.library.register_autograd(f"fastcompress::{backward}", refuse)
