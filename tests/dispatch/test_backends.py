"""The backend that runs: by default, in ``with fc.backend(...)``, and with FASTCOMPRESS_BACKEND.

No GPU is needed: the tests call the kernels of the CUDA dispatch key with CPU tensors.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcompress as fc
from fastcompress import reference
from fastcompress.dispatch import backends
from fastcompress.dispatch.library import COMPILED
from tests.support import ROOT, processes
from tests.support.on_device import on_device
from tests.support.sample_inputs import assert_same_bits, features, offsets

H100 = backends.Device("H100", (9, 0))
OP = torch.ops.fastcompress.segment_reduce.default
ARGS = torch.arange(12.0).view(6, 2), torch.tensor([0, 2]), torch.tensor([2, 4]), "sum"
SUMS = torch.tensor([[2.0, 4.0], [28.0, 32.0]])


def start_again() -> None:
    """Reset the choice of the backend, as before the first CUDA tensor."""
    backends._settled = False
    backends._default.cache_clear()
    backends._apply()


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """Restore the process's choice of the backend after a test."""
    backends._default.cache_clear()
    yield
    backends._requests.clear()
    start_again()
    backends._warned = False


class Spy(dict):
    """Ops of a backend that record their calls."""

    def __init__(self) -> None:
        super().__init__({name: self._spied(name, op) for name, op in reference.OPS.items()})
        self.calls: list[str] = []

    def _spied(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls.append(name)
            return op(*args)

        return run

    def took(self, call: Callable[[], Any]) -> bool:
        """Return whether ``call`` runs an op of this backend."""
        self.calls.clear()
        call()
        return bool(self.calls)


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spy]:
    """Replace the ops of the Triton backend and of the reference."""
    spies = {"triton": Spy(), "reference": Spy()}
    monkeypatch.setattr(backends, "_ops", spies.__getitem__)
    return spies


def on_cpu() -> torch.Tensor:
    return OP(*ARGS)


def on_cuda() -> torch.Tensor:
    return OP.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *ARGS)


def gpus(monkeypatch: pytest.MonkeyPatch, archs: str, *devices: backends.Device, **known: Any) -> None:
    """Pretend that the library has CUDA kernels for ``archs`` and that these GPUs are installed."""
    monkeypatch.setattr(backends, "COMPILED", known.get("compiled", True))
    monkeypatch.setattr(backends, "cuda_archs", lambda: archs)
    monkeypatch.setattr(backends, "cuda_version", lambda: "13.0" if archs else "")
    monkeypatch.setattr(backends, "cuda_devices", lambda: devices)
    monkeypatch.setattr(backends, "driver_version", lambda: known.get("driver", (13, 0)))
    monkeypatch.setattr(backends, "_why_no_triton", lambda: known.get("no_triton"))


# The context manager


def test_reference_takes_both_devices_and_gives_them_back(spies: dict[str, Spy]):
    took = spies["reference"].took
    assert not took(on_cpu)
    with fc.backend("reference"):
        assert took(on_cpu) and took(on_cuda)
        assert_same_bits(on_cpu(), SUMS)
        assert took(lambda: fc.segment_pool(features("iid", 9, 4, torch.float32)))
    assert not took(on_cpu)
    assert backends._override is None


