"""Suite ``pack``: ``fastcompress.pack`` against what people write to merge text and audio for a decoder.

Every form starts from the same: pooled audio, padded ids with one placeholder per audio (or a run of them, where a form
needs that), an embedding table. Its rows are compared with those of a loop over samples before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from benchmarks.harness.cases import cu_seqlens, gradients, random_lengths
from benchmarks.harness.compare import Bench, Implementation, Job, WrongResult, compare
from benchmarks.results import BOTH, FORWARD
from benchmarks.suites import compiled
from benchmarks.suites.segment_pool import ours

NAME = "pack"
VOCABULARY = 32_000


@dataclass(frozen=True)
class Case:
    """Rows of audio and ids of text of each sample, and the width of a row."""

    name: str
    audio: tuple[int, ...]
    text: tuple[int, ...]
    width: int


CASES = (
    Case("32 samples", random_lengths(32, 150, 190, seed=1), random_lengths(32, 30, 50, seed=2), 3584),
    Case("1 sample", (170,), (40,), 3584),
)
QUICK = Case("quick", random_lengths(4, 20, 60, seed=1), random_lengths(4, 5, 30, seed=2), 256)


@dataclass(frozen=True)
class Batch:
    """What the forms take next to the pooled audio, ``[M, H]``.

    Attributes:
        ids, mask: ``[B, L]``, with one placeholder (``VOCABULARY``) per audio, padded on the right.
        long_ids, long_mask: The same with one placeholder per row of audio, as processors of transformers make it.
        table: Embeddings, ``[V, H]``.
        cu_seqlens: Rows of audio before each sample, ``[B + 1]``.
        places: Position of the audio in each sample.
    """

    case: Case
    ids: Tensor
    mask: Tensor
    long_ids: Tensor
    long_mask: Tensor
    table: Tensor
    cu_seqlens: Tensor
    places: tuple[int, ...]

    def long(self) -> tuple[Tensor, Tensor]:
        """Return the ids without padding, with 0 for audio, and whether each is audio."""
        ids = self.long_ids[self.long_mask]
        is_audio = ids == VOCABULARY
        return ids.masked_fill(is_audio, 0), is_audio


def batch_of(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Batch]:
    """Make the audio of a batch and the rest of it, the same for the same arguments."""
    g = torch.Generator().manual_seed(0)
    places = tuple(text // 3 for text in case.text)
    texts = [torch.randint(0, VOCABULARY, (text,), generator=g) for text in case.text]

    def padded(rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        merged = [
            torch.cat([ids[:place], torch.full((count,), VOCABULARY), ids[place:]])
            for ids, place, count in zip(texts, places, rows, strict=True)
        ]
        ids = pad_sequence(merged, batch_first=True, padding_value=-1).to(device)
        return ids.clamp_min(0), ids >= 0

    table = torch.randn(VOCABULARY, case.width, generator=g).to(device, dtype)
    audio = torch.randn(sum(case.audio), case.width, generator=g).to(device, dtype)
    short, long = padded((1,) * len(places)), padded(case.audio)
    return audio, Batch(case, *short, *long, table, cu_seqlens(case.audio).to(device), places)


# --- forms: audio and the rest of a batch to [T, H], or padded [B, S, H] ---------------------------------------------


def fastcompress_pack(audio: Tensor, batch: Batch, compact: bool = True) -> Tensor:
    """Run the library, which also makes offsets, positions and the map back."""
    return fc.pack(
        batch.ids, batch.table, audio, audio_cu_seqlens=batch.cu_seqlens, placeholder=VOCABULARY,
        attention_mask=batch.mask, compact=compact,
    ).inputs_embeds  # fmt: skip


def flat_cat(audio: Tensor, batch: Batch) -> Tensor:
    """One ``torch.cat`` of text, audio and text of all samples, with all ids looked up at once."""
    texts = F.embedding(batch.ids.clamp_max(VOCABULARY - 1), batch.table)
    pieces = []
    for row, rows, place, text in zip(texts, audio.split(batch.case.audio), batch.places, batch.case.text, strict=True):
        pieces += [row[:place], rows, row[place + 1 : text + 1]]
    return torch.cat(pieces)


def masked_scatter(audio: Tensor, batch: Batch) -> Tensor:
    """Merge audio into placeholders as transformers does, padded."""
    is_audio = batch.long_ids == VOCABULARY
    embeds = F.embedding(batch.long_ids.masked_fill(is_audio, 0), batch.table)
    return embeds.masked_scatter(is_audio[..., None].expand_as(embeds), audio)


def _gather(ids: Tensor, is_audio: Tensor, place: Tensor, audio: Tensor, table: Tensor) -> Tensor:
    return torch.where(is_audio[:, None], audio[place], table[ids])


class _Gather(torch.autograd.Function):
    """A compiled gather whose backward is a gather as well; that of autograd adds to one row after the other."""

    @staticmethod
    def forward(ctx: Any, audio: Tensor, ids: Tensor, is_audio: Tensor, place: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(is_audio)
        rows: Tensor = compiled.compiled(_gather, dynamic=True)(ids, is_audio, place, audio, table)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad[ctx.saved_tensors[0]], None, None, None, None


def compiled_gather(audio: Tensor, batch: Batch) -> Tensor:
    """Take each row from the table or from the audio in one loop, compiled for batches of any lengths.

    A ``cat`` would be compiled for the lengths of one batch, which takes seconds.
    """
    ids, is_audio = batch.long()
    place = (is_audio.cumsum(0) - 1).clamp_min(0)
    rows: Tensor = _Gather.apply(audio, ids, is_audio, place, batch.table)  # type: ignore[no-untyped-call]  # of torch
    return rows


def jagged_select(audio: Tensor, batch: Batch) -> Tensor:
    """FBGEMM: select the pieces of text and audio, one jagged tensor, in their order."""
    importlib.import_module("fbgemm_gpu")
    device, count = audio.device, len(batch.places)
    is_text = batch.mask & (batch.ids != VOCABULARY)
    rows = torch.cat([F.embedding(batch.ids[is_text], batch.table), audio])
    place, text = torch.tensor(batch.places, device=device), torch.tensor(batch.case.text, device=device)
    lengths = torch.cat([torch.stack([place, text - place], 1).flatten(), batch.cu_seqlens.diff()])
    sample = torch.arange(count, device=device)
    order = torch.stack([2 * sample, 2 * count + sample, 2 * sample + 1], 1).flatten()
    selected: Tensor = torch.ops.fbgemm.jagged_index_select(rows, lengths, order)[0]
    return selected


_FORMS: dict[str, tuple[str, Callable[[Tensor, Batch], Tensor]]] = {
    "one flat cat": ("eager", flat_cat),
    "masked_scatter, padded": ("transformers", masked_scatter),
    "compile, gather": ("compile", compiled_gather),
}


def implementations(bench: Bench) -> list[Implementation]:
    """List the implementations, ours first."""
    forms = [Implementation(name, *form) for name, form in _FORMS.items() if not (bench.dry and form[0] == "compile")]
    forms.append(Implementation("FBGEMM, jagged_index_select", "library", jagged_select, module="fbgemm_gpu"))
    return ours("fastcompress.pack", fastcompress_pack, bench) + forms


def _by_loop(audio: Tensor, batch: Batch) -> Tensor:
    """Compute the packed rows, ``[T, H]``, sample by sample."""
    rows, first = [], 0
    for ids, text, count, place in zip(batch.ids, batch.case.text, batch.case.audio, batch.places, strict=True):
        rows += [batch.table[ids[:place]], audio[first : first + count], batch.table[ids[place + 1 : text + 1]]]
        first += count
    return torch.cat(rows)


def job(bench: Bench, case: Case, dtype: torch.dtype, threads: int) -> Job:
    """Make the job of one setting."""
    compiled.prepare(threads)
    audio, batch = batch_of(case, dtype, bench.device)
    wanted, is_audio = _by_loop(audio, batch), batch.long()[1]

    def packed(rows: Tensor) -> Tensor:
        """Drop padding, and the unused room of an upper bound."""
        return (rows if rows.dim() == 2 else rows[batch.long_mask])[: len(wanted)]

    def check(name: str, x: Tensor, result: Tensor, grad: Tensor | None, grad_x: Tensor | None) -> dict[str, Any]:
        if not torch.equal(packed(result), wanted):
            raise WrongResult(f"{name}: rows differ from those of a loop over the samples")
        if grad is not None and grad_x is not None and not torch.equal(grad_x, packed(grad)[is_audio]):
            raise WrongResult(f"{name}: the gradient of the audio is not that of its rows")
        return {}

    most = batch.ids.numel() + batch.long_ids.numel()  # rows of a result that has the size of an upper bound
    return Job(
        NAME, case.name, dtype, threads, implementations(bench), check, bench.rotation(audio), batch,
        grads=gradients(most * case.width, dtype, 1, bench.device), recall=4 * wanted.nbytes,
        moved=dict.fromkeys((FORWARD, BOTH), 2 * wanted.nbytes),
        details={"width": case.width, "audio": case.audio, "text": case.text},
    )  # fmt: skip


def run(bench: Bench) -> None:
    """Measure every case."""
    for case in (QUICK,) if bench.quick or bench.dry else CASES:
        for dtype, threads in bench.settings():
            compare(bench, job(bench, case, dtype, threads))
