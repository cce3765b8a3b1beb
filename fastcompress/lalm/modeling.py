"""The reference audio LLM: encoder, compression, projector, packing and decoder."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

import fastcompress as fc
from fastcompress import decoder
from fastcompress.decoder.attention import stack_of
from fastcompress.decoder.generation import new_token_limits, prepend_prompt
from fastcompress.decoder.limits import warn_of_limits, warn_of_positions
from fastcompress.decoder.loss import batch_share, label_rows, next_token_loss, zero_of
from fastcompress.decoder.prompt import Prompt, adapt_calls, frames_per_token, starting_from
from fastcompress.lalm.compression import Compression
from fastcompress.lalm.configuration import FastCompressConfig, warn_of_missing_compressor
from fastcompress.lalm.ctc import ctc_loss
from fastcompress.lalm.dtypes import cast_part, part_dtypes
from fastcompress.lalm.encoders import build_encoder, encode, load_encoder
from fastcompress.rules import Rule, as_rule


@dataclass
class FastCompressOutput(ModelOutput):
    """Results of ``FastCompressForConditionalGeneration.forward``.

    Attributes:
        loss: Sum of ``lm_loss`` and the weighted ``ctc_loss`` and ``compressor_loss``. With ``num_items_in_batch``,
            these two are also multiplied by this batch's share of the step's labels.
        logits: ``[1, T, V]`` of the packed rows; with labels ``[1, K, V]`` of the ``K`` rows that predict a label.
        lm_loss: Cross-entropy of the labels.
        ctc_loss: CTC loss of the encoder's frames, before weighting.
        compressor_loss: Loss of a learned compressor, before weighting.
        packed: Input of the decoder.
        num_audio_tokens: Number of audio tokens in ``packed``, 0-dim int64.
        num_frames: Number of frames before compression, 0-dim int64.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    ctc_loss: Tensor | None = None
    compressor_loss: Tensor | None = None
    packed: fc.PackedInputs | None = None
    num_audio_tokens: Tensor | None = None
    num_frames: Tensor | None = None


