"""Rules: text and dict forms, errors, and the bound on the number of segments."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcompress as fc
from fastcompress.rules import RULES as RULE_CLASSES
from fastcompress.rules import Rule, as_rule, max_segments
from tests.support.sample_inputs import RULES, offsets

numbers = st.one_of(st.floats(allow_nan=False), st.integers(-1000, 1000))
cuts = st.tuples(st.integers(1, 9), st.none() | st.integers(1, 12)).filter(lambda c: c[1] is None or c[0] <= c[1])


NAMES = "uniform, local-max, threshold, top-k, min-variance, label-change, lookback, peak-height"


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    kind = draw(st.sampled_from(list(RULE_CLASSES)))
    if kind == "uniform":
        return fc.Uniform(draw(st.integers(1, 10**6)), draw(st.sampled_from(["keep", "drop"])))
    min_len, max_len = draw(cuts)
    if kind == "threshold":
        return fc.Threshold(draw(numbers), min_len, max_len)
    maybe = st.none() | numbers
    return fc.LocalMax(draw(st.integers(1, 5)), draw(maybe), draw(maybe), min_len, max_len)


def bound(rule: Rule, num_rows: int, num_sequences: int) -> int:
    name, size, _, _, min_len, max_len, _ = rule.op_args()
    return max_segments(name, size, min_len, max_len, num_rows, num_sequences)


# Text and dict forms


@given(rules())
def test_string_round_trip(rule: Rule):
    again = Rule.from_string(str(rule))
    assert again == rule and type(again) is type(rule)
    assert again.op_args() == rule.op_args()
    assert as_rule(str(rule)) == rule


@given(rules())
def test_dict_round_trip(rule: Rule):
    data = rule.to_dict()
    assert data["rule"] == rule.name
    assert set(data) == {"rule"} | {field.name for field in dataclasses.fields(rule)}
    copy = dict(data)
    assert Rule.from_dict(data) == rule
    assert data == copy, "from_dict changed its argument"
    assert Rule.from_dict(json.loads(json.dumps(data))) == rule


@given(rules())
def test_equal_rules_have_equal_hashes(rule: Rule):
    twin = dataclasses.replace(rule)
    assert twin is not rule and twin == rule and hash(twin) == hash(rule)
    assert len({rule, twin, fc.Uniform(10**6 + 1)}) == 2


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("uniform:3", fc.Uniform(3)),
        ("uniform:size=3,tail=drop", fc.Uniform(3, "drop")),
        ("uniform:3,tail=drop", fc.Uniform(3, "drop")),
        (" uniform : 3 , tail = drop ", fc.Uniform(3, "drop")),
        ("local-max", fc.LocalMax()),
        ("local-max:", fc.LocalMax()),
        ("local-max:2", fc.LocalMax(2)),
        ("local-max:threshold=None,max_len=None", fc.LocalMax()),
        ("local-max:order=2,min_len=3", fc.LocalMax(order=2, min_len=3)),
        ("local-max:threshold=-inf", fc.LocalMax(threshold=-math.inf)),
        ("local-max:prominence=1e-3", fc.LocalMax(prominence=0.001)),
        ("threshold:0.15", fc.Threshold(0.15)),
        ("min-variance", fc.MinVariance(4.0, 8)),
        ("min-variance:3", fc.MinVariance(3)),
        ("min-variance:rate=6,max_len=12", fc.MinVariance(6, 12)),
        ("threshold:1,max_len=8", fc.Threshold(1, max_len=8)),
    ],
)
def test_from_string(text: str, rule: Rule):
    assert Rule.from_string(text) == rule


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (fc.Uniform(3), "uniform:3"),
        (fc.Uniform(3, "drop"), "uniform:3,tail=drop"),
        (fc.LocalMax(), "local-max"),
        (fc.LocalMax(2, min_len=3), "local-max:order=2,min_len=3"),
        (fc.LocalMax(threshold=0.5, prominence=0.25, max_len=9), "local-max:threshold=0.5,prominence=0.25,max_len=9"),
        (fc.MinVariance(2.5, max_len=6), "min-variance:rate=2.5,max_len=6"),
        (fc.Threshold(0.15, 2, 4), "threshold:0.15,min_len=2,max_len=4"),
    ],
)
def test_str(rule: Rule, text: str):
    assert str(rule) == text


@pytest.mark.parametrize(
    ("rule", "args"),
    [
        (fc.Uniform(3), ("uniform", 3, 0.0, 0.0, 1, 0, True)),
        (fc.Uniform(3, "drop"), ("uniform", 3, 0.0, 0.0, 1, 0, False)),
        (fc.LocalMax(), ("local-max", 1, -torch.finfo(torch.float64).max, 0.0, 1, 0, True)),
        (fc.LocalMax(2, 0.5, 0.25, 3, 4), ("local-max", 2, 0.5, 0.25, 3, 4, True)),
        (fc.Threshold(1, 2, 5), ("threshold", 1, 1.0, 0.0, 2, 5, True)),
        (fc.Threshold(float("inf")), ("uniform", 2**63 - 1, 0.0, 0.0, 1, 0, True)),  # no boundary but the cuts
        (fc.LocalMax(threshold=float("inf"), max_len=9), ("uniform", 9, 0.0, 0.0, 1, 0, True)),
    ],
)
def test_op_args(rule: Rule, args: tuple):
    assert rule.op_args() == args
    assert [type(a) for a in rule.op_args()] == [type(a) for a in args]


def test_fused_set():
    fused = {rule for rule in RULES if rule.fused}
    assert set(RULES) - fused == {fc.LocalMax(prominence=0.1)}
    assert [cls.needs_distance for cls in (fc.Uniform, fc.LocalMax, fc.Threshold)] == [False, True, True]


def test_as_rule():
    rule = fc.Threshold(0.5)
    assert as_rule(rule) is rule
    assert as_rule("threshold:0.5") == rule
    for wrong in (None, 3, {"rule": "uniform", "size": 3}, fc.Uniform):
        with pytest.raises(TypeError) as error:
            as_rule(wrong)
        assert str(error.value) == f"rule must be a fastcompress.Rule or a string, got {type(wrong).__name__}"


def test_base_class_is_not_a_rule():
    with pytest.raises(NotImplementedError):
        Rule().op_args()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_frozen(rule: Rule):
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, field.name, 1)


# Errors: the whole message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.Uniform(0), "Uniform: size must be at least 1, got 0"),
        (lambda: fc.Uniform(2.0), "Uniform: size must be an integer, got 2.0"),
        (lambda: fc.Uniform(True), "Uniform: size must be an integer, got True"),
        (lambda: fc.Uniform(None), "Uniform: size must be an integer, got None"),
        (lambda: fc.Uniform(2, "pad"), "Uniform: tail must be 'keep' or 'drop', got 'pad'"),
        (lambda: fc.LocalMax(0), "LocalMax: order must be at least 1, got 0"),
        (lambda: fc.LocalMax("2"), "LocalMax: order must be an integer, got '2'"),
        (lambda: fc.LocalMax(threshold=math.nan), "LocalMax: threshold must be a number, got nan"),
        (lambda: fc.LocalMax(threshold="low"), "LocalMax: threshold must be a number, got 'low'"),
        (lambda: fc.LocalMax(prominence=True), "LocalMax: prominence must be a number, got True"),
        (lambda: fc.LocalMax(min_len=0), "LocalMax: min_len must be at least 1, got 0"),
        (lambda: fc.LocalMax(min_len=None), "LocalMax: min_len must be an integer, got None"),
        (lambda: fc.LocalMax(max_len=0), "LocalMax: max_len must be at least 1, got 0"),
        (lambda: fc.LocalMax(max_len=2.5), "LocalMax: max_len must be an integer, got 2.5"),
        (lambda: fc.LocalMax(min_len=3, max_len=2), "LocalMax: min_len must not exceed max_len, got 3 > 2"),
        (lambda: fc.Threshold(None), "Threshold: threshold must be a number, got None"),
        (lambda: fc.Threshold(math.nan), "Threshold: threshold must be a number, got nan"),
        (lambda: fc.Threshold(0.1, min_len=-1), "Threshold: min_len must be at least 1, got -1"),
        (lambda: fc.Threshold(0.1, 4, 3), "Threshold: min_len must not exceed max_len, got 4 > 3"),
        (
            lambda: Rule.from_string("mean:3"),
            f"unknown rule 'mean'; the rules are {NAMES}",
        ),
        (
            lambda: Rule.from_string(""),
            f"unknown rule ''; the rules are {NAMES}",
        ),
        (
            lambda: Rule.from_dict({}),
            f"data must have a 'rule', one of {NAMES}, got {{}}",
        ),
        (
            lambda: Rule.from_string("uniform:3,order=2"),
            "rule 'uniform' has no field 'order'; its fields are size, tail",
        ),
        (
            lambda: Rule.from_dict({"rule": "uniform", "n": 2}),
            "rule 'uniform' has no field 'n'; its fields are size, tail",
        ),
        (
            lambda: Rule.from_string("uniform:size=3,drop"),
            "rule 'uniform:size=3,drop': 'drop' must have the form field=value",
        ),
        (lambda: Rule.from_string("uniform:3,size=4"), "rule 'uniform:3,size=4': field 'size' is given twice"),
        (lambda: Rule.from_string("uniform:three"), "Uniform: size must be an integer, got 'three'"),
        (lambda: Rule.from_string("threshold:nan"), "Threshold: threshold must be a number, got nan"),
    ],
)
def test_refused(make, message: str):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(("text", "field"), [("uniform", "size"), ("threshold:min_len=2", "threshold")])
def test_missing_field_is_named(text: str, field: str):
    name = text.partition(":")[0]
    with pytest.raises(ValueError, match=rf"^rule '{name}' needs {field}, as in '"):
        Rule.from_string(text)


# The bound


def counts(d: torch.Tensor, rule: Rule) -> torch.Tensor:
    return fc.select_boundaries(d, rule).counts


def most_segments(rule: Rule, frames: int) -> int:
    """Return the maximum number of segments of one sequence without ``max_len``, from the possible boundaries."""
    if isinstance(rule, fc.Uniform):
        return frames // rule.size if rule.tail == "drop" else -(-frames // rule.size)
    if isinstance(rule, fc.Threshold):
        return -(-frames // rule.min_len)
    # The first possible boundary is at frame 2, since the first distance is not a peak, and the last one at frame
    # T - 2. Peaks are more than `order` apart.
    first, step = max(2, rule.min_len), max(rule.order + 1, rule.min_len)
    return 1 + (0 if frames - 2 < first else 1 + (frames - 2 - first) // step)


UNCUT = [
    *(fc.Uniform(size, tail) for size in (1, 2, 3, 5) for tail in ("keep", "drop")),
    *(fc.Threshold(0.5, min_len) for min_len in (1, 2, 3)),
    *(fc.LocalMax(order, min_len=min_len) for order in (1, 2, 3) for min_len in (1, 2, 3, 4)),
]
CUT = [
    *(fc.Threshold(2.5, a, b) for a, b in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 4), (3, 7))),
    *(
        fc.LocalMax(order, min_len=a, max_len=b)
        for order in (1, 2)
        for a, b in ((1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 2), (2, 3), (2, 5), (3, 3), (3, 4), (3, 7), (4, 5))
    ),
]


@pytest.fixture(scope="module")
def orderings() -> dict[int, torch.Tensor]:
    """Return every ordering of T - 1 distances as ``[(T - 1)!, T]``, for each number of frames T."""
    result = {}
    for frames in range(1, 9):
        rows = [(*row, math.nan) for row in itertools.permutations(range(frames - 1))]
        result[frames] = torch.tensor(rows)
    return result


@pytest.mark.parametrize("rule", UNCUT, ids=str)
def test_most_segments_over_every_ordering(rule: Rule, orderings: dict[int, torch.Tensor]):
    if isinstance(rule, fc.Threshold):  # every distance can exceed the threshold
        rule = dataclasses.replace(rule, threshold=-1)
    for frames, d in orderings.items():
        most = int(counts(d, rule).max())
        assert most == most_segments(rule, frames)
        assert most <= bound(rule, frames, 1)


@pytest.mark.parametrize("rule", CUT, ids=str)
def test_bound_holds_for_every_ordering(rule: Rule, orderings: dict[int, torch.Tensor]):
    for frames, d in orderings.items():
        assert int(counts(d, rule).max()) <= bound(rule, frames, 1)


@pytest.mark.parametrize(
    ("rule", "frames", "sequences"),
    [
        (fc.Uniform(3), 7, 1),
        (fc.Uniform(5), 3001, 4),
        (fc.Uniform(100), 1, 5),
        (fc.Uniform(3, "drop"), 3, 0),
        (fc.LocalMax(), 1, 1),
        (fc.LocalMax(max_len=3), 1, 1),
        (fc.Threshold(-1, min_len=2), 3, 1),
        (fc.Threshold(-1, min_len=3), 3001, 2),
        (fc.Threshold(-1, min_len=5, max_len=5), 11, 3),
        (fc.LocalMax(min_len=2, max_len=2), 5, 1),
        (fc.LocalMax(min_len=4, max_len=4), 1001, 3),
    ],
    ids=str,
)
def test_bound_is_reached(rule: Rule, frames: int, sequences: int):
    """One long sequence and several of one frame reach the bound if the division in it has no remainder."""
    lengths = (frames, *(1,) * (sequences - 1)) if sequences else ()
    d = torch.arange(sum(lengths), dtype=torch.float32)
    segments = fc.select_boundaries(d, rule, cu_seqlens=offsets(lengths))
    assert int(segments.cu_segments[-1]) == bound(rule, sum(lengths), sequences)


@given(rules(), st.lists(st.integers(0, 40), max_size=5), st.integers(2, 50), st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_bound_holds(rule: Rule, lengths: list[int], levels: int, seed: int):
    """With ties there are at most as many segments as the bound, which ``compact=False`` allocates."""
    if isinstance(rule, fc.Uniform):
        rule = dataclasses.replace(rule, size=rule.size % 7 + 1)
    total = sum(lengths)
    g = torch.Generator().manual_seed(seed)
    d = torch.randint(levels, (total,), generator=g).float() / levels
    layout = {"cu_seqlens": offsets(tuple(lengths))}
    compact = fc.select_boundaries(d, rule, **layout)
    most = bound(rule, total, len(lengths))
    assert len(compact.starts) <= most
    loose = fc.select_boundaries(d, rule, **layout, compact=False)
    assert len(loose.starts) == most
    assert torch.equal(loose.starts[: len(compact.starts)], compact.starts)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bound_with_row_groups_is_the_rows(rule: Rule):
    d = torch.rand(50)
    segments = fc.select_boundaries(d, rule, row_group=torch.zeros(50, dtype=torch.int32))
    assert len(segments.starts) == 50
    dropped = fc.select_boundaries(d, rule, row_group=torch.full((50,), -1, dtype=torch.int32), compact=False)
    assert len(dropped.starts) == 50 and dropped.cu_segments.tolist() == [0, 0]