def test_triton_takes_cuda_tensors_and_cpu_tensors_in_its_interpreter(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
):
    took = spies["triton"].took
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fc.backend("triton"):
        assert took(on_cuda) and not took(on_cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fc.backend("triton"):
        assert took(on_cuda) and took(on_cpu)
    assert not took(on_cpu)


def test_an_op_that_triton_lacks_runs_on_the_reference(spies: dict[str, Spy]):
    del spies["triton"]["segment_reduce"]
    with fc.backend("triton"):
        assert_same_bits(on_cuda(), SUMS)
        choice = backends.choices()["segment_reduce"]["cuda"]
    assert choice.backend == "reference" and "Triton has no kernel for it" in choice.reason


def test_nesting(spies: dict[str, Spy]):
    triton, ours = spies["triton"].took, spies["reference"].took
    with fc.backend("reference"):
        with fc.backend("triton"):
            assert triton(on_cuda) and not ours(on_cpu)
            with fc.backend("triton"), fc.backend("reference"):
                assert ours(on_cuda)
            assert triton(on_cuda)
        assert ours(on_cuda) and ours(on_cpu)
    assert backends._requests == [] and backends.undecided


def test_blocks_that_close_in_another_order(spies: dict[str, Spy]):
    first, second = fc.backend("triton"), fc.backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert spies["reference"].took(on_cuda)
    second.__exit__(None, None, None)
    assert backends._override is None


def test_an_exception_ends_the_choice(spies: dict[str, Spy]):
    with pytest.raises(KeyError), fc.backend("reference"):
        raise KeyError
    assert not spies["reference"].took(on_cpu)


def test_as_a_decorator(spies: dict[str, Spy]):
    decorated = fc.backend("reference")(on_cpu)
    for _ in range(2):
        assert spies["reference"].took(decorated)
    assert not spies["reference"].took(on_cpu)


def test_the_choice_is_of_the_process(spies: dict[str, Spy]):
    with fc.backend("reference"):
        thread = threading.Thread(target=on_cpu)
        thread.start()
        thread.join()
    assert spies["reference"].calls == ["segment_reduce"]


@pytest.mark.parametrize("name", ["cpu", "CUDA", "", None])
def test_unknown_names(name: Any):
    with pytest.raises(ValueError, match=r"fastcompress\.backend must be one of cuda, triton, reference, got"):
        with fc.backend(name):
            pass
    assert not backends._requests


def test_an_unusable_backend_gives_the_reason(monkeypatch: pytest.MonkeyPatch):
    def refused(name: str) -> str:
        with pytest.raises(RuntimeError) as error, fc.backend(name):
            pass
        assert not backends._requests and backends._override is None
        return str(error.value)

    gpus(monkeypatch, "")
    assert refused("cuda").endswith("the backend 'cuda' cannot be used: the library has no CUDA kernels")
    gpus(monkeypatch, "", compiled=False)
    assert "the compiled library is missing" in refused("cuda")
    monkeypatch.undo()
    modules = [name for name in sys.modules if name.startswith("fastcompress.triton")]
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed (pip install triton)" in refused("triton")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert "the Triton kernels cannot be loaded (" in refused("triton")


def test_autograd_below_another_backend(spies: dict[str, Spy]):
    x = features("iid", 9, 4, torch.float32).requires_grad_()
    expected = torch.autograd.grad(fc.segment_pool(x, rule=fc.Uniform(2)).values.sum(), x)[0]
    with fc.backend("reference"):
        actual = torch.autograd.grad(fc.segment_pool(x, rule=fc.Uniform(2)).values.sum(), x)[0]
    assert_same_bits(actual, expected)
    assert spies["reference"].calls == ["segment_pool", "segment_expand"]


# Graphs


def pool(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    return fc.segment_pool(x, cu_seqlens=cu, rule=fc.LocalMax(), compact=False).values


BATCH = features("smooth", 40, 8, torch.float32), offsets((30, 10))


def test_compiled_graphs_follow(spies: dict[str, Spy]):
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    expected = compiled(*BATCH)
    with torch._dynamo.config.patch(error_on_recompile=True), fc.backend("reference"):
        assert spies["reference"].took(lambda: assert_same_bits(compiled(*BATCH), expected))
    assert not spies["reference"].took(lambda: compiled(*BATCH))


def test_exported_programs_follow(spies: dict[str, Spy]):
    class Pool(torch.nn.Module):
        def forward(self, x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
            return pool(x, cu)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Pool(), BATCH), file)
    file.seek(0)
    program = torch.export.load(file).module()
    expected = program(*BATCH)
    with fc.backend("reference"):
        assert spies["reference"].took(lambda: assert_same_bits(program(*BATCH), expected))
    assert not spies["reference"].took(lambda: program(*BATCH))


def test_tracing_settles_the_choice_once(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, "", H100)

    def traced(x: torch.Tensor) -> torch.Tensor:
        backends.settle()
        return x + 1

    torch._dynamo.reset()
    torch.compile(traced, fullgraph=True, backend="eager")(torch.zeros(2))
    assert not backends.undecided and spies["triton"].took(on_cuda)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("devices", [(), (H100,)], ids=["no GPU", "GPU"])
def test_exporting_for_cuda(strict: bool, devices: tuple, spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch):
    class Pool(torch.nn.Module):
        def forward(self, x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
            return pool(x, cu)

    gpus(monkeypatch, "", *devices)
    with FakeTensorMode():
        batch = tuple(torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in BATCH)
    program = torch.export.export(Pool(), batch, strict=strict)
    assert torch.ops.fastcompress.segment_pool.default in [node.target for node in program.graph.nodes]
    assert backends.undecided is not bool(devices)  # chosen while tracing, if there is a device


def test_fake_cuda_tensors_need_no_gpu():
    with FakeTensorMode():
        pooled = fc.segment_pool(torch.empty(8, 4, device="cuda"), compact=False)
    assert pooled.values.device.type == "cuda" and pooled.values.shape == (5, 4)
    assert backends.undecided or torch.cuda.is_available()


# The default for CUDA tensors


@pytest.mark.parametrize(
    "archs, capability, expected",
    [
        ("80;90;100;120+PTX", (8, 0), True),
        ("80;90;100;120+PTX", (8, 9), True),
        ("80;90;100;120+PTX", (7, 5), False),
        ("80;90;100;120+PTX", (9, 0), True),
        ("80;90;100;120+PTX", (10, 3), True),
        ("80;90;100;120+PTX", (11, 0), False),
        ("80;90;100;120+PTX", (12, 1), True),
        ("80;90;100;120+PTX", (13, 0), True),
        ("90+PTX", (8, 0), False),
        ("86+PTX", (8, 0), False),
        ("90a+PTX", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100f;120+PTX", (10, 3), False),
        ("", (9, 0), False),
    ],
)
def test_archs(archs: str, capability: tuple[int, int], expected: bool):
    assert backends.runs_on(archs, capability) is expected


def test_compiled_kernels_come_first(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, "80;90+PTX", H100)
    assert backends.undecided and backends.settle()
    assert not backends.undecided and backends._override is None
    with fc.backend("cuda"):
        assert not backends.undecided and backends._override is None
        assert backends.choices()["segment_pool"]["cuda"].backend == "cuda"
    assert not backends.undecided and backends._override is None


@pytest.fixture
def compiled() -> Iterator[Spy]:
    """Replace the compiled CUDA kernels."""
    spy = Spy()
    library = backends.override(spy, ("CUDA",))
    yield spy
    library._destroy()


def test_kernels_that_do_not_fit_are_not_reached_after_a_block(
    compiled: Spy, spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
):
    """Gradients, compiled graphs and exported programs call kernels without dispatch/call.py."""
    gpus(monkeypatch, "100+PTX", H100)
    backends.settle()
    for name in ("reference", "triton"):
        with fc.backend(name):
            assert spies[name].took(on_cuda)
        assert spies["triton"].took(on_cuda) and not compiled.calls and not backends.undecided
    with pytest.raises(RuntimeError, match=r"'cuda' cannot be used: .* not for H100 \(90\)"), fc.backend("cuda"):
        pass
    assert spies["triton"].took(on_cuda) and not compiled.calls and not backends._requests


@pytest.mark.parametrize("archs, name", [("90", "cuda"), ("100+PTX", "triton")])
def test_the_first_call_settles_however_it_comes(
    archs: str, name: str, compiled: Spy, spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
):
    gpus(monkeypatch, archs, H100)
    start_again()
    others = {"cuda": compiled, **spies}
    chosen = others.pop(name)
    with on_device(torch.device("cpu")):  # CPU tensors go to the kernels of CUDA
        assert chosen.took(on_cpu) and not backends.undecided
        monkeypatch.setattr(backends, "settle", lambda: pytest.fail("asked again"))
        assert chosen.took(on_cpu)
    assert not any(other.calls for other in others.values())


def test_asking_for_cuda_settles_in_the_first_call(compiled: Spy, monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, "100+PTX", H100)
    start_again()
    with fc.backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' cannot be used: .* not for H100 \(90\)"):
        on_cuda()
    assert not compiled.calls


OLD, NEW = backends.Device("A100", (8, 0)), backends.Device("B200", (10, 0))


@pytest.mark.parametrize(
    "archs, devices, known, reason",
    [
        ("", [H100], {}, "the library has no CUDA kernels"),
        ("80+PTX", [H100], {"compiled": False}, "the compiled library is missing"),
        ("100;120+PTX", [NEW, H100], {}, r"the library has CUDA kernels for 100;120\+PTX, not for H100 \(90\)"),
        ("90", [H100, OLD], {}, r"not for A100 \(80\)"),
        ("90", [H100], {"driver": (12, 8)}, r"was built with CUDA 13\.0, but the driver supports CUDA 12\.8"),
    ],
)
def test_then_triton_then_the_reference(
    archs: str, devices: list, known: dict, reason: str, spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
):
    gpus(monkeypatch, archs, *devices, **known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.settle()
    assert spies["triton"].took(on_cuda) and not spies["triton"].took(on_cpu)
    choice = backends.choices()["segment_pool"]["cuda"]
    assert choice.backend == "triton"

    gpus(monkeypatch, archs, *devices, **known, no_triton="triton is not installed")
    start_again()
    with pytest.warns(RuntimeWarning, match=f"CUDA tensors run on the pure PyTorch .*{reason}.*; triton is not inst"):
        backends.settle()
    assert spies["reference"].took(on_cuda) and not spies["reference"].took(on_cpu)
    start_again()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning is given once
        backends.settle()


def test_rocm_has_no_compiled_kernels(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, "80;90+PTX", backends.Device("MI300X", (9, 4)))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backends.settle()
    assert spies["triton"].took(on_cuda)


def test_asking_for_cuda_on_a_gpu_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, "100+PTX", H100)
    with fc.backend("cuda"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"'cuda' cannot be used: .* not for H100 \(90\)"):
                backends.settle()
        assert ", but the library has CUDA kernels for" in backends.choices()["segment_pool"]["cuda"].reason


def test_a_call_with_a_cuda_tensor_settles(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch):
    """The choice is made in ``dispatch/call.py``, or in the fallback for calls that do not use it."""
    from fastcompress.dispatch.call import call

    class OnCuda(torch.Tensor):
        is_cuda = True

    gpus(monkeypatch, "", H100)
    x = ARGS[0].as_subclass(OnCuda)
    call(lambda *args: None, (x,), False, lambda: None)
    assert not backends.undecided
    start_again()
    assert backends.undecided
    ran = []
    monkeypatch.setattr(backends, "settle", lambda: ran.append(1))
    assert_same_bits(backends._fallback("segment_reduce")(x, *ARGS[1:]).as_subclass(torch.Tensor), SUMS)
    assert ran == [1]


# Processes


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    whole = {**os.environ, **env}
    whole = {name: value for name, value in whole.items() if name != backends.VARIABLE or name in env}
    return processes.run(["-c", code], env=whole, cwd=ROOT, seconds=120)


POOL = """
import json, sys, torch, fastcompress as fc
from fastcompress.dispatch import backends
torch.manual_seed(0)
x = torch.randn(40, 33)
pooled = fc.segment_pool(x, rule=fc.LocalMax())
starts = pooled.segments.starts.tolist()
print(json.dumps([backends.choices()["segment_pool"]["cpu"].backend, starts, pooled.values.double().sum().item()]))
"""


def test_environment_variable():
    results = [run(POOL, FASTCOMPRESS_BACKEND=name) for name in ("reference", "")]
    assert [result.stderr for result in results] == ["", ""] or not COMPILED
    first, second = (json.loads(result.stdout) for result in results)
    assert first[0] == "reference" and second[0] == ("compiled" if COMPILED else "reference")
    assert first[1:] == second[1:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_interpreter_through_the_public_api():
    from tests.support.triton_versions import WHY_NOT

    if WHY_NOT:
        pytest.skip(WHY_NOT)
    result = run(POOL, FASTCOMPRESS_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    ours, triton = json.loads(run(POOL).stdout), json.loads(result.stdout)
    assert triton[0] == "triton" and triton[1:] == ours[1:]


@pytest.mark.parametrize(
    "value, message",
    [
        ("gpu", "ValueError: FASTCOMPRESS_BACKEND must be one of cuda, triton, reference, got 'gpu'"),
        ("cuda", "RuntimeError: FASTCOMPRESS_BACKEND: the backend 'cuda' cannot be used: "),
    ],
)
def test_environment_variable_that_cannot_be(value: str, message: str):
    if value == "cuda" and COMPILED and backends.cuda_archs():
        pytest.skip("the library has CUDA kernels")
    result = run("import fastcompress", FASTCOMPRESS_BACKEND=value)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(message)


def test_import_and_cpu_calls_leave_cuda_alone():
    forbid = "import torch\ndef no(*args): raise SystemExit('CUDA was touched')\ntorch.cuda.is_available = no\n"
    forbid += "torch.cuda._lazy_init = torch.cuda.device_count = no\n"
    use = "import fastcompress as fc\nfc.segment_pool(torch.randn(9, 4))\nassert fc.dispatch.backends.undecided\n"
    for name in ("", "reference"):
        result = run(forbid + (use if not name else "import fastcompress"), FASTCOMPRESS_BACKEND=name)
        assert result.returncode == 0, result.stderr
