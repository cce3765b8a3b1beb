"""``pack`` against what people write: samples of text with an audio each, to the rows of a decoder's input.

Every form starts from the same: padded ids with a placeholder an audio (or a run of them, where a form needs that), an
embedding table, pooled audio. What it gives is compared with a loop over samples before it is timed; a padded result
row by row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from benchmarks.harness.cases import buffer_count, random_lengths
from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.suites import compiled
from benchmarks.suites.checks import WrongResult

VOCABULARY = 32_000
OURS, CLONE = "fastcompress.pack", "clone of the same bytes"


@dataclass(frozen=True)
class PackCase:
    """Rows of audio and ids of text of each sample, and the width of a row."""

    name: str
    audio: tuple[int, ...]
    text: tuple[int, ...]
    width: int

    @property
    def tokens(self) -> int:
        """Packed rows."""
        return sum(self.audio) + sum(self.text)


CASES = (
    PackCase("32 samples", random_lengths(32, 150, 190, seed=1), random_lengths(32, 30, 50, seed=2), 3584),
    PackCase("1 sample", (170,), (40,), 3584),
)
QUICK = PackCase("quick", random_lengths(4, 20, 60, seed=1), random_lengths(4, 5, 30, seed=2), 256)


@dataclass(frozen=True)
class Batch:
    """A batch as the forms take it.

    Attributes:
        ids, mask: ``[B, L]``, one placeholder (``VOCABULARY``) an audio, padded on the right.
        long_ids, long_mask: the same with a placeholder for each row of audio, as processors of transformers have it.
        audio: ``[M, H]``, ``audio_cu_seqlens`` ``[B + 1]``.
        places: where in its sample each audio stands.
    """

    case: PackCase
    ids: Tensor
    mask: Tensor
    long_ids: Tensor
    long_mask: Tensor
    table: Tensor
    audio: Tensor
    audio_cu_seqlens: Tensor
    places: tuple[int, ...]


def batch(case: PackCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """The same for the same arguments."""
    g = torch.Generator().manual_seed(0)
    places = tuple(text // 3 for text in case.text)
    short, long = [], []
    for text, count, place in zip(case.text, case.audio, places, strict=True):
        ids = torch.randint(0, VOCABULARY, (text,), generator=g)
        marker = torch.full((count,), VOCABULARY)
        short.append(torch.cat([ids[:place], marker[:1], ids[place:]]))
        long.append(torch.cat([ids[:place], marker, ids[place:]]))
    padded = [
        (
            pad_sequence(rows, batch_first=True).to(device),
            pad_sequence([torch.ones(len(ids)).long() for ids in rows], batch_first=True).to(device),
        )
        for rows in (short, long)
    ]
    table = torch.randn(VOCABULARY, case.width, generator=g).to(dtype)
    audio = torch.randn(sum(case.audio), case.width, generator=g).to(dtype)
    cu = torch.tensor([0, *case.audio]).cumsum(0).int()
    return Batch(case, *padded[0], *padded[1], table.to(device), audio.to(device), cu.to(device), places)


def batches(case: PackCase, dtype: torch.dtype, last_level_cache: int) -> list[Batch]:
    """Equal values in different memory, to rotate through."""
    first = batch(case, dtype)
    audio = first.audio
    count = buffer_count(audio.nbytes, last_level_cache)
    return [first, *(Batch(**(vars(first) | {"audio": audio.clone()})) for _ in range(count - 1))]


# --- forms: a batch to [T, H], or padded [B, S, H] -------------------------------------------------------------------


def fastcompress_pack(batch: Batch, compact: bool = True) -> Tensor:
    """The library: offsets, positions and the map back as well."""
    packed = fc.pack(
        batch.ids,
        batch.table,
        batch.audio,
        audio_cu_seqlens=batch.audio_cu_seqlens,
        placeholder=VOCABULARY,
        attention_mask=batch.mask,
        compact=compact,
    )
    return packed.inputs_embeds


def _pieces(batch: Batch) -> list[list[Tensor]]:
    """Text, audio, text of each sample, all ids looked up at once."""
    texts = F.embedding(batch.ids.clamp_max(VOCABULARY - 1), batch.table)
    audios = batch.audio.split(list(batch.case.audio))
    return [
        [row[:place], audio, row[place + 1 : text + 1]]
        for row, audio, place, text in zip(texts, audios, batch.places, batch.case.text, strict=True)
    ]


def flat_cat(batch: Batch) -> Tensor:
    """One ``torch.cat`` of the pieces of all samples."""
    return torch.cat([piece for pieces in _pieces(batch) for piece in pieces])


def cat_per_sample(batch: Batch) -> Tensor:
    """A ``torch.cat`` a sample, and one of the samples."""
    return torch.cat([torch.cat(pieces) for pieces in _pieces(batch)])


def cat_and_pad(batch: Batch) -> Tensor:
    """A ``torch.cat`` a sample, padded."""
    return pad_sequence([torch.cat(pieces) for pieces in _pieces(batch)], batch_first=True)


def masked_scatter(batch: Batch) -> Tensor:
    """As transformers merges audio into placeholders: padded."""
    is_audio = batch.long_ids == VOCABULARY
    embeds = F.embedding(batch.long_ids.masked_fill(is_audio, 0), batch.table)
    return embeds.masked_scatter(is_audio[..., None].expand_as(embeds), batch.audio)


def masked_scatter_packed(batch: Batch) -> Tensor:
    """The same without the padding."""
    ids = batch.long_ids[batch.long_mask.bool()]
    is_audio = ids == VOCABULARY
    embeds = F.embedding(ids.masked_fill(is_audio, 0), batch.table)
    return embeds.masked_scatter(is_audio[:, None].expand_as(embeds), batch.audio)


def index_copy(batch: Batch) -> Tensor:
    """Text and audio, each copied to its rows."""
    ids = batch.long_ids[batch.long_mask.bool()]
    is_audio = ids == VOCABULARY
    text, audio = (~is_audio).nonzero().squeeze(1), is_audio.nonzero().squeeze(1)
    out = batch.table.new_empty(len(ids), batch.table.shape[1])
    out = out.index_copy(0, text, F.embedding(ids[text], batch.table))
    return out.index_copy(0, audio, batch.audio)


def _gather(ids: Tensor, is_audio: Tensor, place: Tensor, audio: Tensor, table: Tensor) -> Tensor:
    return torch.where(is_audio[:, None], audio[place], table[ids])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_gather, dynamic=True)


class _Gather(torch.autograd.Function):
    """Compiled, and its backward a gather as well: autograd's adds to rows one after the other."""

    @staticmethod
    def forward(ctx: Any, audio: Tensor, ids: Tensor, is_audio: Tensor, place: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(is_audio)
        return _compiled()(ids, is_audio, place, audio, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad[ctx.saved_tensors[0]], None, None, None, None


def compiled_gather(batch: Batch) -> Tensor:
    """``torch.compile``: each row from the table or from the audio, in one loop, for batches of any lengths; a ``cat``
    would be compiled for those of one batch, which takes seconds."""
    ids = batch.long_ids[batch.long_mask.bool()]
    is_audio = ids == VOCABULARY
    place = (is_audio.cumsum(0) - 1).clamp_min(0)
    rows: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]  # of torch
        batch.audio, ids.masked_fill(is_audio, 0), is_audio, place, batch.table
    )
    return rows


