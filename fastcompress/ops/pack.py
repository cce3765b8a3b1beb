"""From text and audio to what a decoder eats: rows of one sample after another, without padding.

A decoder that is given packed rows must be told where one sample ends and the next begins, or it attends across:
:mod:`fastcompress.decoder`.

Rows of the input are numbered 0 .. N - 1 and rows of audio N .. N + M - 1. ``pack_map`` says which row each packed row
is (``source``) and where each row went (``target``); ``pack_labels`` makes positions and labels from that;
``pack_rows`` copies, and its gradient is the copy the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastcompress.checks import (
    check_float,
    check_layout,
    check_layout_values,
    check_pack_values,
    check_same_device,
    read_count,
)
from fastcompress.dispatch.call import Op, call
from fastcompress.ops.row_groups import check_ids, find_row_groups, values_are_checked
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.select_boundaries import num_sequences
from fastcompress.reference.pack import pack_bound
from fastcompress.rules import Rule, Uniform, as_rule
from fastcompress.segments import Pooled, Segments

_ops = torch.ops.fastcompress


pack_map: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = _ops.pack_map.default


pack_labels: Op[tuple[Tensor, Tensor]] = _ops.pack_labels.default


pack_rows: Op[Tensor] = _ops.pack_rows.default


@torch.library.register_fake("fastcompress::pack_map")
def _(
    row_group: Tensor,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    audio_cu_seqlens: Tensor,
    num_embeddings: int,
    num_audio_rows: int,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if compact:
        size: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    else:
        size = pack_bound(row_group.numel(), audio_cu_seqlens.shape[0] - 1, num_audio_rows)
    source = row_group.new_empty((size,), dtype=torch.int64)
    target = row_group.new_empty((row_group.numel() + num_audio_rows,), dtype=torch.int64)
    sequences = num_sequences(row_group.shape, row_group.dim() == 2, cu_seqlens)
    return torch.empty_like(source), source, target, row_group.new_empty((sequences + 1,), dtype=torch.int32)


@torch.library.register_fake("fastcompress::pack_labels")
def _(source: Tensor, cu_seqlens: Tensor, row_group: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(source), source.new_empty((0,) if labels is None else source.shape)


@torch.library.register_fake("fastcompress::pack_rows")
def _(rows: Tensor, audio: Tensor, index: Tensor, target: Tensor, is_table: bool) -> Tensor:
    return rows.new_empty((index.shape[0], rows.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, audio, index, target, ctx.is_table = inputs
    ctx.num_rows, ctx.num_audio_rows = rows.shape[0], audio.shape[0]
    ctx.save_for_backward(index, target)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Each row of audio, and of rows that are no table, was copied once at most: its gradient is copied back. A table's
    gradient is that of ``torch.nn.Embedding``, which adds in one order."""
    index, target = ctx.saved_tensors
    nothing = grad[:0]
    grad_rows = grad_audio = None
    if ctx.needs_input_grad[0]:
        is_text = (index >= 0) & (index < ctx.num_rows)
        if ctx.is_table:
            # A row more, for what is no text; padding_idx leaves it at 0.
            text = torch.where(is_text, index, ctx.num_rows)
            padded = torch.ops.aten.embedding_dense_backward(grad, text, ctx.num_rows + 1, ctx.num_rows, False)
            grad_rows = padded[: ctx.num_rows]
        else:
            text = torch.where(is_text, index, -1)
            grad_rows = pack_rows(grad, nothing, target[: ctx.num_rows], text, False)
    if ctx.needs_input_grad[1]:
        audio = torch.where(index < ctx.num_rows, -1, index - ctx.num_rows)
        grad_audio = pack_rows(grad, nothing, target[target.shape[0] - ctx.num_audio_rows :], audio, False)
    return grad_rows, grad_audio, None, None, None


torch.library.register_autograd("fastcompress::pack_rows", _backward, setup_context=_setup_context)


