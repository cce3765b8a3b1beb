"""From text and audio to what a decoder eats: rows of one sample after another, without padding.

A decoder that is given packed rows must be told where one sample ends and the next begins, or it attends across:
:mod:`fastcompress.attention`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastcompress.checks import (
    INDEX_DTYPES,
    check_dense,
    check_float,
    check_int64,
    check_layout,
    check_layout_values,
    check_pack_values,
    check_same_device,
    sequence_ranges,
)
from fastcompress.ops.dispatch import call
from fastcompress.ops.pack import pack_labels, pack_map, pack_rows
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.rules import Rule, Uniform, as_rule
from fastcompress.segments import Pooled, Segments


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


def _check_ids(name: str, ids: Tensor, shape: torch.Size | None = None) -> None:
    check_dense(name, ids)
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if shape is not None and ids.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(ids.shape)}")


def _reads_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor are to be checked: on the host always, on a device where that is asked for."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTCOMPRESS_CHECK") == "1"


def row_groups(
    input_ids: Tensor,
    placeholder: int,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    placeholder_counts: Tensor | int | None = None,
) -> Tensor:
    """Row groups of token ids: -1 where the mask is 0, 0 for text, positive for audio, where neighbouring rows of one
    number are one audio.

    Args:
        input_ids: ``[B, L]`` padded or ``[N]`` packed, int32 or int64.
        placeholder: the id that stands for audio.
        attention_mask: ``[B, L]``, 0 for padding on either side.
        cu_seqlens: ``[B + 1]`` int32 or int64, with packed input; ``None``: one sample.
        placeholder_counts: how placeholders are audios. ``None``: each run of them in a sample is one. 1: each is one.
            ``[A]`` int32 or int64: audio ``i`` has so many, one after the other, so that audios next to each other stay
            apart. Counts that do not match are an error, but on a GPU (unless ``FASTCOMPRESS_CHECK=1``) they make all
            audio -1, since reading them would wait for it; :func:`pack` with ``compact`` reads them.

    Returns:
        int32 of the shape of ``input_ids``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device or value that does not fit; counts that do not match the placeholders name the
            sample and both numbers.
    """
    _check_ids("input_ids", input_ids)
    return _row_groups(
        input_ids, placeholder, attention_mask, cu_seqlens, placeholder_counts, _reads_values(input_ids)
    )


def _row_groups(
    input_ids: Tensor, placeholder: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
    placeholder_counts: Tensor | int | None, reads_values: bool,
) -> Tensor:  # fmt: skip
    check_int64("placeholder", placeholder)
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [B, L] or [N], got {list(input_ids.shape)}")
    check_layout(input_ids, 1, cu_seqlens, None, attention_mask)
    kept = None if attention_mask is None else attention_mask.bool()
    is_audio = input_ids.long() == placeholder  # one beyond int32 is no id of that dtype
    if placeholder_counts is None:
        group = is_audio.int()
    elif isinstance(placeholder_counts, Tensor):
        _check_ids("placeholder_counts", placeholder_counts)
        check_same_device("placeholder_counts", placeholder_counts, input_ids)
        if placeholder_counts.dim() != 1:
            raise ValueError(f"placeholder_counts must have shape [A], got {list(placeholder_counts.shape)}")
        if kept is not None:
            is_audio &= kept
        flat = is_audio.reshape(-1)
        if reads_values and cu_seqlens is not None:
            check_layout_values(input_ids.shape, cu_seqlens, None)
        audio = torch.searchsorted(placeholder_counts.cumsum(0), flat.cumsum(0) - 1, right=True, out_int32=True) + 1
        group = audio * flat
        matches = _counts_match(group, placeholder_counts, input_ids.shape, cu_seqlens)
        if reads_values:
            if not matches:
                _explain_counts(flat, placeholder_counts, input_ids.shape, cu_seqlens)
        elif group.is_cuda:
            group = torch.where(matches | ~flat, group, -1)  # so that places and audios differ in number
        else:
            torch._assert_async(matches, "placeholder_counts does not match the placeholders of input_ids")
        group = group.view(input_ids.shape)
    elif isinstance(placeholder_counts, int) and not isinstance(placeholder_counts, bool) and placeholder_counts == 1:
        number = torch.arange(1, input_ids.numel() + 1, dtype=torch.int32, device=input_ids.device)
        group = number.view(input_ids.shape) * is_audio
    else:
        raise ValueError(f"placeholder_counts must be None, 1 or a tensor, got {placeholder_counts!r}")
    return group if kept is None else group.masked_fill_(~kept, -1)


def _counts_match(group: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Whether each audio has its placeholders next to each other in one sample, a bool on their device."""
    row = torch.arange(group.shape[0], device=group.device)
    if len(shape) == 2:
        first = row % max(shape[1], 1) == 0
    else:
        first = row == 0
        if cu_seqlens is not None:
            bounds = torch.nn.functional.pad(torch.zeros_like(first), (0, 1))
            first |= bounds.index_fill(0, cu_seqlens.long().clamp(0, group.shape[0]), True)[:-1]
    runs = (group > 0) & (first | (group != group.roll(1)))
    # With these, every audio has a placeholder, and so many runs as audios means one for each.
    same = (counts >= 1).all() & ((group > 0).sum() == counts.sum())
    return same & (runs.sum() == counts.shape[0])


