"""Choice of the backend on which ops run: compiled kernels, Triton kernels, or the reference.

The ops are ordinary ops of the PyTorch dispatcher. The compiled library registers its kernels for the CPU and CUDA
keys. The reference is registered for every device, with a lower priority. Any other choice registers Python kernels
that override the compiled ones while the choice is active. So the default adds no cost to a call, and the choice also
applies to compiled graphs and exported programs.

The backend of CUDA tensors is chosen at the first call with one. From then on, opening or closing a ``backend`` block
takes effect immediately. Before that, this module does not initialize CUDA, so that a process can fork after
``import fastcompress``.
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
#: Environment variable that chooses the backend of the process.
VARIABLE = "FASTCOMPRESS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """Backend of an op, ``"compiled"`` (CPU), ``"cuda"``, ``"triton"`` or ``"reference"``, and the reason for it."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Device:
    """A CUDA device that is visible to this process."""

    name: str
    capability: tuple[int, int]


@dataclass(eq=False)
class _Request:
    """A backend that a ``backend`` block or the environment variable requests; errors name ``source``."""

    backend: str
    source: str


#: True until the first CUDA tensor has been seen. ``call.py`` reads it at every call.
undecided: bool = True

_settled = False  # True once the default backend of CUDA tensors has been chosen
_lock = threading.RLock()
_requests: list[_Request] = []  # the last one is active
_override: torch.library.Library | None = None
_warned = False


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops on another backend inside a ``with`` block or a decorated function.

    Without a choice, CUDA tensors run on the compiled kernels if these support the GPUs, else on Triton if it is
    installed, else on the reference. The environment variable ``FASTCOMPRESS_BACKEND`` chooses for the whole process.

    The choice applies to all threads: the block that was opened last and is still open is active. Do not open or close
    a block while another thread is running an op.

    Args:
        name: ``"cuda"`` for the compiled kernels or ``"triton"`` for the Triton kernels; both affect CUDA tensors only,
            except that Triton's interpreter (``TRITON_INTERPRET=1``) also runs CPU tensors. ``"reference"`` for pure
            PyTorch, for CPU tensors too. An op that a backend does not have runs on the reference.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the backend cannot be used; the message has the reason. Before the first CUDA tensor, problems
            with the GPU are reported at the first call with one. It is also raised if the block is inside a
            function that is being compiled or exported.

    Examples:
        >>> import fastcompress
        >>> with fastcompress.backend("reference"):
        ...     fastcompress.adjacent_distance(torch.ones(2, 4))
        tensor([0., nan])
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fastcompress.backend cannot be used inside a compiled function: open the block around its calls"
        )
    request = _push(name, "fastcompress.backend")
    try:
        yield
    finally:
        with _lock:
            _requests.remove(request)
            _apply()


def _push(name: str, source: str) -> _Request:
    """Activate a backend and return its request, which the caller removes to deactivate it."""
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
        except RuntimeError:  # the GPUs are known already, and the backend does not support them
            _requests.remove(request)
            _apply()
            raise
    return request


def _apply() -> None:
    """Activate the last request, or the default without one."""
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
    """Replace the overriding kernels by ``kernels``. An empty mapping restores the compiled kernels."""
    global _override
    if _override is not None:
        _override._destroy()
    _override = override(kernels, keys) if kernels else None


def _settle_first(name: str) -> Callable[..., Any]:
    """Make a kernel that chooses the backend and calls the op again.

    It overrides the compiled kernel, which may not support the GPU, until the backend is chosen. It is needed for a
    first call that does not go through ``call.py``, such as that of an exported program.
    """
    op = getattr(torch.ops.fastcompress, name).default

    def run(*args: Any) -> Any:
        settle()
        return op(*args)

    return run


def settle() -> bool:
    """Choose the backend of CUDA tensors at the first one.

    Return False if there is no CUDA device, as when a fake CUDA tensor is traced.
    """
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


# Dynamo calls a function with this attribute instead of tracing it. torch.compiler.assume_constant_result sets it too,
# but imports Dynamo, which takes seconds.
settle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choices() -> dict[str, dict[str, Choice]]:
    """Return the backend of each op for ``"cpu"`` and ``"cuda"`` tensors, with the reasons. Initializes CUDA."""
    asked = _requests[-1] if _requests else None
    found: dict[str, dict[str, Choice]] = {}
    for op in reference.OPS:
        if asked is not None and _covers_cpu(asked.backend):
            cpu = _asked_for(asked)
        elif torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcompress::{op}", "CPU"):
            cpu = Choice("compiled", f"the library has CPU kernels for {torch.ops.fastcompress.cpu_isa()}")
        else:
            cpu = Choice("reference", "the compiled library is missing")
        cuda = _default() if asked is None else _asked_for(asked)
        if cuda.backend == "triton" and op not in _ops("triton"):
            cuda = Choice("reference", f"{cuda.reason}; Triton has no kernel for it")
        if not cuda_devices():
            cuda = Choice(cuda.backend, f"{cuda.reason} (no CUDA device here)")
        found[op] = {"cpu": cpu, "cuda": cuda}
    return found


