"""Which implementation an op runs on: compiled kernels, Triton kernels or the reference.

The ops are ordinary dispatcher ops. The compiled library registers its own kernels, and the reference lies below them
on the alias key of every device. Any other choice is a set of Python kernels that is registered above the compiled ones
for as long as it holds: the default costs nothing at a call, and compiled graphs and exported programs follow.

The choice for CUDA tensors is made at the first call with one, and from then on at once when a block opens or closes.
Until then nothing here initialises CUDA, so that a process may fork after ``import fastcompress``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastcompress import reference
from fastcompress.dispatch.library import COMPILED, cuda_archs, cuda_version
from fastcompress.dispatch.schemas import LIBRARY

BACKENDS = ("cuda", "triton", "reference")
VARIABLE = "FASTCOMPRESS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """What an op runs on, ``"compiled"`` (CPU), ``"cuda"``, ``"triton"`` or ``"reference"``, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Device:
    """A CUDA device that this process sees."""

    name: str
    capability: tuple[int, int]


@dataclass(eq=False)
class _Request:
    backend: str
    source: str


#: Whether the first CUDA tensor still has to come. Read by ``ops/dispatch.py`` at every call.
undecided: bool = True

_settled = False  # whether there has been one
_lock = threading.RLock()
_requests: list[_Request] = []  # the last one holds
_override: torch.library.Library | None = None
_warned = False


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops on another backend inside a ``with`` block, or in a decorated function.

    ``"cuda"``: the compiled kernels. ``"triton"``: the Triton kernels. Both are about CUDA tensors; CPU tensors go
    on as they were, unless Triton's interpreter runs (``TRITON_INTERPRET=1``). ``"reference"``: pure PyTorch, on CPU
    tensors too. An op that a backend lacks runs on the reference. Without any choice CUDA tensors run on the compiled
    kernels if they fit the GPUs, else on Triton if it is installed, else on the reference.

    The choice is the process's, not the thread's: the innermost block that is still open holds, whoever opened it. Do
    not open or close one while another thread is inside an op. ``FASTCOMPRESS_BACKEND`` chooses for the whole process.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot be used here; the message says why. What depends on the GPU shows at the first call with
            a CUDA tensor, if there has been none yet. Or a function with the block inside is being compiled or
            exported.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("fastcompress.backend has no effect inside a compiled function: put it around the calls")
    request = _push(name, "fastcompress.backend")
    try:
        yield
    finally:
        with _lock:
            _requests.remove(request)
            _apply()


def _push(name: str, source: str) -> _Request:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    problem = {"cuda": _why_no_cuda, "triton": _why_no_triton}.get(name, lambda: None)()
    if problem:
        raise RuntimeError(f"{source}: the backend {name!r} cannot be used: {problem}")
    request = _Request(name, source)
    with _lock:
        _requests.append(request)
        try:
            _apply()
        except RuntimeError:  # the process knows its GPUs already, and it is none for them
            _requests.remove(request)
            _apply()
            raise
    return request


def _apply() -> None:
    """Makes the last request hold."""
    global undecided
    name = _requests[-1].backend if _requests else None
    undecided = name is None or name == "cuda"
    if name is not None and not undecided:
        _replace(_kernels(name), ("CUDA", "CPU") if _covers_cpu(name) else ("CUDA",))
    elif _settled:
        settle()
    elif _why_no_cuda() is None:
        _replace({name: _settle_first(name) for name in reference.OPS}, ("CUDA",))
    else:
        _replace({}, ())


def _replace(kernels: Mapping[str, Callable[..., Any]], keys: Iterable[str]) -> None:
    """Registers these kernels instead of those that were chosen before; none: the compiled ones show again."""
    global _override
    if _override is not None:
        _override._destroy()
    _override = override(kernels, keys) if kernels else None


def _settle_first(name: str) -> Callable[..., Any]:
    """Lies above a compiled kernel, which may not fit the GPU, until the choice is made: for the first call if it does
    not pass through ops/dispatch.py, such as that of an exported program."""
    op = getattr(torch.ops.fastcompress, name).default

    def run(*args: Any) -> Any:
        settle()
        return op(*args)

    return run


def settle() -> bool:
    """Chooses for CUDA tensors, now that there is one. Returns False when torch sees no CUDA device (a traced one)."""
    global _settled, _warned, undecided
    with _lock:
        if not undecided:
            return True
        if not cuda_devices():
            return False
        choice = _default()
        if _requests and choice.backend != "cuda":
            raise RuntimeError(f"{_requests[-1].source}: the backend 'cuda' cannot be used: {_why_not_here()}")
        _replace({} if choice.backend == "cuda" else _kernels(choice.backend), ("CUDA",))
        undecided, _settled = False, True
    if choice.backend == "reference" and not _warned:
        _warned = True
        warnings.warn(
            f"fastcompress: CUDA tensors run on the pure PyTorch reference, which is correct but slow: {choice.reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


# Tracing runs it instead of tracing it: torch.compiler.assume_constant_result, without the seconds of importing Dynamo.
settle._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo reads it of functions


def choices() -> dict[str, dict[str, Choice]]:
    """What each op runs on, on ``"cpu"`` and on ``"cuda"``, and why. Initialises CUDA."""
    asked = _requests[-1] if _requests else None
    found: dict[str, dict[str, Choice]] = {}
    for op in reference.OPS:
        if asked is not None and _covers_cpu(asked.backend):
            cpu = _asked_for(asked)
        elif torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcompress::{op}", "CPU"):
            cpu = Choice("compiled", f"the library has CPU kernels, {torch.ops.fastcompress.cpu_isa()}")
        else:
            cpu = Choice("reference", "there is no compiled library")
        cuda = _default() if asked is None else _asked_for(asked)
        if cuda.backend == "triton" and op not in _ops("triton"):
            cuda = Choice("reference", f"{cuda.reason}; Triton has no kernel for it")
        if not cuda_devices():
            cuda = Choice(cuda.backend, f"{cuda.reason} (no CUDA device here)")
        found[op] = {"cpu": cpu, "cuda": cuda}
    return found


@functools.cache
def cuda_devices() -> tuple[Device, ...]:
    """The CUDA devices that this process sees. Initialises CUDA."""
    if not torch.cuda.is_available():
        return ()
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Device(p.name, (p.major, p.minor)) for p in properties)