def _explain_counts(is_audio: Tensor, counts: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> NoReturn:
    """Says which sample's placeholders are not those of whole audios."""
    wanted, audio = counts.tolist(), 0
    for i, count in enumerate(wanted):
        if count < 1:
            raise ValueError(f"placeholder_counts must be at least 1, got {count} at index {i}")
    ranges = sequence_ranges(shape, cu_seqlens, None)
    is_audio = is_audio.cpu()
    for sample, (begin, end) in enumerate(ranges):
        places = is_audio[begin:end].nonzero()[:, 0].tolist()
        done = 0
        while done < len(places):
            left = len(places) - done
            if audio == len(wanted):
                raise ValueError(
                    f"sample {sample} has {len(places)} placeholders, {left} more than the {len(wanted)} audios of "
                    "placeholder_counts account for"
                )
            count = wanted[audio]
            if count > left:
                raise ValueError(
                    f"sample {sample} has {len(places)} placeholders and {left} left for audio {audio}, but "
                    f"placeholder_counts has {count} for it"
                )
            if places[done + count - 1] - places[done] != count - 1:
                raise ValueError(
                    f"the {count} placeholders of audio {audio} must be next to each other, but sample {sample} has "
                    f"others between its positions {places[done]} and {places[done + count - 1]}"
                )
            done += count
            audio += 1
    raise ValueError(
        f"placeholder_counts has {len(wanted)} audios, but the samples have placeholders for only {audio}: none is "
        f"left after sample {len(ranges) - 1}, the last"
    )


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
    groups = _groups(
        shape, input_ids, like.device, placeholder, placeholder_counts, row_group, attention_mask, lengths, cu_seqlens,
        compact,
    )  # fmt: skip
    if labels is not None:
        _check_ids("labels", labels, shape)
        check_same_device("labels", labels, like)
    segments = None
    if audio is None and audio_cu_seqlens is not None:
        raise ValueError("audio_cu_seqlens goes with audio, which is missing")
    if (rule is not None or keys is not None) and placeholder is None and row_group is None:
        raise ValueError("rule and keys need placeholder or row_group, which say where the audio is")
    if audio is None and inputs_embeds is not None:
        pooled = segment_pool(
            inputs_embeds,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            row_group=groups,
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
        if groups.numel() + num_audio_rows >= 2**31:
            raise ValueError(
                f"{groups.numel()} rows and {num_audio_rows} of audio are more than int32 offsets of samples can count"
            )
        arguments = (groups, ids, cu_seqlens, lengths, audio_cu_seqlens, rows.shape[0], num_audio_rows, compact)
        index, source, target, packed_cu_seqlens = call(
            pack_map, arguments, False, lambda: check_pack_values(*arguments)
        )
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or audio_values.requires_grad)
        values = call(
            pack_rows, (rows, audio_values, index, target, inputs_embeds is None), needs_grad, lambda: None
        )
    # Under compile the count has no value yet.
    if compact and not torch.compiler.is_compiling() and values.shape[0] == 0:
        samples = packed_cu_seqlens.shape[0] - 1
        raise ValueError(f"nothing is left to pack: every row of the {samples} samples is dropped")
    positions, packed_labels = call(pack_labels, (source, packed_cu_seqlens, groups, labels), False, lambda: None)
    if exact_max_seqlen:
        max_seqlen = int(packed_cu_seqlens.diff().max())
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
            _check_ids("input_ids", input_ids, shape)
    else:
        if input_ids is None or embedding is None:
            raise ValueError("pack needs input_ids and embedding, or inputs_embeds")
        _check_ids("input_ids", input_ids)
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


def _groups(
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
            if _reads_values(input_ids):
                check_layout_values(shape, None, lengths)
            mask: Tensor | None = torch.arange(shape[-1], device=device) < lengths[:, None]
        else:
            mask = attention_mask
            if lengths is not None:
                raise ValueError("attention_mask excludes lengths: they say the same thing")
        reads_values = _reads_values(input_ids) or (compact and not torch.compiler.is_compiling())
        return _row_groups(input_ids, placeholder, mask, cu_seqlens, placeholder_counts, reads_values)
    rows = torch.empty(shape, device=device) if input_ids is None else input_ids
    groups = check_layout(rows, 1, cu_seqlens, lengths, attention_mask, row_group)
    if groups is None:
        return torch.zeros(shape, dtype=torch.int32, device=device)
    # A mask has 1 for what it keeps.
    return groups if attention_mask is None else groups.clamp_max(0)


def _check_audio(
    audio: Pooled | Tensor | None, audio_cu_seqlens: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
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
    _check_ids("audio_cu_seqlens", offsets)
    check_same_device("audio_cu_seqlens", offsets, like)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"audio_cu_seqlens must have shape [A + 1], got {list(offsets.shape)}")
    return values, offsets
