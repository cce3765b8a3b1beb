"""Suite ``pack``: ``fastcompress.pack`` against what people write to merge text and audio for a decoder.

Every form starts from the same: padded ids with one placeholder per audio (or a run of them, where a form needs that),
an embedding table, pooled audio. Its rows are compared with those of a loop over samples before it is timed.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from benchmarks.harness import cases
from benchmarks.harness.cases import gradients, random_lengths
from benchmarks.harness.compare import TRITON, Bench, Contender, Job, WrongResult, compare
from benchmarks.measurement import BACKWARD, OURS
from benchmarks.suites import compiled

NAME = "pack"
VOCABULARY = 32_000


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
class Batch(cases.Batch):
    """A batch as the forms take it.

    Attributes:
        ids, mask: ``[B, L]``, with one placeholder (``VOCABULARY``) per audio, padded on the right.
        long_ids, long_mask: The same with one placeholder per row of audio, as processors of transformers make it.
        table: Embeddings, ``[V, H]``.
        audio: Pooled audio, ``[M, H]``; ``audio_cu_seqlens`` is ``[B + 1]``.
        places: Position of the audio in each sample.
    """

    LEAF: ClassVar[str] = "audio"

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
    """Make a batch, the same for the same arguments."""
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


# --- forms: a batch to [T, H], or padded [B, S, H] -------------------------------------------------------------------


def fastcompress_pack(batch: Batch, compact: bool = True) -> Tensor:
    """The library, which also makes offsets, positions and the map back."""
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
    """Text, audio, text of each sample, with all ids looked up at once."""
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
    """One ``torch.cat`` per sample, and one of the samples."""
    return torch.cat([torch.cat(pieces) for pieces in _pieces(batch)])


def cat_and_pad(batch: Batch) -> Tensor:
    """One ``torch.cat`` per sample, padded."""
    return pad_sequence([torch.cat(pieces) for pieces in _pieces(batch)], batch_first=True)


def masked_scatter(batch: Batch) -> Tensor:
    """Merge audio into placeholders as transformers does, padded."""
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
    """Copy text and audio to their rows."""
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
    """A compiled gather whose backward is a gather as well; that of autograd adds to one row after the other."""

    @staticmethod
    def forward(ctx: Any, audio: Tensor, ids: Tensor, is_audio: Tensor, place: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(is_audio)
        return _compiled()(ids, is_audio, place, audio, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad[ctx.saved_tensors[0]], None, None, None, None


def compiled_gather(batch: Batch) -> Tensor:
    """Take each row from the table or from the audio in one loop, compiled for batches of any lengths.

    A ``cat`` would be compiled for the lengths of one batch, which takes seconds.
    """
    ids = batch.long_ids[batch.long_mask.bool()]
    is_audio = ids == VOCABULARY
    place = (is_audio.cumsum(0) - 1).clamp_min(0)
    rows: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]  # of torch
        batch.audio, ids.masked_fill(is_audio, 0), is_audio, place, batch.table
    )
    return rows


def jagged_select(batch: Batch) -> Tensor:
    """FBGEMM: select the pieces of text and audio, one jagged tensor, in their order."""
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


_FORMS: dict[str, tuple[str, Callable[[Batch], Tensor]]] = {
    "one flat cat": ("eager", flat_cat),
    "cat per sample": ("eager", cat_per_sample),
    "cat per sample, padded": ("eager", cat_and_pad),
    "index_copy": ("eager", index_copy),
    "masked_scatter, packed": ("eager", masked_scatter_packed),
    "masked_scatter, padded": ("transformers", masked_scatter),
    "compile, gather": ("compile", compiled_gather),
}


def contenders(gpu: bool = False, dry: bool = False) -> list[Contender]:
    """Ours first. On a GPU ours has a form for a CUDA graph, and Triton takes part."""
    bound = functools.partial(fastcompress_pack, compact=False) if gpu else None
    backend = "cuda" if gpu and not dry else None
    found = [Contender("fastcompress.pack", OURS, lambda: fastcompress_pack, bound, backend=backend)]
    if gpu and (not dry or os.environ.get("TRITON_INTERPRET") == "1"):
        name = "fastcompress.pack, triton"
        found.append(Contender(name, TRITON, lambda: fastcompress_pack, bound, backend="triton", module="triton"))
    for name, (group, form) in _FORMS.items():
        if not (dry and group == "compile"):
            found.append(Contender(name, group, lambda form=form: form))  # type: ignore[misc]  # a default
    name = "FBGEMM, jagged_index_select"
    return [*found, Contender(name, "library", lambda: jagged_select, module="fbgemm_gpu")]


@dataclass
class PackJob(Job):
    """Packing of one case."""

    wanted: Tensor | None = None

    def check(
        self, name: str, batch: Any, result: Tensor, grad: Tensor | None, grad_x: Tensor | None
    ) -> dict[str, Any]:
        if self.wanted is None:
            self.wanted = _by_loop(batch)
        mask = batch.long_mask.bool()
        rows = result if result.dim() == 2 else result[mask]
        if not torch.equal(rows[: len(self.wanted)], self.wanted):
            raise WrongResult(f"{name}: rows differ from those of a loop over the samples")
        if grad is not None and grad_x is not None:
            is_audio = batch.long_ids[mask] == VOCABULARY
            if not torch.equal(grad_x, (grad if grad.dim() == 2 else grad[mask])[: len(is_audio)][is_audio]):
                raise WrongResult(f"{name}: the gradient of the audio is not that of its rows")
        return {}

    def moved(self, direction: str) -> int | None:
        batch = self.batches[0]
        once: int = batch.audio.nbytes if direction == BACKWARD else batch.case.tokens * batch.audio[0].nbytes
        return 2 * once


def _by_loop(batch: Batch) -> Tensor:
    """The packed rows, ``[T, H]``."""
    expected = []
    for i, (text, place) in enumerate(zip(batch.case.text, batch.places, strict=True)):
        ids = batch.ids[i, : text + 1]
        audio = batch.audio[batch.audio_cu_seqlens[i] : batch.audio_cu_seqlens[i + 1]]
        expected.append(torch.cat([batch.table[ids[:place]], audio, batch.table[ids[place + 1 :]]]))
    return torch.cat(expected)


def job(bench: Bench, case: PackCase, dtype: torch.dtype, threads: int) -> PackJob:
    """The job of one setting."""
    compiled.prepare(threads)
    first = batch(case, dtype, bench.device)
    batches = [first] if bench.on_gpu else first.rotation(bench.cache)
    grads = gradients(first.long_ids.numel() * case.width, dtype, 1, bench.device)
    details = {"width": case.width, "audio": case.audio, "text": case.text}
    recall = 4 * case.tokens * case.width * dtype.itemsize
    chosen = contenders(bench.on_gpu, bench.dry)
    return PackJob(NAME, case.name, dtype, threads, chosen, batches, grads=grads, recall=recall, details=details)


def run(bench: Bench) -> None:
    """Measure every case, on a GPU in bf16."""
    for case in (QUICK,) if bench.quick or bench.dry else CASES:
        for dtype, threads in bench.settings(("bf16",) if bench.on_gpu else None):
            compare(bench, job(bench, case, dtype, threads))