def driver_version() -> tuple[int, int] | None:
    """The CUDA version of the driver; ``None``: not known. Initialises CUDA."""
    if torch.version.hip or not cuda_devices():
        return None
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # not in torch's stubs
    return version // 1000, version % 1000 // 10


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for ``archs`` run on a GPU: those of its generation up to itself, or PTX of any that is no newer.

    Of ``"90a"`` and ``"100f"``, code for one GPU and for one family, only the GPU itself is taken.
    """
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
        if not match:
            continue
        built = int(match[1]), int(match[2])
        if match[3]:
            if built == capability:
                return True
        elif built <= capability and (built[0] == capability[0] or match[4]):
            return True
    return False


def _why_no_cuda() -> str | None:
    """Why there are no compiled CUDA kernels, as far as this can be said without a GPU."""
    if not COMPILED:
        return "there is no compiled library"
    return None if cuda_archs() else "the library has no CUDA kernels"


def _why_not_here() -> str | None:
    """Why the compiled CUDA kernels do not run on the GPUs at hand."""
    if torch.version.hip:
        return "the library's CUDA kernels do not run under ROCm"
    driver, built = driver_version(), cuda_version()
    if driver is not None and driver[0] < int(built.partition(".")[0]):
        return f"the library was built with CUDA {built}, but the driver is for CUDA {driver[0]}.{driver[1]}"
    for device in cuda_devices():
        if not runs_on(cuda_archs(), device.capability):
            major, minor = device.capability
            return f"the library has CUDA kernels for {cuda_archs()}, none for {device.name} ({major}{minor})"
    return None


def _why_no_triton() -> str | None:
    try:
        _ops("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed (pip install triton)"
        return f"the Triton kernels do not load ({error})"
    except Exception as error:  # whatever a Triton that does not fit this torch raises
        return f"the Triton kernels do not load ({type(error).__name__}: {error})"
    return None


@functools.cache
def _default() -> Choice:
    """For CUDA tensors, when nobody asks for anything. The same for every GPU, as a kernel is registered for all."""
    no_cuda = _why_no_cuda() or _why_not_here()
    if no_cuda is None:
        return Choice("cuda", f"the library has CUDA kernels for {cuda_archs()}")
    no_triton = _why_no_triton()
    if no_triton is None:
        return Choice("triton", no_cuda)
    return Choice("reference", f"{no_cuda}; {no_triton}")


def _covers_cpu(name: str) -> bool:
    """Whether a backend takes CPU tensors."""
    return name == "reference" or (name == "triton" and _interpreted())


def _interpreted() -> bool:
    """Whether Triton interprets kernels: in the words that it takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _asked_for(request: _Request) -> Choice:
    problem = _why_not_here() if request.backend == "cuda" else None
    return Choice(request.backend, f"{request.source} asks for it" + (f", but {problem}" if problem else ""))


def _ops(name: str) -> dict[str, Callable[..., Any]]:
    return importlib.import_module("fastcompress.triton").OPS if name == "triton" else reference.OPS


def _kernels(name: str) -> dict[str, Callable[..., Any]]:
    return {**reference.OPS, **_ops(name)}


def override(kernels: Mapping[str, Callable[..., Any]], keys: Iterable[str]) -> torch.library.Library:
    """Registers kernels of ops above what there is for some dispatch keys; destroying the result takes them away."""
    library = torch.library.Library("fastcompress", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that compiled kernels are overridden, which is the purpose
        for key in keys:
            for op, kernel in kernels.items():
                library.impl(op, kernel, key, allow_override=True)
    return library


def _fallback(name: str) -> Callable[..., Any]:
    """The reference, for tensors on any device. It sees CUDA tensors when the library has no kernels for them."""
    definition, op = reference.OPS[name], getattr(torch.ops.fastcompress, name).default

    def run(*args: Any) -> Any:
        # Not settled yet: see _settle_first, which lies above compiled kernels alone.
        if undecided and args[0].is_cuda and settle():
            return op(*args)
        return definition(*args)

    return run


for _name in reference.OPS:
    LIBRARY.impl(_name, _fallback(_name), "CompositeExplicitAutograd")

if _value := os.environ.get(VARIABLE):
    _push(_value, VARIABLE)
else:
    _apply()
