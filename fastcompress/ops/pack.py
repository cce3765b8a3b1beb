"""Packing: build the input of a decoder from text and audio, one sample after another, without padding.

The decoder needs the sample boundaries, or its attention crosses them; see ``fastcompress.decoder``.

Rows of the input are numbered 0 to N - 1 and rows of audio N to N + M - 1. ``pack_map`` computes which row each packed
row is copied from (``source``) and where each row is copied to (``target``). ``pack_labels`` derives positions and
labels from that. ``pack_rows`` copies the rows; its gradient is the copy in the other direction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fastcompress.checks import (
    check_float,
    check_layout,
    check_layout_values,
    check_pack_values,
    check_same_device,
    read_count,
    values_are_checked,
)
from fastcompress.dispatch.call import Op, call
from fastcompress.ops.pack_rows import pack_rows
from fastcompress.ops.packed_inputs import PackedInputs
from fastcompress.ops.row_groups import check_ids, find_row_groups
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.select_boundaries import num_sequences
from fastcompress.reference.pack import pack_bound
from fastcompress.rules import Rule, Uniform, as_rule
from fastcompress.segments import Pooled

Positions = Literal["compact", "time"]
POSITIONS: tuple[str, ...] = get_args(Positions)

_ops = torch.ops.fastcompress


pack_map: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = _ops.pack_map.default


pack_labels: Op[tuple[Tensor, Tensor]] = _ops.pack_labels.default


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


def pack(
    input_ids: Tensor | None = None,
    embedding: Tensor | torch.nn.Embedding | None = None,
    audio: Pooled | Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    audio_cu_seqlens: Tensor | None = None,
    audio_lengths: Tensor | None = None,
    rule: Rule | str | None = None,
    keys: Tensor | None = None,
    placeholder: int | None = None,
    placeholder_counts: Tensor | int | None = None,
    row_group: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    labels: Tensor | None = None,
    positions: Positions = "compact",
    compact: bool = True,
    exact_max_seqlen: bool = False,
) -> PackedInputs:
    """Pack text and audio into the input of a decoder, without padding and without a loop over samples.

    Text comes from ``input_ids`` and ``embedding``, or from ``inputs_embeds``. Audio comes

    * from ``audio``, which is already pooled: each place for an audio in the text is replaced by the rows of the next
      audio. A sample may have any number of audios; or
    * from ``inputs_embeds``, if a model has already merged the frames into it: ``rule`` pools each audio in the same
      pass ([`segment_pool`][]). Without a rule every row is kept.

    ``placeholder`` (``row_groups``) or ``row_group`` marks the places of audio.

    Args:
        input_ids: Token ids, ``[B, L]`` padded or ``[N]`` packed, int32 or int64.
        embedding: Embedding table of the ids, ``[V, H]``, or the ``torch.nn.Embedding`` that has it. The row of a
            ``padding_idx`` gets a gradient if it is kept. If the model scales its embeddings, pass ``inputs_embeds``
            instead.
        audio: [`Pooled`][] with one sequence per audio, or its values ``[M, H]`` with ``audio_cu_seqlens``; in the
            dtype of the text.
        inputs_embeds: Embeddings, ``[B, L, H]`` padded or ``[N, H]`` packed.
        audio_cu_seqlens: Rows before each audio, ``[A + 1]`` int32 or int64, if ``audio`` is a tensor; ``None`` for one
            audio.
        audio_lengths: Number of frames of each row of ``audio``, ``[M]`` int32 or int64, at least 1, if ``audio`` is a
            tensor.
        rule: See [`segment_pool`][]; needs ``inputs_embeds`` without ``audio``.
        keys: See [`segment_pool`][]; needs ``inputs_embeds`` without ``audio``.
        placeholder: Token id that marks audio; see ``row_groups``.
        placeholder_counts: Placeholders per audio; see ``row_groups``.
        row_group: Row groups, int32 ``[B, L]`` or ``[N]``, instead of a placeholder. Negative: dropped; 0: text; k > 0:
            audio, where each run of neighbouring rows with the same k is one audio.
        attention_mask: Mask ``[B, L]`` bool or numbers: 1 keeps a row, 0 drops it. Other values raise an error; an
            additive mask becomes such a mask by ``mask >= 0``.
        lengths: Rows of each sample of a padded batch, ``[B]`` int32 or int64.
        cu_seqlens: Rows before each sample of packed input, ``[B + 1]`` int32 or int64; ``None`` for one sample.
        labels: Labels, int32 or int64, one per row of the input.
        positions: ``"compact"`` numbers the rows of a sample 0, 1, 2, ... ``"time"`` gives every row the position that
            it has without compression: text keeps its own, and a segment has that of its middle frame, the lower one
            of two. It needs ``audio`` as [`Pooled`][], or ``audio_lengths``, if there is ``audio``.
        compact: If true, size the result exactly, which reads the number of rows from the device. If false, return an
            upper bound of rows; the trailing rows are zeros.
        exact_max_seqlen: If true, also read the largest number of rows of a sample from the device.

    Returns:
        The packed batch. Gradients go to ``embedding`` (added in a fixed order), ``inputs_embeds`` and ``audio``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value is invalid; if an id is out of range, or the number of audios is not the
            number of places (the message names the sample and both numbers); or if no row is kept, with ``compact``.

    Examples:
        >>> packed = pack(torch.tensor([[5, 9, 7]]), torch.randn(10, 4), torch.randn(3, 4), placeholder=9)
        >>> packed.inputs_embeds.shape, packed.cu_seqlens
        (torch.Size([5, 4]), tensor([0, 5], dtype=torch.int32))
    """
    if not isinstance(compact, bool):
        raise TypeError(f"compact must be True or False, got {compact!r}")
    if positions not in POSITIONS:
        raise ValueError(f"positions must be 'compact' or 'time', got {positions!r}")
    embedding = _as_table(embedding)
    shape = _check_text(input_ids, embedding, inputs_embeds)
    like = inputs_embeds if inputs_embeds is not None else embedding
    assert like is not None
    if (rule is not None or keys is not None) and placeholder is None and row_group is None:
        raise ValueError("rule and keys need placeholder or row_group, which mark the rows of audio")
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
        raise ValueError("audio_cu_seqlens needs audio, which is missing")
    if audio_lengths is not None and not isinstance(audio, Tensor):
        got = "audio is missing" if audio is None else "Pooled has its own lengths"
        raise ValueError(f"audio_lengths needs audio as a tensor: {got}")
    row_lengths: Tensor | None
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
        source, row_lengths = segments.starts, segments.lengths
        if not compact:
            source = torch.where(segments.lengths > 0, source, -1)
    else:
        if rule is not None or keys is not None:
            raise ValueError("rule and keys need inputs_embeds without audio: audio must be pooled before pack")
        audio_values, audio_cu_seqlens = _check_audio(audio, audio_cu_seqlens, like)
        rows = like if inputs_embeds is None else like.flatten(0, -2)
        ids = input_ids if inputs_embeds is None else None
        num_audio_rows = audio_values.shape[0]
        if row_group.numel() + num_audio_rows >= 2**31:
            raise ValueError(
                f"text and audio must have fewer than 2**31 rows, got {row_group.numel()} and {num_audio_rows}"
            )
        arguments = (row_group, ids, cu_seqlens, lengths, audio_cu_seqlens, rows.shape[0], num_audio_rows, compact)
        index, source, target, packed_cu_seqlens = call(
            pack_map, arguments, False, lambda: check_pack_values(*arguments)
        )
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or audio_values.requires_grad)
        values = call(pack_rows, (rows, audio_values, index, target, inputs_embeds is None), needs_grad, lambda: None)
        row_lengths = _row_lengths(audio, audio_lengths, audio_values, source, row_group.numel())
    # Under torch.compile the number of rows is symbolic.
    if compact and not torch.compiler.is_compiling() and values.shape[0] == 0:
        samples = packed_cu_seqlens.shape[0] - 1
        raise ValueError(f"nothing is left to pack: every row of the {samples} samples is dropped")
    rank, packed_labels = call(pack_labels, (source, packed_cu_seqlens, row_group, labels), False, lambda: None)
    if exact_max_seqlen:
        max_seqlen = read_count(packed_cu_seqlens.diff().max())
    else:
        max_seqlen = min(shape[-1] + num_audio_rows, values.shape[0])
    packed = PackedInputs(
        values,
        packed_cu_seqlens,
        rank,
        None if labels is None else packed_labels,
        source,
        max_seqlen,
        None,
        packed_cu_seqlens.diff().long(),
        False,
        segments,
        compact,
    )
    if row_lengths is None:
        if positions == "time":
            raise ValueError("positions='time' needs audio as Pooled, or audio_lengths, which is None")
        return packed
    return with_row_lengths(packed, row_lengths, positions)


def with_row_lengths(packed: PackedInputs, row_lengths: Tensor, positions: str) -> PackedInputs:
    """Return a packed batch with the frames of each row, ``[T]`` int64, and the positions of ``pack``."""
    if positions == "compact":
        return replace(packed, row_lengths=row_lengths)
    position_ids, next_positions = time_positions(row_lengths, packed.cu_seqlens)
    return replace(
        packed, row_lengths=row_lengths, position_ids=position_ids, next_positions=next_positions, in_time=True
    )


def time_positions(row_lengths: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of packed rows that stand for several frames each, as if every frame had a row.

    Args:
        row_lengths: Frames of each row, ``[T]`` int64; 0 after the last sample.
        cu_seqlens: Number of rows before each sample, ``[B + 1]`` int32.

    Returns:
        The position of the middle frame of each row, ``[T]`` int64, 0 after the last sample; and the position that
        follows each sample, ``[B]`` int64.
    """
    before = torch.nn.functional.pad(row_lengths.cumsum(0), (1, 0))  # [T + 1], frames before each row
    begins = before[cu_seqlens.long()]
    row = torch.arange(row_lengths.shape[0], dtype=torch.int32, device=row_lengths.device)
    sample = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    middle = before[:-1] - begins[sample] + (row_lengths - 1).clamp_min(0) // 2
    return torch.where(sample < cu_seqlens.shape[0] - 1, middle, 0), begins.diff()


