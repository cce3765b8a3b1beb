"""Calls of ops from their public functions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from fastcompress import checks
from fastcompress.dispatch import backends

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Op(Protocol[Result_co]):
    """An overload of ``torch.ops``, which is untyped, with the type of its result."""

    def __call__(self, *args: Any) -> Result_co: ...

    def name(self) -> str: ...


def call(op: Op[Result], args: tuple[Any, ...], needs_grad: bool, explain: Callable[[], None]) -> Result:
    """Call an op, choose the backend at the first CUDA tensor, and explain errors.

    If no gradient is needed, the call skips the autograd key, whose Python formula costs microseconds. It does not skip
    it under a transform of ``torch.func``, because wrapped tensors do not show whether they need a gradient.

    Args:
        op: The op.
        args: Its arguments. The first must be a tensor.
        needs_grad: Whether autograd must record the call.
        explain: Function to call after a kernel has rejected its input; it raises an error that names the argument and
            the value.
    """
    if torch.compiler.is_compiling():
        if args[0].is_cuda:
            backends.settle()
        return op(*args)
    if backends.undecided and args[0].is_cuda:
        backends.settle()
    if torch.autograd.forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    try:
        if needs_grad or torch._C._functorch.peek_interpreter_stack() is not None:
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError as error:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            with contextlib.suppress(RuntimeError):  # values of wrapped tensors cannot be read
                explain()
            _explain_under_transform(op.name().removeprefix("fastcompress::"), error)
        if not checks.is_captured(args[0]):
            explain()
        raise


def _explain_under_transform(name: str, error: RuntimeError) -> NoReturn:
    """Raise an error with the reason why an op failed under a transform of ``torch.func``."""
    text = str(error)
    of_kernel = re.match(r"\w+, .*?:\d+, (.*)", text)  # function, file and line, message
    if of_kernel is not None and not of_kernel[1].startswith("out of memory"):
        raise ValueError(of_kernel[1]) from error
    if text.startswith("stack expects each tensor to be equal size"):
        raise ValueError(
            f"{name} found different numbers of segments in the samples of vmap: pass compact=False"
        ) from error
    raise NotImplementedError(
        f"{name} does not support this transform of torch.func; use torch.autograd.grad instead"
    ) from error


def _refuse_tangents(op: Op[Any], args: tuple[Any, ...]) -> None:
    """Raise if an input has a tangent: the ops have no forward-mode derivative, and PyTorch would ignore it."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(arg).tangent is not None:
            name = op.name().removeprefix("fastcompress::")
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd); use torch.autograd.grad instead"
            )


def differentiable_once(backward: str) -> None:
    """Make differentiating the op ``backward`` an error; otherwise PyTorch would return zeros."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"fastcompress: {backward.removesuffix('_backward')} has first-order gradients only")

    torch.library.register_autograd(f"fastcompress::{backward}", refuse)
