"""Every public op on arguments that hypothesis draws.

Results and gradients have the bits of the reference, and invalid arguments raise a clear error. ``make fuzz`` runs
these tests for a given time (``--fuzz-seconds``), and ``make test`` runs a few examples of each.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastcompress as fc
from tests.support import fuzzing
from tests.support.calls import CALLS, Call, calls
from tests.support.sample_inputs import assert_same_bits

pytestmark = pytest.mark.skipif(
    "config.getoption('--emulated') is not None or config.getoption('--device') or config.getoption('--backend')",
    reason="compares the default backend with the reference",
)

#: Errors that an op may raise.
REFUSALS = (TypeError, ValueError, RuntimeError)


def outcome(call: Call) -> list[Tensor] | Exception:
    try:
        return call.gradients()
    except REFUSALS as error:
        return error


def agrees(call: Call) -> None:
    """Assert the same bits, or the same error, on the default backend and on the reference."""
    found = outcome(call)
    with fc.backend("reference"):
        expected = outcome(call)
    if isinstance(found, Exception) or isinstance(expected, Exception):
        assert type(found) is type(expected) and str(found) == str(expected), f"{found!r} is not {expected!r}"
        assert allowed(call, str(found)), repr(found)
        return
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(a, b, f"tensor {number} of {call.function.__name__}")


def allowed(call: Call, message: str) -> bool:
    """Return whether valid arguments may raise this error: only ``pack`` does, if no row is left to pack."""
    return call.function is fc.pack and message.startswith("nothing is left to pack")


@pytest.mark.parametrize("name", CALLS)
def test_every_op_is_the_reference(name: str, fuzz):
    fuzz(agrees, calls(name))


# Invalid arguments

X = torch.randn(5, 3)
JUNK: dict[str, Any] = {
    "None": None,
    "an object": object(),
    "a string": "uniform:2",
    "an empty string": "",
    "a negative integer": -1,
    "a huge integer": 2**63,
    "a float": 0.5,
    "NaN": math.nan,
    "a bool": True,
    "a list": [0, 5],
    "an array": X.numpy(),
    "a type": torch.Tensor,
    "a scalar": torch.tensor(2),
    "nothing": torch.zeros(0),
    "fp32 [5, 3]": X,
    "fp64 [5]": torch.ones(5, dtype=torch.float64),
    "fp16 [2, 4, 3]": torch.ones(2, 4, 3, dtype=torch.float16),
    "fp32 [1, 2, 4, 3]": torch.ones(1, 2, 4, 3),
    "fp8": torch.zeros(5, 3).to(torch.float8_e4m3fn),
    "complex": X.cfloat(),
    "integers": torch.tensor([0, 2, 5]),
    "wild integers": torch.tensor([-(2**63), 2**63 - 1, 7, -1]),
    "int32 [2, 4]": torch.ones(2, 4, dtype=torch.int32),
    "unsigned": torch.ones(5, dtype=torch.uint8),
    "bools": torch.ones(5, dtype=torch.bool),
    "sparse": X.to_sparse(),
    "compressed": X.to_sparse_csr(),
    "nested": torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged),
    "quantized": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "elsewhere": X.to("meta"),
    "expanded": torch.ones(1, 1).expand(5, 3),
    "enormous": torch.ones(1, 1).expand(2**40, 2**20),
    "negated": torch.randn(5, 3, dtype=torch.complex64).conj().imag,
    "segments": fc.segment_pool(X).segments,
    "segments out of order": fc.Segments(
        torch.tensor([4, 0]), torch.tensor([2**62, -7]), torch.tensor([9, 1]).int(), torch.tensor([0, 5]).int(), 5
    ),
    "segments of more rows than memory": fc.Segments(
        torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1]).int(), torch.tensor([0, 5]).int(), 2**60 + 1
    ),
    "segments of 1.5 rows": fc.Segments(
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([0, 1]).int(),
        torch.tensor([0, 5]).int(),
        1.5,  # type: ignore
    ),
    "pooled": fc.segment_pool(X),
}


@st.composite
def nonsense(draw, name: str) -> tuple[str, Call]:
    """Draw a call with one or two invalid arguments, and describe them."""
    call = draw(calls(name))
    wrong = {
        argument: draw(st.sampled_from(list(JUNK)))
        for argument in draw(st.lists(st.sampled_from(list(call.kwargs)), min_size=1, max_size=2, unique=True))
    }
    junk = {argument: JUNK[kind] for argument, kind in wrong.items()}
    return str(wrong), Call(call.function, call.kwargs | junk)


#: Pattern of messages that name the invalid argument or the invalid combination of arguments.
NAMED = re.compile(r"must|is for|cannot be combined|needs?|unknown rule|has no field|rule '|missing|nothing is left")
#: Pattern of messages of torch: the type of an argument, a device without values, lack of memory.
OF_TORCH = re.compile(
    r"value of type '\S+' for argument|Cannot access storage|meta|memory|Storage size|alloc|API call failed"
)


def is_refused_or_works(drawn: tuple[str, Call]) -> None:
    what, call = drawn
    try:
        call()
    except (TypeError, ValueError) as error:
        assert NAMED.search(str(error)), f"{what}: {error!r}"
    except (RuntimeError, MemoryError) as error:
        assert OF_TORCH.search(str(error)), f"{what}: {error!r}"


# Streams are excluded, since their calls have arguments of tests/support/calls.py, which it does not check.
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("streaming")])
def test_invalid_arguments_are_refused(name: str, fuzz):
    fuzz(is_refused_or_works, nonsense(name))


def test_a_seed_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzzing, "SEEDS", tmp_path / "seeds.json")
    monkeypatch.setenv(fuzzing.SEED, "7")
    seen: list[int] = []

    def check(drawn: int) -> None:
        seen.append(drawn)
        assert drawn < 1000

    numbers = st.integers(0, 10_000)
    with pytest.raises(AssertionError):
        fuzzing.fuzz(check, numbers, "some test", 60.0)
    assert fuzzing.kept() == {"some test": [7]}
    with pytest.raises(AssertionError):  # kept seeds run before the fixed examples
        fuzzing.fuzz(check, numbers, "some test", None)
    seen.clear()
    fuzzing.fuzz(seen.append, numbers, "some test", None)
    fuzzing.fuzz(seen.append, numbers, "another", None)
    assert len(seen) == fuzzing.ROUND + 2 * fuzzing.SHORT
