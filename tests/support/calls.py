"""Calls of each public op with arguments drawn by hypothesis, for tests of properties that all ops have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import fastcompress as fc
from fastcompress.ops.segment_reduce import REDUCTIONS
from tests.support.sample_inputs import DTYPES, features
from tests.support.strategies import Case, batch, every_rule

Draw = Callable[[st.SearchStrategy[Any]], Any]
seeds = st.integers(0, 99)


@dataclass
class Call:
    """A function and its arguments. The arguments named in ``grads`` can have gradients."""

    function: Callable[..., Any]
    kwargs: dict[str, Any]
    grads: tuple[str, ...] = ()

    def __call__(self) -> list[Tensor]:
        """Return the tensors of the result."""
        return tensors(self.function(**self.kwargs))

    def gradients(self, seed: int = 0) -> list[Tensor]:
        """Return the tensors of the result, and the gradients of the arguments in ``grads``."""
        leaves = {name: self.kwargs[name].detach().requires_grad_() for name in self.grads}
        outputs = tensors(self.function(**self.kwargs | leaves))
        wanted = [out for out in outputs if out.requires_grad]
        found = [out.detach() for out in outputs]
        if not wanted:
            return found
        grads = [random_like(out, seed + i) for i, out in enumerate(wanted)]
        return found + [
            torch.zeros(0) if grad is None else grad
            for grad in torch.autograd.grad(wanted, list(leaves.values()), grads, allow_unused=True)
        ]


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def random_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)


def integers_like(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def sequences(case: Case) -> dict[str, Tensor]:
    """Draw the arguments that describe the sequences, without masks and row groups."""
    return {name: value for name, value in case.layout.items() if name in ("cu_seqlens", "lengths")}


def scalars(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw one value per row: many equal values, arbitrary values, or values of which some are not finite."""
    kind, seed = draw(st.sampled_from(["few", "iid", "nonfinite", "huge", "tiny"])), draw(seeds)
    count = torch.Size(shape).numel()
    if kind == "few":
        return (integers_like((count,), 0, 4, seed) / 4).to(dtype).view(shape)
    return features(kind, count, 1, dtype, seed).view(shape)


# One function per public op


def segment_pool(draw: Draw) -> Call:
    case = draw(batch())
    x, rule = case.x, draw(every_rule())
    kwargs: dict[str, Any] = {"x": x, "rule": rule, "compact": draw(st.booleans()), **case.layout}
    grads = ["x"]
    if isinstance(rule, fc.LabelChange):
        kwargs["labels"] = integers_like(x.shape[:-1], -1, 3, draw(seeds))
    if draw(st.booleans()):
        dtype, width = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 40))
        kwargs["keys"] = features("smooth", case.inside.numel(), width, dtype, draw(seeds)).view(*x.shape[:-1], width)
    elif draw(st.booleans()):  # keys are some columns of x
        kwargs["keys"] = x[..., : draw(st.integers(1, x.shape[-1]))]
    how = draw(st.integers(0, 2))
    if how == 1:
        kwargs["reduce"] = draw(st.sampled_from(REDUCTIONS))
    elif how == 2:
        kwargs["weights"] = scalars(draw, x.shape[:-1], draw(st.sampled_from(DTYPES)))
        grads.append("weights")
    return Call(fc.segment_pool, kwargs, tuple(grads))


def adjacent_distance(draw: Draw) -> Call:
    case = draw(batch())
    lag = draw(st.integers(1, 9) | st.just(2**63 - 1))
    return Call(fc.adjacent_distance, {"x": case.x, "lag": lag, **sequences(case)}, ("x",))


def select_boundaries(draw: Draw) -> Call:
    case, rule, dtype = draw(batch()), draw(every_rule()), draw(st.sampled_from(DTYPES))
    shape = case.x.shape[:-1]
    kwargs: dict[str, Any] = {"rule": rule, "compact": draw(st.booleans()), **case.layout, "d": None}
    if isinstance(rule, fc.LabelChange):
        kwargs["labels"] = integers_like(shape, -1, 3, draw(seeds))
        return Call(fc.select_boundaries, kwargs)
    d = scalars(draw, (*shape, rule.window) if isinstance(rule, fc.Lookback) else shape, dtype)
    if isinstance(rule, (fc.Threshold, fc.LocalMax)) and d.numel():
        # The threshold is one of the distances, or the next number above or below it.
        edge = d.flatten()[draw(st.integers(0, d.numel() - 1))]
        edge = edge if draw(st.booleans()) else torch.nextafter(edge.double(), torch.tensor(torch.inf).double())
        if not edge.isnan():
            kwargs["rule"] = type(rule)(**vars(rule) | {"threshold": edge.item()})
    return Call(fc.select_boundaries, kwargs | {"d": d})