def jagged_select(batch: Batch) -> Tensor:
    """FBGEMM: text and audio as one jagged tensor of pieces, selected in their order."""
    importlib.import_module("fbgemm_gpu")
    device, count = batch.ids.device, len(batch.places)
    is_text = batch.mask.bool() & (batch.ids != VOCABULARY)
    rows = torch.cat([F.embedding(batch.ids[is_text], batch.table), batch.audio])
    place, text = torch.tensor(batch.places, device=device), torch.tensor(batch.case.text, device=device)
    lengths = torch.cat([torch.stack([place, text - place], 1).flatten(), batch.audio_cu_seqlens.diff()])
    sample = torch.arange(count, device=device)
    order = torch.stack([2 * sample, 2 * count + sample, 2 * sample + 1], 1).flatten()
    selected: Tensor = torch.ops.fbgemm.jagged_index_select(rows, lengths, order)[0]
    return selected


FORMS: dict[str, Callable[[Batch], Tensor]] = {
    OURS: fastcompress_pack,
    "one flat cat": flat_cat,
    "cat per sample": cat_per_sample,
    "cat per sample, padded": cat_and_pad,
    "index_copy": index_copy,
    "masked_scatter, packed": masked_scatter_packed,
    "masked_scatter, padded": masked_scatter,
    "compile, gather": compiled_gather,
    "FBGEMM, jagged_index_select": jagged_select,
}
#: Of forms that need a package which may not be there.
MODULES = {"FBGEMM, jagged_index_select": "fbgemm_gpu"}
#: Hand-written forms with the same result, and the path that transformers takes.
HAND_WRITTEN = ("one flat cat", "cat per sample", "index_copy")
TRANSFORMERS = "masked_scatter, padded"


