"""Compression settings of the reference audio LLM, and the pooling of its frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastcompress as fc
from fastcompress.decoder.attention import takes_positions
from fastcompress.lalm.configuration import BOUNDARIES
from fastcompress.lalm.ctc import ctc_logits
from fastcompress.nn import IntegrateAndFire, LearnedBoundary
from fastcompress.ops.pack import POSITIONS
from fastcompress.rules import LabelChange, Rule, Uniform, as_rule


class Compression:
    """Mixin for ``FastCompressForConditionalGeneration``: rule or compressor, proportional attention and positions.

    Attributes:
        trained_on_frames: Whether the weights were loaded and were trained on every frame; see ``rule``.
    """

    trained_on_frames = False
    config: Any
    compressor: nn.Module | None
    ctc_head: nn.Linear | None
    device: Any
    language_model: Any
    projector_dtype: Any
    _rule: Rule
    _runs_packed: bool

    @property
    def rule(self) -> str | None:
        """Text form of the rule; ``None``: every frame is kept, or a compressor is set. Setting ``None`` removes both.

        If a loaded model was trained on every frame, setting a rule turns on proportional attention and positions in
        time, if the decoder supports them. Set them after the rule to change them. A model that was trained with a rule
        keeps the settings of its training.
        """
        return self.config.rule

    @rule.setter
    def rule(self, rule: Rule | str | None) -> None:
        compressor = getattr(self, "compressor", None)
        if rule is not None and compressor is not None:
            raise ValueError(f"cannot set rule {rule}: this model has a compressor, {self.compression}; set None first")
        self._rule = Uniform(1) if rule is None else as_rule(rule)
        if isinstance(self._rule, LabelChange) and self.ctc_head is None:
            raise ValueError(f"rule {rule} needs ctc_tokens, which is None in the configuration")
        self.config.rule = None if rule is None else str(self._rule)
        if self.trained_on_frames:
            compresses = self._rule != Uniform(1)
            self.config.proportional_attention = compresses and self._runs_packed
            self.config.positions = "time" if compresses and takes_positions(self.language_model) else "compact"
        if rule is not None:
            self.config.compressor = None  # the checkpoint may name a compressor that was not set again
        elif compressor is not None:
            self.compressor = self.config.boundary_ratio = self.config.compressor = None

    @property
    def proportional_attention(self) -> bool:
        """Whether a token weighs as much as its frames in the decoder's attention. Can be set."""
        return self.config.proportional_attention

    @proportional_attention.setter
    def proportional_attention(self, value: bool) -> None:
        self._check_parts(value, self.config.positions)
        self.config.proportional_attention = value

    @property
    def positions(self) -> str:
        """Positions of the decoder's rows, ``"time"`` or ``"compact"``; see [`FastCompressConfig`][]. Can be set."""
        return self.config.positions

    @positions.setter
    def positions(self, value: str) -> None:
        self._check_parts(self.config.proportional_attention, value)
        self.config.positions = value

    def _check_parts(self, proportional_attention: bool, positions: str) -> None:
        if not isinstance(proportional_attention, bool):
            raise TypeError(f"proportional_attention must be True or False, got {proportional_attention!r}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be 'compact' or 'time', got {positions!r}")
        kind = self.config.text_config.model_type
        if proportional_attention and not self._runs_packed:
            raise NotImplementedError(
                f"proportional_attention must be False: {kind} cannot run with fastcompress's attention"
            )
        if positions == "time" and not takes_positions(self.language_model):
            raise NotImplementedError(f"positions must be 'compact': {kind} takes no position_ids, got 'time'")

    @property
    def compression(self) -> str:
        """Text form of the rule, class name of the compressor, or ``"none"``."""
        if self.compressor is None:
            return self.rule or "none"
        return type(getattr(self.compressor, "original_module", self.compressor)).__name__  # peft may wrap it

    def learn_boundaries(self, ratio: float, kind: str = "h-net") -> None:
        """Replace the rule by learned boundaries.

        Args:
            ratio: Target ratio, in frames per token.
            kind: ``boundary_kind`` of [`FastCompressConfig`][], ``"h-net"`` or ``"cif"``.

        Raises:
            ValueError: ``kind`` is unknown, or ``ratio`` is out of range.
        """
        if kind not in BOUNDARIES:
            raise ValueError(f"kind must be one of {', '.join(BOUNDARIES)}, got {kind!r}")
        width, weight = self.config.audio_config.hidden_size, self.config.boundary_weight
        if kind == "cif":
            self.use_compressor(IntegrateAndFire(width, ratio, loss_weight=weight))
        else:
            self.use_compressor(LearnedBoundary(width, ratio, self.config.reduce, weight))
        self.config.boundary_ratio, self.config.boundary_kind, self.config.compressor = ratio, kind, None

    def use_compressor(self, compressor: nn.Module) -> None:
        """Replace the rule by a module.

        The module's weights and class name are saved with the model. Its code is not: set the module again after
        loading.

        Args:
            compressor: Module that is called with frames ``[A, F, D]`` and ``lengths=`` and returns an object with
                ``values`` and ``cu_seqlens``, like the modules of [`fastcompress.nn`][]. If it has a ``loss`` after
                the call, its ``loss_weight`` (default 1) times this loss is added to the model's.
        """
        self.rule = None
        self.compressor = compressor.to(self.projector_dtype).to(self.device)
        self.config.boundary_ratio, self.config.compressor = None, type(compressor).__name__

    @property
    def compressor_weight(self) -> float:
        """Weight of the compressor's loss."""
        return getattr(self.compressor, "loss_weight", 1.0)

    def compress(self, frames: Tensor, lengths: Tensor) -> Any:
        """Pool frames into tokens by the rule, or by the module of [`use_compressor`][].

        Args:
            frames: Frames ``[A, F, D]`` of ``encode``.
            lengths: Number of frames of each audio, ``[A]`` int64.

        Returns:
            The tokens before projection, a [`fastcompress.Pooled`][] or the compressor's own type.

        Raises:
            ValueError: ``keys`` is ``"ctc"`` and the model has no CTC head.
        """
        if self.compressor is not None:
            return self.compressor(frames.to(self.projector_dtype), lengths=lengths)
        if isinstance(self._rule, LabelChange):
            with torch.no_grad():
                labels = ctc_logits(self.ctc_head, frames).argmax(-1)
            return fc.segment_pool(frames, lengths=lengths, rule=self._rule, labels=labels, reduce=self.config.reduce)
        keys = None
        if self.config.keys == "ctc":
            if self.ctc_head is None:
                raise ValueError("keys='ctc' needs ctc_tokens, which is None in the configuration")
            with torch.no_grad():
                keys = ctc_logits(self.ctc_head, frames).softmax(-1)
        return fc.segment_pool(frames, lengths=lengths, rule=self._rule, keys=keys, reduce=self.config.reduce)

    @property
    def _adds_bias(self) -> bool:
        """Whether the attention gets the bias of proportional attention, which is 0 if every frame is kept."""
        return self.config.proportional_attention and (self.compressor is not None or self._rule != Uniform(1))