class FastCompressForConditionalGeneration(Compression, PreTrainedModel, GenerationMixin):
    """Compress the frames of a speech encoder and feed them, projected, to a causal decoder (arXiv 2511.20973).

    A decoder that cannot run packed ([`fastcompress.decoder.prepare`][]) runs padded, after a warning. Without
    ``audio_tower`` or ``language_model``, these are built from ``config`` with random weights.
    """

    config_class: type[FastCompressConfig] = FastCompressConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("audio", "text")  # Any: transformers' models use a tuple, its base class says str or list
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _no_split_modules = None

    def __init__(
        self, config: FastCompressConfig, audio_tower: nn.Module | None = None, language_model: Any = None
    ) -> None:
        super().__init__(config)
        self.audio_tower: Any = build_encoder(config.audio_config) if audio_tower is None else audio_tower
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model: Any = language_model
        width, target = config.audio_config.hidden_size, config.text_config.hidden_size
        if config.projector_hidden_size is None:
            self.projector: nn.Module = nn.Linear(width, target)
        else:
            hidden = config.projector_hidden_size
            self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, target))
        units = config.ctc_tokens
        self.ctc_head: nn.Linear | None = None if units is None else nn.Linear(width, len(units) + 1)
        self.compressor: nn.Module | None = None
        self.rule = config.rule
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers
        if config.boundary_ratio is not None:  # after post_init, which would overwrite its initial weights
            self.learn_boundaries(config.boundary_ratio, config.boundary_kind)
        else:
            warn_of_missing_compressor(config)
        for name, dtype in (config.part_dtypes or {}).items():
            if (part := getattr(self, name)) is not None:
                cast_part(part, getattr(torch, dtype))
        self._runs_packed = self._prepare_decoder()
        adapt_calls(stack_of(self.language_model))
        self._check_parts(config.proportional_attention, config.positions)
        self.train_encoder(config.train_encoder)

    @classmethod
    def from_parts(
        cls,
        audio_model: str | nn.Module,
        text_model: str | nn.Module,
        *,
        audio_token_id: int,
        rule: Rule | str | None = None,
        **kwargs: Any,
    ) -> FastCompressForConditionalGeneration:
        """Build a model from a pretrained encoder and decoder, with a new projector.

        Encoder and decoder keep their dtypes; the projector is in fp32.

        Args:
            audio_model: Encoder, or its folder or name.
            text_model: Decoder, or its folder or name.
            audio_token_id: Id of the processor's audio token. The decoder's embedding table needs no row for it.
            rule: Compression rule or its text form; ``None``: every frame is kept.
            kwargs: Further arguments of [`FastCompressConfig`][].
        """
        encoder: Any = load_encoder(audio_model) if isinstance(audio_model, str) else audio_model
        decoder: Any = AutoModelForCausalLM.from_pretrained(text_model) if isinstance(text_model, str) else text_model
        config = FastCompressConfig(
            encoder.config,
            decoder.config,
            None if rule is None else str(as_rule(rule)),
            audio_token_id=audio_token_id,
            **kwargs,
        )
        return cls(config, encoder, decoder)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does; by default each submodule keeps the dtype in which it was saved."""
        if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) != "auto":
            if isinstance(kwargs.get("config"), FastCompressConfig):
                kwargs["config"] = copy.deepcopy(kwargs["config"])
                kwargs["config"].part_dtypes = None
            else:
                kwargs["part_dtypes"] = None
        rule = kwargs.pop("rule", None)  # set after loading, when it is known whether the weights were trained with one
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        model.trained_on_frames = model.compression == "none" and model.config.compressor is None
        if rule is not None:
            model.rule = rule
        return found

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, and the dtype of each submodule in its configuration."""
        others = {name: dtype for name, dtype in part_dtypes(self).items() if dtype != self.dtype}
        self.config.part_dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in others.items()} or None
        super().save_pretrained(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        """Generation settings of the decoder, which are saved and loaded with this model."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "language_model" in self._modules:  # transformers also sets one before the decoder exists
            self.language_model.generation_config = value

    def _prepare_decoder(self) -> bool:
        try:
            decoder.prepare(self.language_model)
        except NotImplementedError as error:
            warnings.warn(f"the decoder runs padded: {error}", stacklevel=3)
            return False
        return True

    @property
    def projector_dtype(self) -> torch.dtype:
        """Dtype of the projector, which may differ from those of encoder and decoder."""
        return next(self.projector.parameters()).dtype

    def train_encoder(self, mode: bool = True) -> None:
        """Train the encoder and its CTC head, or freeze them and keep the encoder in evaluation mode."""
        self.config.train_encoder = mode
        self.audio_tower.requires_grad_(mode)
        if self.ctc_head is not None:
            self.ctc_head.requires_grad_(mode)
        if hasattr(self.audio_tower, "embed_positions") and self.audio_tower.config.model_type == "whisper":
            self.audio_tower.embed_positions.requires_grad_(False)  # Whisper's positions are fixed sinusoids
        self.train(self.training)

    def train(self, mode: bool = True) -> FastCompressForConditionalGeneration:
        super().train(mode)
        if not self.config.train_encoder:
            self.audio_tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def encode(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode audio into frames, before compression.

        Args:
            features: The processor's ``input_features``, ``[A, bins, T]`` or ``[A, S]``.
            mask: ``[A, T]`` or ``[A, S]``, 0 after the end of each audio; ``None``: no padding.

        Returns:
            Frames ``[A, F, D]`` and the number of frames of each audio, ``[A]`` int64.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_encoder):
            config = self.config
            return encode(self.audio_tower, features, mask, config.audio_padding, config.normalize_features)

    def pack(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        frame_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        pooled: Any = None,
    ) -> fc.PackedInputs:
        """Build the decoder's input: embed the text, compress and project the frames, and pack both.

        Args:
            input_ids: ``[B, L]`` int64, with one ``audio_token_id`` per audio.
            attention_mask: ``[B, L]``, 0 for padding on either side; ``None``: no padding.
            frames: Frames ``[A, F, D]`` of [`encode`][]; ``None``: the batch has no audio.
            frame_lengths: Number of frames of each audio, ``[A]`` int64; required with ``frames``.
            labels: ``[B, L]`` int64, -100 where nothing is predicted.
            pooled: Result of ``compress``, in place of ``frames``.

        Raises:
            ValueError: Arguments exclude each other, or [`fastcompress.pack`][] refuses them.
        """
        audio = offsets = lengths = None
        if frames is not None and pooled is not None:
            raise ValueError("pass frames or pooled, not both")
        if frames is not None and frame_lengths is not None:
            pooled = self.compress(frames, frame_lengths)
        elif frames is not None or frame_lengths is not None:
            raise ValueError("frames and frame_lengths must be passed together, as encode returns them")
        if pooled is not None:
            audio, offsets = self.projector(pooled.values.to(self.projector_dtype)), pooled.cu_seqlens
            lengths = frames_per_token(pooled)
        table = self.get_input_embeddings()
        rest: dict[str, Any] = {
            "audio_cu_seqlens": offsets,
            "audio_lengths": lengths,
            "positions": self.config.positions,
            "placeholder": self.config.audio_token_id,
            "placeholder_counts": 1,
            "attention_mask": attention_mask,
            "labels": labels,
        }
        if type(table) is nn.Embedding:
            return fc.pack(input_ids, table.weight, None if audio is None else audio.to(table.weight.dtype), **rest)
        # A subclass of Embedding may scale its rows and a wrapper may change them, so the table itself must be called.
        embeds = table(input_ids.masked_fill(input_ids == self.config.audio_token_id, 0))
        if audio is None:  # without `audio`, `pack` would read inputs_embeds as already merged with audio
            audio, rest["audio_cu_seqlens"] = embeds.new_empty(0, embeds.shape[-1]), input_ids.new_zeros(1)
            rest["audio_lengths"] = input_ids.new_empty(0)
        return fc.pack(input_ids, inputs_embeds=embeds, audio=audio.to(embeds.dtype), **rest)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        ctc_labels: Tensor | None = None,
        frames: Tensor | None = None,
        frame_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FastCompressOutput:
        """Run the model on a batch.

        Args:
            input_ids: ``[B, L]`` int64, with one ``audio_token_id`` per audio.
            attention_mask: ``[B, L]``, 0 for padding on either side; ``None``: no padding.
            input_features: ``[A, bins, T]`` or ``[A, S]``, audios in the order of their tokens; ``None``: no audio.
            feature_attention_mask: ``[A, T]`` or ``[A, S]``, 0 after the end of each audio.
            labels: ``[B, L]`` int64, -100 where nothing is predicted.
            ctc_labels: Units of each audio, ``[A, U]`` int64, at least 1; -100 after the last unit.
            frames: Frames ``[A, F, D]`` of [`encode`][], in place of ``input_features``.
            frame_lengths: Number of frames of each audio, ``[A]`` int64; required with ``frames``.
            num_items_in_batch: Divisor of the summed label losses; ``None``: the number of labels.
            kwargs: Further arguments of the decoder.

        Raises:
            ValueError: Arguments exclude each other, ``ctc_labels`` do not fit, or [`pack`][] refuses the input.
        """
        if input_features is not None:
            if frames is not None:
                raise ValueError("pass input_features or frames, not both")
            frames, frame_lengths = self.encode(input_features, feature_attention_mask)
        packed = self.pack(input_ids, attention_mask, frames, frame_lengths, labels)
        ctc = None
        if ctc_labels is not None:
            ctc = self._ctc_loss(frames, frame_lengths, ctc_labels)
        logits, lm_loss = self._decode(packed, num_items_in_batch, kwargs)
        compressor_loss = None if frames is None else getattr(self.compressor, "loss", None)
        loss = None
        if lm_loss is not None:
            loss = lm_loss
            share = batch_share(logits.shape[1], num_items_in_batch)
            if ctc is not None:
                loss = loss + self.config.ctc_weight * share * ctc
            if compressor_loss is not None:
                loss = loss + self.compressor_weight * share * compressor_loss
            unused = self._unused(frames is not None, ctc is not None)
            loss, lm_loss = loss + unused, lm_loss + unused
        count = packed.source >= input_ids.numel()
        frame_count = torch.zeros((), dtype=torch.int64) if frame_lengths is None else frame_lengths.sum()
        return FastCompressOutput(loss, logits, lm_loss, ctc, compressor_loss, packed, count.sum(), frame_count)

    def prefill(self, packed: fc.PackedInputs) -> Tensor:
        """Run the decoder over prompts from [`pack`][], as ``generate`` does before the first new token.

        Returns:
            Logits ``[1, B, V]`` of the last row of each prompt.
        """
        last = packed.cu_seqlens[1:].long() - 1
        if not self._runs_packed:
            return self._decode(replace(packed, labels=None), None, {})[0][:, last]
        inputs = packed.model_inputs(self._adds_bias)
        return self.language_model(**inputs, logits_to_keep=last).logits

    def _decode(
        self, packed: fc.PackedInputs, num_items: Tensor | int | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits ``[1, T, V]`` and ``None``; with labels, logits ``[1, K, V]`` and the loss."""
        labels = packed.labels
        warn_of_positions(self.config, packed)
        if self._runs_packed:
            inputs = packed.model_inputs(self._adds_bias) | kwargs
            inputs.pop("labels", None)
            if labels is None:
                return self.language_model(**inputs).logits, None
            rows = label_rows(labels)
            logits = self.language_model(**inputs, logits_to_keep=rows).logits
            if logits.shape[1] != len(rows):  # this decoder ignores a tensor in logits_to_keep
                logits = logits[:, rows]
        else:
            embeds, mask = packed.unpack()
            if self.config.positions == "time":
                kwargs = {"position_ids": packed.unpack(packed.position_ids)[0]} | kwargs
            out = self.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **kwargs)
            logits = out.logits[mask.bool()][None]
            if labels is None:
                return logits, None
            rows = label_rows(labels)
            logits = logits[:, rows]
        return logits, next_token_loss(logits[0], labels, rows, num_items)

    def _ctc_loss(self, frames: Tensor | None, lengths: Tensor | None, labels: Tensor) -> Tensor:
        if self.ctc_head is None:
            raise ValueError("ctc_labels need ctc_tokens, which is None in the configuration")
        if frames is None or lengths is None or labels.shape[0] != frames.shape[0]:
            audios = 0 if frames is None else frames.shape[0]
            raise ValueError(f"ctc_labels must have one row per audio, {audios}, got shape {list(labels.shape)}")
        return ctc_loss(self.ctc_head, frames, lengths, labels)

    def _unused(self, has_audio: bool, has_ctc: bool) -> Tensor:
        """Return 0 with a gradient path to the parameters that this batch did not use (see ``zero_of``)."""
        # Always include the encoder: layer drop and its mask vector leave some of its parameters unused.
        unused = [self.audio_tower] + ([] if has_audio else [self.projector, *filter(None, [self.compressor])])
        if self.ctc_head is not None and not has_ctc:
            unused.append(self.ctc_head)
        return zero_of((p for module in unused for p in module.parameters()), self.device)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        frame_lengths: Tensor | None = None,
        pooled: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Continue each prompt.

        The first six arguments are those of [`forward`][].

        Args:
            pooled: Result of ``compress``, in place of ``frames``.
            kwargs: Arguments of the decoder's ``generate``: ``max_new_tokens``, ``num_beams``, ``streamer``, ...;
                ``max_length`` and ``min_length`` count the ids that are returned.

        Returns:
            ``[B, L + N]`` int64, ``input_ids`` followed by the new tokens; with ``return_dict_in_generate``, the
            decoder's output with these ``sequences``.
        """
        if input_features is not None:
            frames, frame_lengths = self.encode(input_features, feature_attention_mask)
        packed = self.pack(input_ids, attention_mask, frames, frame_lengths, pooled=pooled)
        embeds, mask = packed.unpack(side="left")  # new tokens must follow the last row of every prompt
        kwargs |= new_token_limits(self.language_model, kwargs, input_ids.shape[1])
        prompt = Prompt.of(packed, "left", self._adds_bias)
        warn_of_positions(self.config, packed)
        with starting_from(prompt):
            out = self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        out = prepend_prompt(out, input_ids)
        warn_of_limits(self.language_model, kwargs, out, input_ids.shape[1], packed)
        return out


AutoModel.register(FastCompressConfig, FastCompressForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(FastCompressConfig, FastCompressForConditionalGeneration, exist_ok=True)