def given_segments(draw: Draw) -> tuple[fc.Segments, Tensor]:
    """Draw rows ``[N, D]`` and segments in order, with gaps between them, some of them empty."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2) | st.integers(0, 140)), max_size=6))
    starts, lengths, row = [], [], 0
    for gap, length in sizes:
        starts.append(row + gap)
        lengths.append(length)
        row += gap + length
    rows = row + draw(st.integers(0, 3))
    ends = torch.tensor([0, len(starts)], dtype=torch.int32)
    places, counts = (torch.tensor(values, dtype=torch.int64) for values in (starts, lengths))
    segments = fc.Segments(places, counts, ends, torch.tensor([0, rows], dtype=torch.int32), rows)
    width, dtype = draw(st.integers(0, 70)), draw(st.sampled_from(DTYPES))
    return segments, features(draw(st.sampled_from(["smooth", "nonfinite", "huge"])), rows, width, dtype, draw(seeds))


def segment_reduce(draw: Draw) -> Call:
    segments, x = given_segments(draw)
    if draw(st.booleans()):
        return Call(
            fc.segment_reduce, {"x": x, "segments": segments, "reduce": draw(st.sampled_from(REDUCTIONS))}, ("x",)
        )
    weights = scalars(draw, x.shape[:1], draw(st.sampled_from(DTYPES)))
    return Call(fc.segment_reduce, {"x": x, "segments": segments, "weights": weights}, ("x", "weights"))


def segment_expand(draw: Draw) -> Call:
    segments, x = given_segments(draw)
    y = features("iid", segments.starts.shape[0], x.shape[1], x.dtype, draw(seeds))
    return Call(fc.segment_expand, {"y": y, "segments": segments}, ("y",))


def greedy_segments(draw: Draw) -> Call:
    case = draw(batch())
    threshold = draw(st.sampled_from([-1.0, 0.0, 0.15, 1.0, 1.5, 2.0, torch.inf]))
    max_len = draw(st.none() | st.integers(1, 9) | st.just(2**63 - 1))
    kwargs = {"x": case.x, "threshold": threshold, "max_len": max_len, "compact": draw(st.booleans())}
    return Call(fc.greedy_segments, kwargs | sequences(case))


def integrate_and_fire(draw: Draw) -> Call:
    case = draw(batch())
    alpha = scalars(draw, case.x.shape[:-1], draw(st.sampled_from(DTYPES))).nan_to_num(0, 0, 0).abs().clamp_max(3)
    kwargs: dict[str, Any] = {"x": case.x, "alpha": alpha, **sequences(case)}
    kwargs |= {"beta": draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])), "tail": draw(st.sampled_from([None, 0.0, 0.5, 1]))}
    if draw(st.booleans()):
        count = case.x.shape[0] if case.x.dim() == 3 else len(case.layout.get("cu_seqlens", [0, 0])) - 1
        kwargs["target_lengths"] = integers_like((count,), 0, 9, draw(seeds))
    return Call(fc.integrate_and_fire, kwargs, ("x", "alpha"))


def bipartite_merge(draw: Draw) -> Call:
    case = draw(batch())
    kwargs: dict[str, Any] = {"x": case.x, "rate": draw(st.floats(1, 4)), **sequences(case)}
    kwargs["window"] = draw(st.sampled_from([0, 1, 4, None]))
    if draw(st.booleans()):
        keys = features("iid", case.inside.numel(), 5, draw(st.sampled_from(DTYPES)), draw(seeds))
        kwargs["keys"] = keys.view(*case.x.shape[:-1], 5)
    if draw(st.booleans()):
        kwargs["size"] = integers_like(case.x.shape[:-1], 1, 4, draw(seeds)).to(draw(st.sampled_from(DTYPES)))
    return Call(fc.bipartite_merge, kwargs, ("x",))


def iterative_fusion(draw: Draw) -> Call:
    case = draw(batch())
    kwargs: dict[str, Any] = {"x": case.x, "count": draw(st.integers(1, 9)), **sequences(case)}
    grads = ["x"]
    if draw(st.booleans()):
        kwargs["weights"] = scalars(draw, case.x.shape[:-1], draw(st.sampled_from(DTYPES)))
        grads.append("weights")
    return Call(fc.iterative_fusion, kwargs, tuple(grads))


PLACEHOLDER = 9  # the first id after those of the table


def pack(draw: Draw) -> Call:
    samples, longest = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    dtype, width, index = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 40)), draw(st.sampled_from([32, 64]))
    index = {32: torch.int32, 64: torch.int64}[index]
    ids = integers_like((samples, longest), 4, PLACEHOLDER + 1, draw(seeds)).to(index)
    kwargs: dict[str, Any] = {"input_ids": ids, "compact": draw(st.booleans()), "placeholder": PLACEHOLDER}
    if draw(st.booleans()):
        kwargs["labels"] = integers_like(ids.shape, -100, 9, draw(seeds)).to(index)
    kept = torch.ones(ids.shape, dtype=torch.bool)
    if draw(st.booleans()):
        kept = integers_like(ids.shape, 0, 4, draw(seeds)) > 0
        kwargs["attention_mask"] = kept.long()
    elif draw(st.booleans()):
        sizes = integers_like((samples,), 0, longest + 1, draw(seeds))
        kept, kwargs["lengths"] = torch.arange(longest) < sizes[:, None], sizes.to(index)
    if draw(st.booleans()):  # the rows already contain the audio
        kwargs["inputs_embeds"] = features("smooth", ids.numel(), width, dtype, draw(seeds)).view(*ids.shape, width)
        kwargs["rule"] = draw(every_rule().filter(lambda rule: not isinstance(rule, fc.LabelChange)))
        return Call(fc.pack, kwargs, ("inputs_embeds",))
    audios = int(((ids == PLACEHOLDER) & kept).sum())
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), integers_like((audios,), 0, 6, draw(seeds)).cumsum(0)])
    kwargs |= {"placeholder_counts": 1, "embedding": features("iid", PLACEHOLDER, width, dtype, draw(seeds))}
    kwargs |= {"audio": features("iid", int(cu[-1]), width, dtype, draw(seeds)), "audio_cu_seqlens": cu.to(index)}
    return Call(fc.pack, kwargs, ("embedding", "audio"))


def row_groups(draw: Draw) -> Call:
    case = draw(batch())
    ids = integers_like(case.x.shape[:-1], 0, 3, draw(seeds))
    kwargs: dict[str, Any] = {"input_ids": ids, "placeholder": 2}
    kwargs |= {name: case.layout[name] for name in ("cu_seqlens", "attention_mask") if name in case.layout}
    kwargs["placeholder_counts"] = draw(st.sampled_from([None, 1]))
    return Call(fc.row_groups, kwargs)


def segments_from_mask(draw: Draw) -> Call:
    case = draw(batch())
    kwargs: dict[str, Any] = {"mask": integers_like(case.x.shape[:-1], 0, 2, draw(seeds)), **case.layout}
    kwargs["min_len"] = draw(st.integers(1, 4))
    kwargs["max_len"] = draw(st.none() | st.integers(kwargs["min_len"], 9))
    return Call(fc.segments_from_mask, kwargs | {"compact": draw(st.booleans())})


def segments_from_ids(draw: Draw) -> Call:
    case = draw(batch())
    ids = integers_like(case.x.shape[:-1], -1, 3, draw(seeds))
    return Call(fc.segments_from_ids, {"ids": ids, "compact": draw(st.booleans()), **sequences(case)})


def segments_from_starts(draw: Draw) -> Call:
    case = draw(batch().filter(lambda case: case.x.dim() == 2))
    rows = case.x.shape[0]
    starts = integers_like((draw(st.integers(0, 9)) if rows else 0,), 0, max(rows, 1), draw(seeds))
    return Call(fc.segments_from_starts, {"starts": starts, "num_rows": rows, **sequences(case)})


def normalize_distance(draw: Draw) -> Call:
    case, dtype = draw(batch()), draw(st.sampled_from(DTYPES))
    return Call(fc.normalize_distance, {"d": scalars(draw, case.x.shape[:-1], dtype), **case.layout})


def in_pieces(x: Tensor, rule: fc.Rule, cuts: list[int]) -> list[fc.Streamed]:
    stream = fc.StreamingSegmentPool(rule)
    return [stream(part) for part in x.tensor_split(cuts)] + [stream.flush()]


def streaming(draw: Draw) -> Call:
    case = draw(batch().filter(lambda case: case.x.dim() == 2))
    rule = draw(every_rule().filter(lambda rule: rule.fused or isinstance(rule, fc.Lookback)))
    cuts = sorted(draw(st.lists(st.integers(0, case.x.shape[0]), max_size=4)))
    return Call(in_pieces, {"x": case.x, "rule": rule, "cuts": cuts})


def fired_in_pieces(x: Tensor, alpha: Tensor, beta: float, tail: float | None, cuts: list[int]) -> Any:
    stream = fc.StreamingIntegrateAndFire(beta, tail)
    parts = zip(x.tensor_split(cuts), alpha.tensor_split(cuts), strict=True)
    return [stream(*part) for part in parts] + [stream.flush()]


def streaming_fire(draw: Draw) -> Call:
    kwargs = integrate_and_fire(draw).kwargs
    x, width = kwargs["x"], kwargs["x"].shape[-1]
    cuts = sorted(draw(st.lists(st.integers(0, x.numel() // width), max_size=4)))
    pieces = {"x": x.reshape(-1, width), "alpha": kwargs["alpha"].reshape(-1), "cuts": cuts}
    return Call(fired_in_pieces, pieces | {name: kwargs[name] for name in ("beta", "tail")})


def as_module(build: Callable[..., torch.nn.Module], training: bool) -> Callable[..., Any]:
    """Return a function from a module's options and inputs to its result and its loss."""

    def run(x: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None, **options: Any) -> Any:
        module = build(**options).train(training)
        return module(x, cu_seqlens=cu_seqlens, lengths=lengths), getattr(module, "loss", None)

    return run