def _row_lengths(
    audio: Pooled | Tensor | None,
    audio_lengths: Tensor | None,
    audio_values: Tensor,
    source: Tensor,
    num_rows: int,
) -> Tensor | None:
    """Return the frames of each packed row, ``[T]`` int64; ``None`` if those of the audio are not known."""
    if isinstance(audio, Pooled):
        audio_lengths = audio.segments.lengths
    elif audio is None:
        audio_lengths = source.new_empty(0)
    elif audio_lengths is None:
        return None
    else:
        check_ids("audio_lengths", audio_lengths, audio_values.shape[:1])
        check_same_device("audio_lengths", audio_lengths, audio_values)
        if values_are_checked(audio_lengths) and bool((audio_lengths < 1).any()):
            raise ValueError(f"audio_lengths must be at least 1, got {int(audio_lengths.min())}")
    # Source -1 reads the 0 at the end.
    lengths = torch.cat([audio_lengths.long(), audio_lengths.new_zeros(1, dtype=torch.int64)])
    of_audio = lengths[torch.where(source < 0, lengths.shape[0] - 1, (source - num_rows).clamp_min(0))]
    return torch.where((source >= 0) & (source < num_rows), 1, of_audio)


def _as_table(embedding: Tensor | torch.nn.Embedding | None) -> Tensor | None:
    """Return the table of an embedding module; a module that does more than look up rows raises ``ValueError``."""
    if not isinstance(embedding, torch.nn.Module):
        return embedding
    name = type(embedding).__name__
    if not isinstance(embedding, torch.nn.Embedding):
        raise TypeError(
            f"embedding must be a tensor or a torch.nn.Embedding, got {name}; pass inputs_embeds=embedding(input_ids)"
        )
    if type(embedding).forward is not torch.nn.Embedding.forward or embedding.max_norm is not None:
        raise ValueError(
            f"embedding must only look up rows, but {name} has a forward or a max_norm of its own; pass "
            "inputs_embeds=embedding(input_ids)"
        )
    return embedding.weight