@functools.cache
def cuda_devices() -> tuple[Device, ...]:
    """Return the CUDA devices that are visible to this process. Initializes CUDA."""
    if not torch.cuda.is_available():
        return ()
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Device(p.name, (p.major, p.minor)) for p in properties)


def driver_version() -> tuple[int, int] | None:
    """Return the CUDA version that the driver supports, or ``None`` if it is unknown. Initializes CUDA."""
    if torch.version.hip or not cuda_devices():
        return None
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # not in torch's stubs
    return version // 1000, version % 1000 // 10


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether kernels that were compiled for ``archs`` run on a GPU.

    Machine code runs on GPUs of the same major and an equal or higher minor capability; PTX runs on any GPU of an equal
    or higher capability. Code such as ``"90a"`` or ``"100f"`` is accepted for exactly that capability.

    Args:
        archs: Architectures separated by semicolons, such as ``"80;90a;120+PTX"``.
        capability: Compute capability of the GPU, (major, minor).
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
    """Return why there are no compiled CUDA kernels, as far as that is known without a GPU, or ``None``."""
    if not COMPILED:
        return "the compiled library is missing"
    return None if cuda_archs() else "the library has no CUDA kernels"


def _why_not_here() -> str | None:
    """Return why the compiled CUDA kernels do not run on the visible GPUs, or ``None``. Initializes CUDA."""
    if torch.version.hip:
        return "the library's CUDA kernels do not run under ROCm"
    driver, built = driver_version(), cuda_version()
    if driver is not None and driver[0] < int(built.partition(".")[0]):
        return f"the library was built with CUDA {built}, but the driver supports CUDA {driver[0]}.{driver[1]}"
    for device in cuda_devices():
        if not runs_on(cuda_archs(), device.capability):
            major, minor = device.capability
            return f"the library has CUDA kernels for {cuda_archs()}, not for {device.name} ({major}{minor})"
    return None


def _why_no_triton() -> str | None:
    """Return why the Triton kernels cannot be used, or ``None``."""
    try:
        _ops("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed (pip install triton)"
        return f"the Triton kernels cannot be loaded ({error})"
    except Exception as error:  # a Triton that is incompatible with this torch can raise anything
        return f"the Triton kernels cannot be loaded ({type(error).__name__}: {error})"
    return None


@functools.cache
def _default() -> Choice:
    """Return the default backend of CUDA tensors, the same for all GPUs: kernels are registered per device type."""
    no_cuda = _why_no_cuda() or _why_not_here()
    if no_cuda is None:
        return Choice("cuda", f"the library has CUDA kernels for {cuda_archs()}")
    no_triton = _why_no_triton()
    if no_triton is None:
        return Choice("triton", no_cuda)
    return Choice("reference", f"{no_cuda}; {no_triton}")


def _covers_cpu(name: str) -> bool:
    """Return whether a backend also runs CPU tensors."""
    return name == "reference" or (name == "triton" and _interpreted())


def _interpreted() -> bool:
    """Return whether Triton's interpreter is enabled, by the values of the variable that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _asked_for(request: _Request) -> Choice:
    problem = _why_not_here() if request.backend == "cuda" else None
    return Choice(request.backend, f"{request.source} selects it" + (f", but {problem}" if problem else ""))


def _ops(name: str) -> dict[str, Callable[..., Any]]:
    """Return the kernels of a Python backend by op, importing Triton only if it is needed."""
    return importlib.import_module("fastcompress.triton").OPS if name == "triton" else reference.OPS


def _kernels(name: str) -> dict[str, Callable[..., Any]]:
    """Return the kernels of a Python backend by op, with the reference for the ops that it does not have."""
    return {**reference.OPS, **_ops(name)}


def override(kernels: Mapping[str, Callable[..., Any]], keys: Iterable[str]) -> torch.library.Library:
    """Register kernels that override the present ones for the given dispatch keys, until the result is destroyed."""
    library = torch.library.Library("fastcompress", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about overridden kernels, which is the intention here
        for key in keys:
            for op, kernel in kernels.items():
                library.impl(op, kernel, key, allow_override=True)
    return library


def _fallback(name: str) -> Callable[..., Any]:
    """Make the kernel for tensors on any device: the reference.

    CUDA tensors reach it if the library has no CUDA kernels. The first one then chooses the backend: ``_settle_first``
    does that only above compiled kernels.
    """
    definition, op = reference.OPS[name], getattr(torch.ops.fastcompress, name).default

    def run(*args: Any) -> Any:
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