@dataclass(eq=False)
class PackedInputs:
    """A batch for a decoder, packed.

    Without ``compact`` the tensors have the length of an upper bound: behind the last sequence are zeros, label -100,
    position 0, source -1; ``cu_seqlens[-1]`` is then the true count.

    Attributes:
        inputs_embeds: ``[T, H]``, in the dtype of the embeddings.
        cu_seqlens: ``[B + 1]`` int32, rows before each sample.
        position_ids: ``[T]`` int64, counted from 0 in each sample.
        labels: ``[T]`` int64 or ``None``; -100 for audio and for the first row of each sample, which has nothing to be
            predicted from. A loss over ``logits[:-1]`` and ``labels[1:]`` then never crosses samples.
        source: ``[T]`` int64, the row that each packed row was: of the input's ``N`` rows, one sample after another,
            or, from ``N`` on, of audio. Audio that was pooled here has the first row of its segment.
        max_seqlen: an upper bound of the rows of a sample; the largest number of them if that was asked for.
        segments: of the rows of ``inputs_embeds``, where they were pooled here; else ``None``.
        compact: whether the tensors end where the last sequence does.
    """

    inputs_embeds: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor
    labels: Tensor | None
    source: Tensor
    max_seqlen: int
    segments: Segments | None = None
    compact: bool = True

    def unpack(self, values: Tensor | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
        """Packed rows as a padded batch, with zeros for padding: the inverse of packing.

        Args:
            values: ``[T, ...]`` or ``[1, T, ...]`` as a decoder returns them, floating; ``None``: ``inputs_embeds``.
            side: of the padding, ``"right"`` or ``"left"``, as a prompt needs it.

        Returns:
            ``[B, S, ...]`` and the attention mask ``[B, S]`` int64. ``S`` is the largest number of rows of a sample,
            which is read from the device. Gradients go to ``values``.
        """
        if side not in ("right", "left"):
            raise ValueError(f"side must be 'right' or 'left', got {side!r}")
        values = self.inputs_embeds if values is None else values
        check_float("values", values)
        check_same_device("values", values, self.source)
        count = self.source.shape[0]
        # Of one packed row, [1, 1] is taken for [T, 1], like `inputs_embeds`, and [1, 1, V] for what a decoder gives.
        if values.shape[:2] == (1, count) and (count != 1 or values.dim() > 2):
            values = values[0]
        if values.dim() < 1 or values.shape[0] != count:
            raise ValueError(f"values must have shape [{count}, ...], one a packed row, got {list(values.shape)}")
        lengths = self.cu_seqlens.diff()
        longest = cast(int, lengths.max().item()) if lengths.shape[0] else 0
        torch._check(longest >= 0)  # which torch.export cannot know
        first = torch.zeros_like(lengths) if side == "right" else longest - lengths  # column of each sample's first
        column = torch.arange(longest, device=values.device) - first[:, None]
        mask = (column >= 0) & (column < lengths[:, None])
        index = torch.where(mask, self.cu_seqlens[:-1, None] + column, -1).reshape(-1)
        packed = torch.arange(count, device=values.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), packed.int(), right=True)
        place = torch.cat([first, first.new_zeros(1)])[sequence] + self.position_ids
        target = torch.where(sequence < lengths.shape[0], sequence * longest + place, -1)
        flat = values.reshape(count, values.shape[1:].numel())
        needs_grad = torch.is_grad_enabled() and flat.requires_grad
        rows = call(pack_rows, (flat, flat[:0], index, target, False), needs_grad, lambda: None)
        return rows.reshape(lengths.shape[0], longest, *values.shape[1:]), mask.long()

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers decoder whose attention is ``"fastcompress"``.

        The batch is one row, ``[1, T, ...]``. ``attention_mask`` is an empty mask of four dimensions: transformers
        hands such a mask on as it is, where it would build one of T x T. Its own flash attention takes the same but for
        that: set ``attention_mask`` to ``None``. No cache is kept: packed rows are not a prompt that can be continued.
        """
        cu_seqlens, max_seqlen = self.cu_seqlens, self.max_seqlen
        if not self.compact:  # what is behind the last sequence is one more: attention leaves no row out
            count = self.inputs_embeds.shape[0]
            cu_seqlens = torch.nn.functional.pad(cu_seqlens, (0, 1), value=count)
            max_seqlen = count
        kwargs: dict[str, Any] = {
            "inputs_embeds": self.inputs_embeds[None],
            "attention_mask": torch.empty((1, 1, 0, 0), dtype=torch.bool, device=self.inputs_embeds.device),
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
            "use_cache": False,
        }
        if self.labels is not None:
            kwargs["labels"] = self.labels[None]
        return kwargs


torch.export.register_dataclass(PackedInputs, serialized_type_name="fastcompress.PackedInputs")


def pack(
    input_ids: Tensor | None = None,
    embedding: Tensor | None = None,
    audio: Pooled | Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    audio_cu_seqlens: Tensor | None = None,
    rule: Rule | str | None = None,
    keys: Tensor | None = None,
    placeholder: int | None = None,
    placeholder_counts: Tensor | int | None = None,
    row_group: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    labels: Tensor | None = None,
    compact: bool = True,
    exact_max_seqlen: bool = False,
) -> PackedInputs:
    """The input of a decoder, without padding and without a loop over samples.

    Text comes from ``input_ids`` and ``embedding`` or from ``inputs_embeds``. Audio comes

    * from ``audio``, pooled already: each place for an audio in the text is replaced by the rows of the next one. A
      batch may have several audios a sample, and samples without any; or
    * from ``inputs_embeds`` itself, into which a model has merged the frames: a rule pools each audio there, in the
      pass that packs (:func:`segment_pool`). Without a rule every row is kept.

    Places are said by ``placeholder`` (:func:`row_groups`) or by ``row_group``.

    Args:
        input_ids: ``[B, L]`` padded or ``[N]`` packed, int32 or int64.
        embedding: ``[V, H]``, the table of the ids. A ``padding_idx`` of its module is not known here: that row gets a
            gradient if it is kept. For a model that scales what it looks up give ``inputs_embeds``.
        audio: :class:`Pooled`, one sequence an audio, or its values ``[M, H]`` with ``audio_cu_seqlens``; in the dtype
            of the text.
        inputs_embeds: ``[B, L, H]`` or ``[N, H]``.
        audio_cu_seqlens: ``[A + 1]`` int32 or int64, rows before each audio, with ``audio`` as a tensor; ``None``: one
            audio.
        rule, keys: as in :func:`segment_pool`, with ``inputs_embeds`` and no ``audio``.
        placeholder, placeholder_counts: which ids stand for audio, as in :func:`row_groups`.
        row_group: int32 ``[B, L]`` or ``[N]`` in place of a placeholder. Negative: dropped; 0: text; k > 0: audio, each
            run of neighbouring rows of one k is one.
        attention_mask: ``[B, L]``: rows where it is 0 are dropped.
        lengths: ``[B]`` int32 or int64, rows of each sample of a padded batch.
        cu_seqlens: ``[B + 1]`` int32 or int64, with packed input; ``None``: one sample.
        labels: int32 or int64, a value for each row of the input.
        compact: size the result exactly, which reads the number of rows from the device; else return an upper bound,
            the tail being zeros.
        exact_max_seqlen: read the largest number of rows of a sample from the device, too.

    Returns:
        The packed batch. Gradients go to ``embedding`` (in one order, so the same each time), ``inputs_embeds`` and
        ``audio``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit; ids out of range and more or fewer audios than places
            name the sample and both numbers; no row is kept (with ``compact``).
    """
    if not isinstance(compact, bool):
        raise TypeError(f"compact must be True or False, got {compact!r}")
    shape = _check_text(input_ids, embedding, inputs_embeds)
    like = inputs_embeds if inputs_embeds is not None else embedding
    assert like is not None
    if (rule is not None or keys is not None) and placeholder is None and row_group is None:
        raise ValueError("rule and keys need placeholder or row_group, which say where the audio is")
    row_group = _find_row_group(
        shape,
        input_ids,
        like.device,
        placeholder,
        placeholder_counts,
        row_group,
        attention_mask,
        lengths,
        cu_seqlens,
        compact,
    )
    if labels is not None:
        check_ids("labels", labels, shape)
        check_same_device("labels", labels, like)
    segments = None
    if audio is None and audio_cu_seqlens is not None:
        raise ValueError("audio_cu_seqlens goes with audio, which is missing")
    if audio is None and inputs_embeds is not None:
        pooled = segment_pool(
            inputs_embeds,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            row_group=row_group,
            rule=Uniform(1) if rule is None else as_rule(rule),
            keys=keys,
            compact=compact,
        )
        values, segments = pooled.values, pooled.segments
        packed_cu_seqlens, num_audio_rows = pooled.cu_seqlens, 0
        source = segments.starts
        if not compact:
            source = torch.where(segments.lengths > 0, source, -1)
    else:
        if rule is not None or keys is not None:
            raise ValueError("rule and keys go with inputs_embeds and no audio: audio that is given is pooled already")
        audio_values, audio_cu_seqlens = _check_audio(audio, audio_cu_seqlens, like)
        rows = like if inputs_embeds is None else like.flatten(0, -2)
        ids = input_ids if inputs_embeds is None else None
        num_audio_rows = audio_values.shape[0]
        if row_group.numel() + num_audio_rows >= 2**31:
            raise ValueError(
                f"{row_group.numel()} rows and {num_audio_rows} rows of audio exceed what int32 offsets can count"
            )
        arguments = (row_group, ids, cu_seqlens, lengths, audio_cu_seqlens, rows.shape[0], num_audio_rows, compact)
        index, source, target, packed_cu_seqlens = call(
            pack_map, arguments, False, lambda: check_pack_values(*arguments)
        )
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or audio_values.requires_grad)
        values = call(pack_rows, (rows, audio_values, index, target, inputs_embeds is None), needs_grad, lambda: None)
    # Under compile the count has no value yet.
    if compact and not torch.compiler.is_compiling() and values.shape[0] == 0:
        samples = packed_cu_seqlens.shape[0] - 1
        raise ValueError(f"nothing is left to pack: every row of the {samples} samples is dropped")
    positions, packed_labels = call(pack_labels, (source, packed_cu_seqlens, row_group, labels), False, lambda: None)
    if exact_max_seqlen:
        max_seqlen = read_count(packed_cu_seqlens.diff().max())
    else:
        max_seqlen = min(shape[-1] + num_audio_rows, values.shape[0])
    return PackedInputs(
        values,
        packed_cu_seqlens,
        positions,
        None if labels is None else packed_labels,
        source,
        max_seqlen,
        segments,
        compact,
    )


def _check_text(input_ids: Tensor | None, embedding: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
    """The leading shape of the input, ``[B, L]`` or ``[N]``."""
    if inputs_embeds is not None:
        if embedding is not None:
            raise ValueError("embedding goes with input_ids alone: inputs_embeds is looked up already")
        check_float("inputs_embeds", inputs_embeds)
        if inputs_embeds.dim() not in (2, 3):
            raise ValueError(f"inputs_embeds must have shape [B, L, H] or [N, H], got {list(inputs_embeds.shape)}")
        shape, name, like = inputs_embeds.shape[:-1], "inputs_embeds", inputs_embeds
        if input_ids is not None:
            check_ids("input_ids", input_ids, shape)
    else:
        if input_ids is None or embedding is None:
            raise ValueError("pack needs input_ids and embedding, or inputs_embeds")
        check_ids("input_ids", input_ids)
        check_float("embedding", embedding)
        if input_ids.dim() not in (1, 2):
            raise ValueError(f"input_ids must have shape [B, L] or [N], got {list(input_ids.shape)}")
        if embedding.dim() != 2:
            raise ValueError(f"embedding must have shape [V, H], got {list(embedding.shape)}")
        shape, name, like = input_ids.shape, "input_ids", embedding
    if input_ids is not None:
        check_same_device("input_ids", input_ids, like)
    if 0 in shape:
        raise ValueError(f"{name} must hold at least one sample and one row, got shape {list(shape)}")
    return shape


def _find_row_group(
    shape: torch.Size,
    input_ids: Tensor | None,
    device: torch.device,
    placeholder: int | None,
    placeholder_counts: Tensor | int | None,
    row_group: Tensor | None,
    attention_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    compact: bool,
) -> Tensor:
    """int32 row groups of the leading shape."""
    if placeholder_counts is not None and placeholder is None:
        raise ValueError("placeholder_counts goes with placeholder")
    if placeholder is not None:
        if row_group is not None:
            raise ValueError("placeholder excludes row_group: they say the same thing")
        if input_ids is None:
            raise ValueError("placeholder is an id of input_ids, which is missing; row_group says the same without ids")
        if lengths is not None and attention_mask is None:
            check_layout(input_ids, 1, cu_seqlens, lengths)
            if values_are_checked(input_ids):
                check_layout_values(shape, None, lengths)
            mask: Tensor | None = torch.arange(shape[-1], device=device) < lengths[:, None]
        else:
            mask = attention_mask
            if lengths is not None:
                raise ValueError("attention_mask excludes lengths: they say the same thing")
        reads_values = values_are_checked(input_ids) or (compact and not torch.compiler.is_compiling())
        return find_row_groups(input_ids, placeholder, mask, cu_seqlens, placeholder_counts, reads_values)
    rows = torch.empty(shape, device=device) if input_ids is None else input_ids
    row_group = check_layout(rows, 1, cu_seqlens, lengths, attention_mask, row_group)
    if row_group is None:
        return torch.zeros(shape, dtype=torch.int32, device=device)
    # A mask has 1 for what it keeps.
    return row_group if attention_mask is None else row_group.clamp_max(0)


def _check_audio(audio: Pooled | Tensor | None, audio_cu_seqlens: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[M, H]`` and offsets ``[A + 1]``."""
    offsets: Tensor | None
    width = like.shape[-1]
    if audio is None:
        return like.new_empty((0, width)), torch.zeros(1, dtype=torch.int32, device=like.device)
    if isinstance(audio, Pooled):
        if audio_cu_seqlens is not None:
            raise ValueError("audio_cu_seqlens goes with audio as a tensor: Pooled has its own")
        values, offsets = audio.values, audio.cu_seqlens
    else:
        values, offsets = audio, audio_cu_seqlens
    check_float("audio", values)
    check_same_device("audio", values, like)
    if values.dtype != like.dtype:
        raise TypeError(f"audio must have the dtype of the text, {like.dtype}, got {values.dtype}")
    if values.dim() != 2 or values.shape[1] != width:
        raise ValueError(f"audio must have shape [M, {width}], rows as wide as the text, got {list(values.shape)}")
    if offsets is None:
        offsets = torch.arange(2, dtype=torch.int32, device=like.device) * values.shape[0]
    check_ids("audio_cu_seqlens", offsets)
    check_same_device("audio_cu_seqlens", offsets, like)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"audio_cu_seqlens must have shape [A + 1], got {list(offsets.shape)}")
    return values, offsets