def _check_text(input_ids: Tensor | None, embedding: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
    """Check the text arguments and return the leading shape of the input, ``[B, L]`` or ``[N]``."""
    if inputs_embeds is not None:
        if embedding is not None:
            raise ValueError("embedding and inputs_embeds cannot be combined: pass one of them")
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
    """Return the row groups, int32 of the leading shape."""
    if placeholder_counts is not None and placeholder is None:
        raise ValueError("placeholder_counts needs placeholder, which is missing")
    if placeholder is not None:
        if row_group is not None:
            raise ValueError("placeholder and row_group cannot be combined: pass one of them")
        if input_ids is None:
            raise ValueError("placeholder needs input_ids, which is missing; pass row_group to mark audio without ids")
        if lengths is not None and attention_mask is None:
            check_layout(input_ids, 1, cu_seqlens, lengths)
            if values_are_checked(input_ids):
                check_layout_values(shape, None, lengths)
            mask: Tensor | None = torch.arange(shape[-1], dtype=torch.int64, device=device) < lengths[:, None]
        else:
            mask = attention_mask
            if lengths is not None:
                raise ValueError("attention_mask and lengths cannot be combined: pass one of them")
        reads_values = values_are_checked(input_ids) or (compact and not torch.compiler.is_compiling())
        return find_row_groups(input_ids, placeholder, mask, cu_seqlens, placeholder_counts, reads_values)
    rows = torch.empty(shape, dtype=torch.int32, device=device) if input_ids is None else input_ids
    row_group = check_layout(rows, 1, cu_seqlens, lengths, attention_mask, row_group)
    if row_group is None:
        return torch.zeros(shape, dtype=torch.int32, device=device)
    # Rows that a mask keeps are 1, but here they are text, 0.
    return row_group if attention_mask is None else row_group.clamp_max(0)


def _check_audio(audio: Pooled | Tensor | None, audio_cu_seqlens: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Check the audio and return its rows ``[M, H]`` and offsets ``[A + 1]``."""
    offsets: Tensor | None
    width = like.shape[-1]
    if audio is None:
        return like.new_empty((0, width)), torch.zeros(1, dtype=torch.int32, device=like.device)
    if isinstance(audio, Pooled):
        if audio_cu_seqlens is not None:
            raise ValueError("audio_cu_seqlens needs audio as a tensor: Pooled has its own offsets")
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