def modules(draw: Draw) -> Call:
    case = draw(batch())
    x, width, nn = case.x, case.x.shape[-1], fc.nn
    kind = draw(st.integers(0, 6))
    reduce, ratio = draw(st.sampled_from(REDUCTIONS)), draw(st.floats(1.5, 9))
    max_len = draw(st.none() | st.integers(1, 9))
    build: Callable[..., torch.nn.Module]
    if kind == 0:
        rule = draw(every_rule().filter(lambda rule: not isinstance(rule, fc.LabelChange)))
        build, options = nn.SegmentPool, {"rule": rule, "reduce": reduce, "compact": draw(st.booleans())}
    elif kind == 1:
        build, options = nn.NoveltyPool, {"threshold": draw(st.sampled_from([-1.0, 0.0, 0.15, 1.0, torch.inf]))}
    elif kind == 2:
        build, options = nn.BipartiteMerge, {"rate": ratio, "window": draw(st.sampled_from([0, 1, 4, None]))}
    elif kind == 3:
        build, options = nn.IterativeFusion, {"count": draw(st.integers(1, 9))}
    elif kind == 4:
        build, options = nn.GreedySegments, {"threshold": draw(st.sampled_from([0.0, 0.5, 2.0])), "max_len": max_len}
    elif kind == 5:
        build = lambda **how: nn.IntegrateAndFire(width, **how).to(x.dtype)  # noqa: E731
        options = {"ratio": ratio, "tail": draw(st.sampled_from([None, 0.0, 0.5])), "loss_weight": 0.1}
    else:
        build = lambda **how: nn.LearnedBoundary(width, **how).to(x.dtype)  # noqa: E731
        options = {"ratio": ratio, "reduce": reduce, "loss_weight": 0.1}
    return Call(as_module(build, draw(st.booleans())), {"x": x, **options, **sequences(case)}, ("x",))


CALLS: dict[str, Callable[[Draw], Call]] = {
    function.__name__: function
    for function in (
        segment_pool, adjacent_distance, select_boundaries, segment_reduce, segment_expand, greedy_segments,
        integrate_and_fire, bipartite_merge, iterative_fusion, pack, row_groups, segments_from_mask,
        segments_from_ids, segments_from_starts, normalize_distance, modules, streaming, streaming_fire,
    )
}  # fmt: skip


@st.composite
def calls(draw, name: str) -> Call:
    return CALLS[name](draw)
