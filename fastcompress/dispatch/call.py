"""How a wrapper calls an op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from fastcompress.dispatch import backends

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Op(Protocol[Result_co]):
    """An overload of ``torch.ops``, which has no types, with that of its result."""

    def __call__(self, *args: Any) -> Result_co: ...

    def name(self) -> str: ...


def call(op: Op[Result], args: tuple[Any, ...], needs_grad: bool, explain: Callable[[], None]) -> Result:
    """Calls ``op``, below the autograd key when no gradient is needed: the key's Python formula costs microseconds.

    Not so under a transform of ``torch.func``, whose wrapped tensors do not tell whether they need one.

    ``args[0]`` is a tensor; if it is the first on CUDA, the backend is chosen. ``explain`` runs when a kernel refuses
    its input, to raise an error that names the argument and the values.
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
            name = op.name().removeprefix("fastcompress::")
            raise NotImplementedError(
                f"{name} does not run under this transform of torch.func; torch.autograd.grad does"
            ) from error
        explain()
        raise


def _refuse_tangents(op: Op[Any], args: tuple[Any, ...]) -> None:
    """The ops have no forward-mode derivatives; PyTorch would drop the tangents of their inputs without a word."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(arg).tangent is not None:
            name = op.name().removeprefix("fastcompress::")
            raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd)")


def differentiable_once(backward: str) -> None:
    """Makes differentiating the op ``backward`` an error; without this it would give zeros."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"fastcompress: {backward.removesuffix('_backward')} is differentiable once only")

    torch.library.register_autograd(f"fastcompress::{backward}", refuse)
