"""Result of ``pack``: the rows of a batch of samples, one after another, as a decoder takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastcompress.checks import check_dense, check_float, check_same_device
from fastcompress.dispatch.call import call
from fastcompress.ops.pack_rows import pack_rows
from fastcompress.segments import Segments, count_of, dtype_and_device


@dataclass(eq=False, repr=False)
class PackedInputs:
    """A packed batch for a decoder.

    With ``compact=False``, ``T`` is an upper bound and ``cu_seqlens[-1]`` is the true number of rows. The trailing rows
    are zeros with label -100, position 0 and source -1.

    Attributes:
        inputs_embeds: Packed rows, ``[T, H]`` in the dtype of the embeddings.
        cu_seqlens: Number of rows before each sample, ``[B + 1]`` int32.
        position_ids: Position of each row in its sample, ``[T]`` int64, from 0; ``positions`` of
            [`fastcompress.pack`][] explains them.
        labels: Packed labels, ``[T]`` int64, or ``None``. They are -100 for audio and for the first row of each sample,
            which no row precedes, so that a loss over ``logits[:-1]`` and ``labels[1:]`` never crosses samples.
        source: Row that each packed row was copied from, ``[T]`` int64: below ``N`` a row of the input (counted through
            all samples), from ``N`` a row of audio. A segment that was pooled here has its first row.
        max_seqlen: Upper bound of the rows of a sample; exact if ``exact_max_seqlen`` was set.
        row_lengths: Number of frames that each row stands for, ``[T]`` int64: the length of its segment, or 1 for
            text. ``None``: not known, because the audio was passed without lengths.
        next_positions: Position that follows each sample, ``[B]`` int64, from which generation continues. Models of
            ``apply_to`` and the reference model add the difference to the number of rows themselves.
        in_time: True if ``position_ids`` are those of the uncompressed sample.
        segments: Segments of the rows of ``inputs_embeds`` if they were pooled here, else ``None``.
        compact: True if ``T`` is the exact number of rows.
    """

    inputs_embeds: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor
    labels: Tensor | None
    source: Tensor
    max_seqlen: int
    row_lengths: Tensor | None
    next_positions: Tensor
    in_time: bool = False
    segments: Segments | None = None
    compact: bool = True

    def unpack(self, values: Tensor | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
        """Return packed rows as a padded batch: the inverse of packing.

        Args:
            values: Values per packed row, ``[T, ...]``, or ``[1, T, ...]`` as a decoder returns them; floating point,
                or int32, int64 or bool such as ``position_ids``. ``None`` means ``inputs_embeds``.
            side: Side of the padding, ``"right"``, or ``"left"`` for a prompt to generate from.

        Returns:
            The values ``[B, S, ...]``, with zeros for padding, and the attention mask ``[B, S]`` int64. ``S`` is the
            largest number of rows of a sample, which is read from the device. Gradients go to ``values``.

        Raises:
            TypeError: If ``values`` has a wrong type or dtype.
            ValueError: If a shape, a device or ``side`` is invalid.
        """
        if side not in ("right", "left"):
            raise ValueError(f"side must be 'right' or 'left', got {side!r}")
        values = self.inputs_embeds if values is None else values
        check_dense("values", values)
        is_float = values.dtype not in (torch.int32, torch.int64, torch.bool)
        if is_float:
            check_float("values", values)
        check_same_device("values", values, self.source)
        count = self.source.shape[0]
        # With one packed row the shape is ambiguous: [1, 1] means [T, 1], and [1, 1, V] means [1, T, V].
        if values.shape[:2] == (1, count) and (count != 1 or values.dim() > 2):
            values = values[0]
        if values.dim() < 1 or values.shape[0] != count:
            raise ValueError(f"values must have shape [{count}, ...], one per packed row, got {list(values.shape)}")
        lengths = self.cu_seqlens.diff()
        longest = cast(int, lengths.max().item()) if lengths.shape[0] else 0
        torch._check(longest >= 0)  # a hint for torch.export
        first = torch.zeros_like(lengths) if side == "right" else longest - lengths  # first column of each sample
        column = torch.arange(longest, dtype=torch.int64, device=values.device) - first[:, None]
        mask = (column >= 0) & (column < lengths[:, None])
        index = torch.where(mask, self.cu_seqlens[:-1, None] + column, -1).reshape(-1)
        if not is_float:
            padded = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])[index]
            return padded.reshape(lengths.shape[0], longest, *values.shape[1:]), mask.long()
        packed = torch.arange(count, dtype=torch.int64, device=values.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), packed.int(), right=True)
        place = torch.cat([first - self.cu_seqlens[:-1], first.new_zeros(1)])[sequence] + packed
        target = torch.where(sequence < lengths.shape[0], sequence * longest + place, -1)
        flat = values.reshape(count, values.shape[1:].numel())
        needs_grad = torch.is_grad_enabled() and flat.requires_grad
        rows = call(pack_rows, (flat, flat[:0], index, target, False), needs_grad, lambda: None)
        return rows.reshape(lengths.shape[0], longest, *values.shape[1:]), mask.long()

    def model_inputs(self, proportional_attention: bool = False) -> dict[str, Any]:
        """Return keyword arguments for a transformers decoder that [`fastcompress.decoder.prepare`][] has prepared.

        The attention of any other decoder raises an error when it reads ``attention_mask``.

        All tensors have a batch dimension of 1, ``[1, T, ...]``. ``attention_mask`` is an empty mask of four
        dimensions, which transformers passes on unchanged instead of building a mask of T x T. To use the flash
        attention of transformers, set ``attention_mask`` to ``None``. ``use_cache`` is false, because packed rows are
        not a prompt that can be continued.

        Args:
            proportional_attention: Whether a token of ``L`` frames weighs as much as its frames: ``log(L)`` is added to
                its attention scores.

        Raises:
            ValueError: If ``proportional_attention`` is true and ``row_lengths`` is ``None``.
        """
        cu_seqlens, max_seqlen, device = self.cu_seqlens, self.max_seqlen, self.inputs_embeds.device
        if not self.compact:  # attention must cover every row: the trailing rows become one more sequence
            count = self.inputs_embeds.shape[0]
            cu_seqlens = torch.nn.functional.pad(cu_seqlens, (0, 1), value=count)
            max_seqlen = count
        kwargs: dict[str, Any] = {
            "inputs_embeds": self.inputs_embeds[None],
            "attention_mask": torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device).as_subclass(PackedMask),
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
            "use_cache": False,
        }
        if self.in_time:
            kwargs["next_positions"] = self.next_positions
        if proportional_attention:
            kwargs["key_bias"] = self.key_bias()
        if self.labels is not None:
            kwargs["labels"] = self.labels[None]
        return kwargs

    def key_bias(self) -> Tensor:
        """Return the logarithm of ``row_lengths``, ``[T]`` fp64, for proportional attention; 0 for text.

        Raises:
            ValueError: If ``row_lengths`` is ``None``.
        """
        if self.row_lengths is None:
            raise ValueError(
                "proportional attention needs row_lengths, which is None: pass audio as Pooled, or audio_lengths, to "
                "fastcompress.pack"
            )
        return self.row_lengths.clamp_min(1).double().log()

    def __repr__(self) -> str:
        if not isinstance(self.inputs_embeds, Tensor):  # in a tree of torch.export
            return object.__repr__(self)
        rows, width = self.inputs_embeds.shape
        labels = "" if self.labels is None else ", with labels"
        what = f"{count_of(rows, 'row')} of {count_of(self.cu_seqlens.shape[0] - 1, 'sample')}, width {width}"
        return f"PackedInputs({what}{dtype_and_device(self.inputs_embeds)}{labels})"


class PackedMask(Tensor):
    """Empty attention mask, which raises an error where attention would apply it.

    Only attention that knows where samples start may run on packed rows; any other fails on the mask's shape, with an
    error that does not name the cause.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Tensor) and not isinstance(value, cls) for value in (*args, *kwargs.values())):
            raise ValueError(
                "this decoder's attention does not know where packed samples start: call "
                "fastcompress.decoder.prepare(decoder) before decoder(**packed.model_inputs()), or run the decoder "
                "padded on the embeddings and mask of packed.unpack()"
            )
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # of torch

    def __deepcopy__(self, memo: Any) -> PackedMask:  # torch's own fails for empty tensors of a subclass
        return torch.empty_like(self).as_subclass(PackedMask)


torch.export.register_dataclass(PackedInputs, serialized_type_name="fastcompress.PackedInputs")
