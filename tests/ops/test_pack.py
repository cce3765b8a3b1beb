"""``pack`` against a loop over samples that concatenates their rows."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import DTYPES, assert_same_bits, features, offsets, strided

AUDIO = 99  # the placeholder
VOCABULARY = 100


def random_ids(g: torch.Generator, length: int, runs: bool) -> list[int]:
    """Return text ids with any number of audios among them, also at the ends and next to each other."""
    ids: list[int] = []
    while len(ids) < length:
        if torch.rand((), generator=g) < 0.3:
            ids += [AUDIO] * (int(torch.randint(1, 5, (), generator=g)) if runs else 1)
        else:
            ids += torch.randint(0, AUDIO, (int(torch.randint(1, 4, (), generator=g)),), generator=g).tolist()
    return ids[:length]


def split_audios(ids: list[int], runs: bool) -> list[int | str]:
    """Return the ids with each audio as one item."""
    items: list[int | str] = []
    for i, token in enumerate(ids):
        if token != AUDIO:
            items.append(token)
        elif not runs or i == 0 or ids[i - 1] != AUDIO:
            items.append("audio")
    return items


def batch(seed: int, layout: str, runs: bool) -> dict[str, Any]:
    """Return ids, labels, mask and audios of a few samples, and the rows that packing them must give."""
    g = torch.Generator().manual_seed(seed)
    lengths = [int(n) for n in torch.randint(0, 9, (4,), generator=g)]
    lengths[int(torch.randint(0, 4, (), generator=g))] = 12
    samples = [random_ids(g, n, runs) for n in lengths]
    items = [split_audios(ids, runs) for ids in samples]
    num_audios = sum(item == "audio" for sample in items for item in sample)
    sizes = torch.randint(0, 6, (num_audios,), generator=g).tolist()
    width = 14
    kwargs: dict[str, Any] = {}
    place = []  # the row of each id in the input
    if layout == "packed":
        ids = torch.tensor([token for sample in samples for token in sample])
        kwargs["cu_seqlens"] = offsets(tuple(lengths))
        place = [list(range(sum(lengths[:b]), sum(lengths[: b + 1]))) for b in range(4)]
    else:
        # Padding contains ids that must not be looked up.
        ids = torch.full((4, width), 10_000)
        mask = torch.zeros(4, width, dtype=torch.int64)
        for b, sample in enumerate(samples):
            columns = list(range(len(sample)))
            if layout == "left":
                columns = [width - len(sample) + i for i in columns]
            elif layout == "holes" and runs is False:
                columns = sorted(torch.randperm(width, generator=g)[: len(sample)].tolist())
            ids[b, columns] = torch.tensor(sample, dtype=torch.int64)
            mask[b, columns] = 1
            place.append([b * width + i for i in columns])
        kwargs |= {"lengths": torch.tensor(lengths)} if layout == "lengths" else {"attention_mask": mask}
    labels = torch.arange(ids.numel()).view(ids.shape) + 1000
    rows, targets, counts, audio, audio_row = [], [], [0], 0, 0
    for b in range(4):
        begin = len(rows)
        i = 0
        for item in items[b]:
            if item == "audio":
                for _ in range(sizes[audio]):
                    rows.append(ids.numel() + audio_row)
                    targets.append(-100)
                    audio_row += 1
                audio += 1
                while runs and i + 1 < len(samples[b]) and samples[b][i + 1] == AUDIO:
                    i += 1
            else:
                rows.append(place[b][i])
                targets.append(-100 if len(rows) - 1 == begin else 1000 + place[b][i])
            i += 1
        counts.append(len(rows))
    return {
        "ids": ids,
        "labels": labels,
        "kwargs": kwargs,
        "audio_cu_seqlens": offsets(tuple(sizes)),
        "rows": torch.tensor(rows, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "counts": torch.tensor(counts, dtype=torch.int32),
        "counts_arg": None if runs else 1,
    }


LAYOUTS = ("packed", "right", "left", "holes", "lengths")


# Layouts and runs determine which rows are text, padding and audio. Forms: ids and a table, or embeddings.
@pytest.mark.parametrize(
    ("layout", "runs", "form", "backend"),
    [
        *((layout, runs, "ids", None) for layout in LAYOUTS for runs in (True, False)),
        *((layout, True, "embeds", None) for layout in LAYOUTS),
        *(
            (layout, runs, form, "reference")
            for layout, runs, form in (
                ("packed", True, "ids"),
                ("left", True, "ids"),
                ("holes", False, "ids"),
                ("lengths", False, "embeds"),
            )
        ),
    ],
)
def test_same_as_a_loop(layout: str, runs: bool, form: str, backend: str | None):
    with contextlib.nullcontext() if backend is None else fc.backend(backend):
        same_as_a_loop(layout, runs, form)


def same_as_a_loop(layout: str, runs: bool, form: str) -> None:
    for seed in range(12):
        case = batch(seed, layout, runs)
        dtype, width = DTYPES[seed % 4], (8, 7, 64)[seed % 3]
        table = features("iid", VOCABULARY, width, dtype).requires_grad_()
        audio = features("iid", int(case["audio_cu_seqlens"][-1]), width, dtype, seed=1).requires_grad_()
        embeds = table[case["ids"].clamp(0, VOCABULARY - 1)].detach().requires_grad_()
        text = {"input_ids": case["ids"]} | ({"embedding": table} if form == "ids" else {"inputs_embeds": embeds})
        everything = torch.cat(
            [(embeds if form == "embeds" else table[case["ids"].clamp_max(99)]).flatten(0, -2), audio]
        )
        expected = everything[case["rows"]]
        grad = features("iid", len(expected), width, dtype, seed=2)
        leaves = [table if form == "ids" else embeds, audio]
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for compact in (True, False):
            packed = fc.pack(
                **text,
                audio=audio,
                audio_cu_seqlens=case["audio_cu_seqlens"],
                placeholder=AUDIO,
                placeholder_counts=case["counts_arg"],
                labels=case["labels"],
                compact=compact,
                **case["kwargs"],
            )
            count = len(expected)
            assert compact <= (len(packed.source) == count)
            assert_same_bits(packed.inputs_embeds[:count].detach(), expected.detach())
            assert_same_bits(packed.source[:count], case["rows"])
            assert_same_bits(packed.cu_seqlens, case["counts"])
            assert_same_bits(packed.labels[:count], case["targets"])
            positions = torch.cat([torch.arange(int(n)) for n in case["counts"].diff()])
            assert_same_bits(packed.position_ids[:count], positions)
            assert packed.max_seqlen >= int(case["counts"].diff().max())
            tail = slice(count, None)
            assert not packed.inputs_embeds[tail].any() and not packed.position_ids[tail].any()
            assert (packed.source[tail] == -1).all() and (packed.labels[tail] == -100).all()
            padded_grad = torch.cat([grad, grad.new_full((len(packed.source) - count, width), 3)])
            grads = torch.autograd.grad(packed.inputs_embeds, leaves, padded_grad)
            assert_same_bits(grads[1], expected_grads[1])
            if form == "embeds":
                assert_same_bits(grads[0], expected_grads[0])
            else:
                torch.testing.assert_close(grads[0], expected_grads[0], rtol=2e-2, atol=1e-2)


def test_gradient_of_the_table_is_that_of_an_embedding():
    case = batch(3, "packed", True)
    ids = torch.where(case["ids"] == AUDIO, 1, case["ids"] % 3)
    table = torch.randn(VOCABULARY, 16, requires_grad=True)
    grad = torch.randn(len(ids), 16)
    packed = fc.pack(ids, table, cu_seqlens=case["kwargs"]["cu_seqlens"])
    expected = torch.autograd.grad(torch.nn.functional.embedding(ids, table), table, grad)[0]
    assert_same_bits(torch.autograd.grad(packed.inputs_embeds, table, grad)[0], expected)


def test_gradients_of_any_order():
    ids = torch.tensor([[1, AUDIO, 2], [AUDIO, 3, 1]])
    cu = torch.tensor([0, 2, 3])

    def from_table(table: Tensor, audio: Tensor) -> Tensor:
        return fc.pack(ids, table, audio, audio_cu_seqlens=cu, placeholder=AUDIO, compact=False).inputs_embeds

    def from_embeds(embeds: Tensor, audio: Tensor) -> Tensor:
        return fc.pack(ids, inputs_embeds=embeds, audio=audio, audio_cu_seqlens=cu, placeholder=AUDIO).inputs_embeds

    audio = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    embeds = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for f, text in ((from_table, table), (from_embeds, embeds)):
        torch.autograd.gradcheck(f, (text, audio))
        torch.autograd.gradgradcheck(f, (text, audio))


@pytest.mark.parametrize("rule", (None, fc.Uniform(3), fc.LocalMax(), fc.Threshold(0.5, max_len=4)), ids=str)
@pytest.mark.parametrize("compact", (True, False))
def test_merged_embeds_are_pooled_and_packed_in_one_pass(rule: fc.Rule | None, compact: bool):
    """The input is the merged embeddings of a model, padded on both sides, with neighbouring audios."""
    group = torch.tensor(
        [[-1, -1, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0, -1], [0, 3, 3, 3, 3, 3, 0, 0, 4, 4, 4, -1, -1, -1]]
    ).int()
    x = features("smooth", 28, 48, torch.float32).view(2, 14, 48).requires_grad_()
    labels = torch.arange(28).view(2, 14) + 100
    packed = fc.pack(inputs_embeds=x, row_group=group, rule=rule, labels=labels, compact=compact)
    rows, targets, counts, sources = [], [], [0], []
    for b in range(2):
        begin = len(rows)
        runs = group[b].unique_consecutive(return_counts=True)
        at = 0
        for k, size in zip(*(r.tolist() for r in runs), strict=True):
            part = x[b, at : at + size]
            if k == 0 or (k > 0 and rule is None):
                rows += list(part)
                sources += range(b * 14 + at, b * 14 + at + size)
                targets += (labels[b, at : at + size] if k == 0 else torch.full((size,), -100)).tolist()
            elif k > 0:
                pooled = fc.segment_pool(part, rule=rule)
                rows += list(pooled.values)
                sources += (pooled.segments.starts + b * 14 + at).tolist()
                targets += [-100] * len(pooled.values)
            at += size
        targets[begin] = -100
        counts.append(len(rows))
    expected = torch.stack(rows)
    count = len(expected)
    assert_same_bits(packed.inputs_embeds[:count].detach(), expected.detach())
    assert packed.cu_seqlens.tolist() == counts
    assert packed.labels.tolist() == targets + [-100] * (len(packed.labels) - count)
    assert packed.source.tolist() == sources + [-1] * (len(packed.source) - count)
    assert packed.position_ids.tolist()[:count] == [*range(counts[1]), *range(count - counts[1])]
    grad = features("iid", len(packed.source), 48, torch.float32, seed=3)
    grads = [torch.autograd.grad(y, x, g)[0] for y, g in ((packed.inputs_embeds, grad), (expected, grad[:count]))]
    torch.testing.assert_close(grads[0], grads[1])


def test_pooled_audio():
    frames = features("smooth", 60, 16, torch.bfloat16).requires_grad_()
    pooled = fc.segment_pool(frames, cu_seqlens=offsets((40, 20)))
    table = features("iid", VOCABULARY, 16, torch.bfloat16)
    ids = torch.tensor([1, AUDIO, 2, 3, AUDIO, AUDIO, AUDIO])
    packed = fc.pack(ids, table, pooled, placeholder=AUDIO, cu_seqlens=offsets((3, 4)), exact_max_seqlen=True)
    a, b = pooled.values.split(pooled.segments.counts.tolist())
    assert_same_bits(packed.inputs_embeds, torch.cat([table[1:2], a, table[2:3], table[3:4], b]))
    assert packed.max_seqlen == max(len(a) + 2, len(b) + 1)
    packed.inputs_embeds.float().square().sum().backward()
    assert frames.grad.abs().sum() > 0
    # With an upper bound of rows, the tail is not audio; the caller must pass `compact=False` here, too.
    bound = fc.segment_pool(frames, cu_seqlens=offsets((40, 20)), compact=False)
    loose = fc.pack(ids, table, bound, placeholder=AUDIO, cu_seqlens=offsets((3, 4)), compact=False)
    assert_same_bits(loose.inputs_embeds[: len(packed.source)], packed.inputs_embeds)
    assert not loose.inputs_embeds[len(packed.source) :].any()
    with pytest.raises(ValueError, match="audio_cu_seqlens must end at the number of audio rows"):
        fc.pack(ids, table, bound, placeholder=AUDIO, cu_seqlens=offsets((3, 4)))


def test_strides():
    table, audio = features("iid", VOCABULARY, 16, torch.float32), features("iid", 7, 16, torch.float32, seed=1)
    ids = torch.tensor([3, AUDIO, 99 - 1, 0])
    expected = torch.cat([table[3:4], audio, table[98:99], table[:1]])
    for (_, same_table), (_, same_audio) in zip(strided(table), strided(audio), strict=True):
        assert_same_bits(fc.pack(ids, same_table, same_audio, placeholder=AUDIO).inputs_embeds, expected)
        embeds = same_table[ids]
        assert_same_bits(
            fc.pack(
                ids[:, None].expand(4, 2)[:, 0], inputs_embeds=embeds, audio=same_audio, placeholder=AUDIO
            ).inputs_embeds,
            expected,
        )


def test_large_rows_use_every_thread():
    """The rows are large enough for the copy to use several threads."""
    table, audio = torch.randn(1000, 2048), torch.randn(3000, 2048)
    ids = torch.randint(0, 1000, (8, 200))
    ids[:, 100] = 1000
    cu = torch.arange(9) * 375
    packed = fc.pack(ids, table, audio, audio_cu_seqlens=cu, placeholder=1000)
    everything = torch.cat([table, audio])
    index = torch.cat(
        [torch.cat([i[:100], 1000 + torch.arange(k, k + 375), i[101:]]) for i, k in zip(ids, cu.tolist(), strict=False)]
    )
    assert_same_bits(packed.inputs_embeds, everything[index])


# Row groups


def runs(group: Tensor) -> list[list[Any]]:
    """Return the dropped rows, text rows and audio lengths of each sample."""
    said = []
    for sample in group.tolist():
        items: list[Any] = []
        for i, k in enumerate(sample):
            if k <= 0:
                items.append({0: "text", -1: "dropped"}[k])
            elif i and sample[i - 1] == k:
                items[-1] += 1
            else:
                items.append(1)
        said.append(items)
    return said


def test_row_groups():
    ids = torch.tensor([[5, AUDIO, AUDIO, 6, AUDIO], [AUDIO, AUDIO, 7, 8, AUDIO]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    counts = torch.tensor([2, 1, 1, 1, 1])
    assert runs(fc.row_groups(ids, AUDIO)) == [["text", 2, "text", 1], [2, "text", "text", 1]]
    assert runs(fc.row_groups(ids, AUDIO, placeholder_counts=1)) == [
        ["text", 1, 1, "text", 1],
        [1, 1, "text", "text", 1],
    ]
    grouped = fc.row_groups(ids, AUDIO, placeholder_counts=counts)
    assert runs(grouped) == [["text", 2, "text", 1], [1, 1, "text", "text", 1]] and grouped.dtype == torch.int32
    dropped = [["dropped", 2, "text", 1], [2, "text", "text", "dropped"]]
    assert runs(fc.row_groups(ids, AUDIO, attention_mask=mask)) == dropped
    dropped[1][:1] = [1, 1]
    assert runs(fc.row_groups(ids, AUDIO, attention_mask=mask, placeholder_counts=counts[:4])) == dropped
    held = fc.row_groups(
        torch.full((1, 4), AUDIO), AUDIO, attention_mask=mask[:1, :4], placeholder_counts=torch.tensor([1, 2])
    )
    assert runs(held) == [["dropped", 1, 2]]  # a masked placeholder is not an audio
    for how in (None, 1, counts):
        flat = fc.row_groups(ids.view(-1).int(), AUDIO, cu_seqlens=torch.tensor([0, 5, 10]), placeholder_counts=how)
        assert torch.equal(flat.view(2, 5) > 0, ids == AUDIO) and flat.dtype == torch.int32


def test_adjacent_audios_stay_separate():
    x = torch.ones(1, 8, 4)
    ids = torch.full((1, 8), AUDIO)
    for counts, expected in ((None, 1), (torch.tensor([3, 5]), 2), (1, 8)):
        packed = fc.pack(ids, inputs_embeds=x, rule=fc.LocalMax(), placeholder=AUDIO, placeholder_counts=counts)
        assert len(packed.source) == expected


@pytest.mark.parametrize("backend", (None, "reference"))
def test_an_audio_ends_with_its_sample(backend: str | None):
    """The next sample can start with the same row group."""
    table, audio = torch.arange(5.0)[:, None], torch.arange(10.0, 15.0)[:, None]
    group, cu = torch.tensor([[0, 1], [1, 0]]).int(), torch.tensor([0, 3, 5])
    with contextlib.nullcontext() if backend is None else fc.backend(backend):
        for ids, layout in (
            (torch.tensor([[1, 0], [0, 2]]), {}),
            (torch.tensor([1, 0, 0, 2]), {"cu_seqlens": torch.tensor([0, 2, 4])}),
        ):
            packed = fc.pack(ids, table, audio, audio_cu_seqlens=cu, row_group=group.view(ids.shape), **layout)
            assert packed.inputs_embeds[:, 0].tolist() == [1, 10, 11, 12, 13, 14, 2]
            assert packed.cu_seqlens.tolist() == [0, 4, 7]


# Unpacking


@pytest.mark.parametrize("side", ["right", "left"])
def test_unpack_is_the_inverse(side):
    case = batch(5, "right", True)
    table = torch.randn(VOCABULARY, 6)
    audio = torch.randn(int(case["audio_cu_seqlens"][-1]), 6)
    for compact in (True, False):
        packed = fc.pack(
            case["ids"],
            table,
            audio,
            audio_cu_seqlens=case["audio_cu_seqlens"],
            placeholder=AUDIO,
            compact=compact,
            **case["kwargs"],
        )
        padded, mask = packed.unpack(side=side)
        lengths = case["counts"].diff().tolist()
        assert padded.shape == (4, max(lengths), 6) and mask.sum(1).tolist() == lengths
        for row, kept, size, begin in zip(padded, mask.bool(), lengths, case["counts"].tolist(), strict=False):
            assert kept[:size].all() if side == "right" else kept[max(lengths) - size :].all()
            assert_same_bits(row[kept], packed.inputs_embeds[begin : begin + size])
            assert not row[~kept].any()
        values = torch.randn(1, len(packed.source), 2, 3, dtype=torch.float64, requires_grad=True)
        assert packed.unpack(values)[0].shape == (4, max(lengths), 2, 3)
        torch.autograd.gradcheck(lambda v, packed=packed: packed.unpack(v, side)[0], values)
        again = fc.pack(inputs_embeds=padded, attention_mask=mask)
        assert_same_bits(again.inputs_embeds, packed.inputs_embeds[: len(again.source)])
    one = fc.pack(torch.tensor([3]), table)
    for shape, unpacked in (((1, 7), (1, 1, 7)), ((1, 1), (1, 1, 1)), ((1, 1, 7), (1, 1, 7)), ((1,), (1, 1))):
        assert one.unpack(torch.randn(shape))[0].shape == unpacked
    nothing = fc.pack(torch.tensor([[3]]), table, attention_mask=torch.zeros(1, 1), compact=False)
    assert nothing.unpack()[0].shape == (1, 0, 6) and nothing.unpack(torch.randn(1, 1, 9))[1].shape == (1, 0)
    with pytest.raises(ValueError, match=re.escape(f"values must have shape [{len(packed.source)}, ...]")):
        packed.unpack(torch.randn(3, 2))
    with pytest.raises(ValueError, match="side must be 'right' or 'left', got 'middle'"):
        packed.unpack(side="middle")


# Positions in time


def loop_positions(lengths: list[int]) -> tuple[list[int], int]:
    """Return the position of each row of one sample, and the one that follows."""
    found, begin = [], 0
    for length in lengths:
        found.append(begin + (length - 1) // 2)  # the lower one of two middle frames
        begin += length
    return found, begin


@pytest.mark.parametrize("compact", (True, False))
@pytest.mark.parametrize("layout", ("right", "left", "packed", "lengths"))
def test_positions_in_time_are_those_of_a_loop(layout: str, compact: bool):
    case = batch(11, layout, True)
    counts = case["audio_cu_seqlens"]
    audio, frames = torch.randn(int(counts[-1]), 6), torch.randint(1, 8, (int(counts[-1]),))
    common = {"audio_cu_seqlens": counts, "placeholder": AUDIO, "compact": compact, **case["kwargs"]}
    packed = fc.pack(case["ids"], torch.randn(VOCABULARY, 6), audio, audio_lengths=frames, positions="time", **common)
    offsets_of_samples = packed.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(zip(offsets_of_samples[:-1], offsets_of_samples[1:], strict=True)):
        rows = [s - case["ids"].numel() for s in packed.source[begin:end].tolist()]
        lengths = [1 if row < 0 else int(frames[row]) for row in rows]
        assert packed.row_lengths[begin:end].tolist() == lengths
        positions, following = loop_positions(lengths)
        assert packed.position_ids[begin:end].tolist() == positions and int(packed.next_positions[b]) == following
    assert not packed.position_ids[offsets_of_samples[-1] :].any() and packed.in_time
    plain = fc.pack(case["ids"], torch.randn(VOCABULARY, 6), audio, **common)
    assert plain.row_lengths is None and torch.equal(plain.next_positions, plain.cu_seqlens.diff().long())
    for side in ("right", "left"):  # positions do not say where a row is in its sample
        padded, mask = packed.unpack(packed.position_ids, side)
        assert padded.dtype == torch.int64
        assert padded[mask.bool()].tolist() == packed.position_ids[: offsets_of_samples[-1]].tolist()
        timed, untimed = (p.unpack(torch.arange(len(p.source), dtype=torch.float64), side)[0] for p in (packed, plain))
        assert torch.equal(timed, untimed)


@pytest.mark.parametrize("rule", ("uniform:4", "min-variance:rate=3", "local-max"))
def test_merged_embeds_have_the_positions_of_pooled_audio(rule: str):
    frames, text = torch.randn(11, 6), torch.randn(5, 6)
    merged = torch.cat([text[:2], frames, text[2:]])
    groups = torch.tensor([0] * 2 + [1] * 11 + [0] * 3, dtype=torch.int32)
    one = fc.pack(inputs_embeds=merged, row_group=groups, rule=rule, positions="time")
    ids, pooled = torch.tensor([0, 1, AUDIO, 2, 3, 4]), fc.segment_pool(frames, rule=rule)
    two = fc.pack(ids, text, pooled, placeholder=AUDIO, positions="time")
    for name in ("inputs_embeds", "position_ids", "row_lengths", "next_positions"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.next_positions.tolist() == [16] and one.position_ids[-3:].tolist() == [13, 14, 15]
    bias = one.model_inputs(proportional_attention=True)["key_bias"]
    assert torch.equal(bias, one.row_lengths.double().log()) and "key_bias" not in one.model_inputs()


def test_positions_need_the_lengths_of_the_audio():
    ids, table, audio = torch.tensor([1, AUDIO]), torch.randn(9, 6), torch.randn(2, 6)
    lengths = torch.tensor([2, 3])
    common = {"placeholder": AUDIO}
    with pytest.raises(ValueError, match="positions='time' needs audio as Pooled, or audio_lengths, which is None"):
        fc.pack(ids, table, audio, positions="time", **common)
    with pytest.raises(ValueError, match="proportional attention needs row_lengths, which is None"):
        fc.pack(ids, table, audio, **common).model_inputs(proportional_attention=True)
    with pytest.raises(ValueError, match="positions must be 'compact' or 'time', got 'middle'"):
        fc.pack(ids, table, audio, audio_lengths=lengths, positions="middle", **common)
    with pytest.raises(ValueError, match=re.escape("audio_lengths must have shape [2], got [1]")):
        fc.pack(ids, table, audio, audio_lengths=lengths[:1], **common)
    with pytest.raises(ValueError, match="audio_lengths must be at least 1, got 0"):
        fc.pack(ids, table, audio, audio_lengths=lengths - 2, **common)
    with pytest.raises(TypeError, match="audio_lengths must be int32 or int64, got torch.float32"):
        fc.pack(ids, table, audio, audio_lengths=lengths.float(), **common)
    with pytest.raises(ValueError, match="audio_lengths needs audio as a tensor"):
        fc.pack(ids, table, fc.segment_pool(audio, rule="uniform:2"), audio_lengths=lengths, **common)


# Tracing


def test_compiles_and_exports():
    ids = torch.tensor([[1, AUDIO, AUDIO, 2], [3, 4, AUDIO, 0]])
    labels = ids + 1
    table = torch.randn(VOCABULARY, 16, requires_grad=True)
    audio = torch.randn(7, 16, requires_grad=True)
    cu = torch.tensor([0, 3, 7])

    def run(ids: Tensor, table: Tensor, audio: Tensor, compact: bool) -> fc.PackedInputs:
        return fc.pack(ids, table, audio, audio_cu_seqlens=cu, placeholder=AUDIO, labels=labels, compact=compact)

    for compact in (True, False):
        eager = run(ids, table, audio, compact)
        torch._dynamo.reset()
        traced = torch.compile(run, backend="aot_eager", fullgraph=True)(ids, table, audio, compact)
        for name in ("inputs_embeds", "cu_seqlens", "position_ids", "labels", "source"):
            assert_same_bits(getattr(traced, name).detach(), getattr(eager, name).detach(), name)
        grad = torch.randn_like(eager.inputs_embeds)
        grads = [torch.autograd.grad(p.inputs_embeds, [table, audio], grad) for p in (eager, traced)]
        assert_same_bits(grads[0][0], grads[1][0])
        assert_same_bits(grads[0][1], grads[1][1])

    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, audio: Tensor) -> fc.PackedInputs:
            return run(ids, table.detach(), audio, False)

    program = torch.export.export(Model(), (ids, audio.detach()))
    assert_same_bits(program.module()(ids, audio.detach()).inputs_embeds, eager.inputs_embeds.detach())


def test_exports_with_dynamic_shapes():
    table, dim = torch.randn(VOCABULARY, 16), torch.export.Dim

    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, audio: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
            packed = fc.pack(ids, table, audio, audio_cu_seqlens=cu, placeholder=AUDIO, compact=False)
            return packed.inputs_embeds, packed.unpack(packed.inputs_embeds * 2)[1].sum(1)

    def inputs(samples: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.arange(samples * 4).view(samples, 4) % 50
        ids[:, 1:3] = AUDIO
        return ids, torch.randn(samples * rows, 16), torch.arange(samples + 1) * rows

    shapes = ({0: dim("b", min=2, max=64)}, {0: dim("m", min=2, max=512)}, {0: dim("a", min=3, max=65)})
    program = torch.export.export(Model(), inputs(2, 3), dynamic_shapes=shapes, strict=False)
    for size in ((2, 3), (5, 4)):
        arguments = inputs(*size)
        expected = Model()(*arguments)
        for a, b in zip(program.module()(*arguments), expected, strict=True):
            assert_same_bits(a, b)
        assert expected[1].tolist() == [2 + size[1]] * size[0]


def test_counts_are_checked_where_values_cannot_be_read():
    ids, counts = torch.tensor([[AUDIO, AUDIO, 5, AUDIO]]), torch.tensor([2, 1])

    def run(counts: Tensor) -> Tensor:
        return fc.row_groups(ids, AUDIO, placeholder_counts=counts)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert compiled(counts).tolist() == run(counts).tolist() == [[1, 1, 0, 2]]
    with pytest.raises(RuntimeError, match="placeholder_counts does not match the placeholders of input_ids"):
        compiled(torch.tensor([1, 2]))


def test_function_transforms_are_refused():
    for f in (
        lambda x: fc.pack(inputs_embeds=x).inputs_embeds.sum(),
        lambda x: fc.pack(torch.tensor([1, 2]), x).inputs_embeds.sum(),
    ):
        with pytest.raises(NotImplementedError, match="does not support this transform of torch.func"):
            torch.func.grad(f)(torch.randn(3, 4))


def test_a_placeholder_outside_of_the_dtype_of_the_ids_matches_none():
    ids = torch.tensor([0, 5, 0], dtype=torch.int32)
    assert fc.row_groups(ids, 2**40).tolist() == [0, 0, 0]