def forms() -> dict[str, Callable[[Batch], Tensor]]:
    """Those whose package is installed."""
    missing = {name for name, module in MODULES.items() if importlib.util.find_spec(module) is None}
    return {name: form for name, form in FORMS.items() if name not in missing}


def check(name: str, batch: Batch, result: Tensor) -> None:
    """Raises :class:`WrongResult` unless the rows are those of a loop over the samples."""
    expected = []
    for i, (text, place) in enumerate(zip(batch.case.text, batch.places, strict=True)):
        ids = batch.ids[i, : text + 1]
        audio = batch.audio[batch.audio_cu_seqlens[i] : batch.audio_cu_seqlens[i + 1]]
        expected.append(torch.cat([batch.table[ids[:place]], audio, batch.table[ids[place + 1 :]]]))
    rows = result if result.dim() == 2 else result[batch.long_mask.bool()]
    wanted = torch.cat(expected)
    if not torch.equal(rows[: len(wanted)], wanted):
        raise WrongResult(f"{name}: other rows than a loop over the samples")


@dataclass(frozen=True)
class PackTable:
    """Times of a call in seconds, by form."""

    case: PackCase
    dtype: str
    threads: int
    direction: str
    moved: int
    samples: dict[str, Samples]
    disturbance: Disturbance

    def ratio(self, *names: str) -> float:
        """The fastest of some forms as a multiple of ours."""
        return min(self.samples[name].median for name in names) / self.samples[OURS].median


def measure(
    case: PackCase, dtype: torch.dtype, threads: int, reps: int, last_level_cache: int, tries: int
) -> list[PackTable]:
    """Forward, and forward with the gradient of the audio.

    Raises:
        WrongResult: a form does not give the rows of a loop.
    """
    torch.set_num_threads(threads)
    compiled.prepare(threads)
    inputs = batches(case, dtype, last_level_cache)
    for name, form in forms().items():
        check(name, inputs[0], form(inputs[0]))
    leaves = [Batch(**(vars(b) | {"audio": b.audio.detach().requires_grad_()})) for b in inputs]
    outputs = [fastcompress_pack(inputs[0]).clone() for _ in range(buffer_count(case.tokens * case.width * 2, 1 << 20))]
    grad = torch.randn(len(case.text) * batch_width(inputs[0]), case.width).to(dtype)

    def forward(form: Callable[[Batch], Tensor]) -> Callable[[int], Any]:
        return lambda i: form(inputs[i % len(inputs)])

    def both(form: Callable[[Batch], Tensor]) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            batch = leaves[i % len(leaves)]
            out = form(batch)
            rows = grad[: out.numel() // case.width].view(out.shape)
            return out, torch.autograd.grad(out, batch.audio, rows)[0]

        return call

    size = case.tokens * case.width * dtype.itemsize
    tables = []
    for direction, make in (("forward", forward), ("forward+backward", both)):
        functions = {name: make(form) for name, form in forms().items()}
        if direction == "forward":
            functions[CLONE] = lambda i: outputs[i % len(outputs)].clone()
        samples, disturbance = interleave(functions, reps, tries=tries, recall=4 * size)
        name = str(dtype).removeprefix("torch.")
        tables.append(PackTable(case, name, threads, direction, 2 * size, samples, disturbance))
    return tables


def batch_width(batch: Batch) -> int:
    """Rows of a sample of the padded result."""
    return batch.long_ids.shape[1]


def rows(table: PackTable) -> list[Sequence[str]]:
    """For ``report.align``: fastest first."""
    ours = table.samples[OURS].median
    lines: list[Sequence[str]] = [["", "ms", "p10", "p90", "reps", "GB/s", "x ours"]]
    for name, sample in sorted(table.samples.items(), key=lambda item: item[1].median):
        times = [f"{seconds * 1e3:.2f}" for seconds in (sample.median, sample.p10, sample.p90)]
        speed = f"{table.moved / sample.median / 1e9:.1f}" if table.direction == "forward" else ""
        lines.append([name, *times, str(len(sample.seconds)), speed, f"{sample.median / ours:.2f}"])
    return lines


#: Name, least multiple of our time, and of whom.
TARGETS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("against masked_scatter as in transformers", 5.0, (TRANSFORMERS,)),
    ("against the best hand-written form", 1.4, HAND_WRITTEN),
    ("against a clone of the same bytes", 1.0, (CLONE,)),
)
