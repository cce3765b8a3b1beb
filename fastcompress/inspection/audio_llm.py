"""The rows of audio that an audio LLM compresses, as a source of frames for ``inspect_audio``.

``apply_to`` passes the same rows to its compressor, so a rule that is chosen on them is suitable for the model.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcompress import Pooled, segment_pool
from fastcompress.audio import Progress
from fastcompress.inspection.table import ENCODER_RULES, Encoder, EncoderError, FrameSource, first_line

#: Architectures to load in place of the whole model, of which only a part is compressed.
_PARTS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_LONGEST = 30  # seconds to encode at once


def load_source(path: str | os.PathLike[str], before_projector: bool = False) -> FrameSource:
    """Return the source of frames for a local folder: of an encoder, an audio LLM, or the reference model.

    Raises:
        EncoderError: The folder has none of them, or its model cannot be loaded.
    """
    from fastcompress.integrations.transformers import FAMILIES, REFUSED

    folder = Path(path)
    final = folder / "final"
    folder = final if final.is_dir() else folder  # of a run
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None  # which Encoder reports
    if kind == "fastcompress":
        return ReferenceModel(folder)
    if kind in FAMILIES or kind in _PARTS:
        return AudioLLM(folder, before_projector)
    if kind in REFUSED:
        raise EncoderError(f"{folder}: {kind} cannot be compressed: {REFUSED[kind]}")
    return Encoder(path)


class _Recorder(nn.Module):
    """A compressor that records its input and returns it unchanged."""

    rows: Tensor

    def forward(self, rows: Tensor, cu_seqlens: Tensor) -> Pooled:
        self.rows = rows.float()
        return segment_pool(rows, cu_seqlens=cu_seqlens, rule="uniform:1")


class AudioLLM:
    """Compute the rows of audio that ``apply_to`` compresses in an audio LLM of transformers.

    Audio is encoded in pieces of the processor's window, or of 30 s. Rows of padding after the last piece are dropped.
    The decoder is loaded, but only the encoder and the projector run.

    Args:
        path: Folder of the model and its processor. Nothing is downloaded.
        before_projector: Whether to use the encoder's frames, as with ``apply_to(..., before_projector=True)``, instead
            of the projector's output.

    Raises:
        EncoderError: The model or its processor cannot be loaded, or cannot be compressed in this way.
    """

    default_rules: tuple[str, ...] = ENCODER_RULES

    def __init__(self, path: str | os.PathLike[str], before_projector: bool = False) -> None:
        import transformers

        from fastcompress.integrations.transformers import apply_to

        self.path: str = os.fspath(path)
        try:
            config = transformers.AutoConfig.from_pretrained(self.path, local_files_only=True)
            name = _PARTS.get(config.model_type) or (config.architectures or ["none"])[0]
            self._processor: Any = transformers.AutoProcessor.from_pretrained(self.path, local_files_only=True)
            loaded = getattr(transformers, name).from_pretrained(self.path, dtype="auto", local_files_only=True)
            self._recorder = _Recorder()
            self._model = apply_to(loaded.eval(), self._recorder, pack=False, before_projector=before_projector)
        except Exception as error:  # for a bad folder, transformers, safetensors and json raise errors of many types
            raise EncoderError(f"{self.path}: cannot load an audio LLM ({first_line(error)})") from error
        extractor = getattr(self._processor, "feature_extractor", None) or self._processor.audio_processor
        self.sample_rate: int = extractor.sampling_rate
        #: Samples per call; processors cut audio that is longer than their extractor's window.
        self.piece: int = min(getattr(extractor, "n_samples", math.inf), _LONGEST * self.sample_rate)
        side = "encoder of" if before_projector else "audio of"
        self.name: str = f"{side} {self._model.config.model_type} {Path(self.path).resolve().name}"

    @torch.no_grad()
    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return the rows of audio ``[T, D]`` fp32 and their rate per second.

        Raises:
            EncoderError: There are no samples, or the model cannot encode them.
        """
        count = len(samples)
        if count == 0:
            raise EncoderError("the audio is empty: 0 samples")
        pieces: list[Tensor] = []
        for start in range(0, count, self.piece):
            piece = samples[start : start + self.piece]
            pieces.append(self._rows(piece))
            if progress:
                progress((start + len(piece)) / self.sample_rate, count / self.sample_rate)
        rows = torch.cat(pieces)
        return rows, len(rows) * self.sample_rate / count

    def _rows(self, piece: np.ndarray) -> Tensor:
        from fastcompress.integrations.transformers import compressed_prompt, prompts
        from fastcompress.integrations.transformers.families import family_of

        seconds = len(piece) / self.sample_rate
        try:
            inputs = prompts.processor_inputs(self._processor, [piece], [""])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # VibeVoice adds noise to its frames
                compressed_prompt(self._model, **{name: self._cast(value) for name, value in inputs.items()})
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            raise EncoderError(f"{self.path}: cannot encode {seconds:.2f} s of audio ({first_line(error)})") from error
        rows = self._recorder.rows
        expected = math.ceil(seconds * family_of(self._model).tokens_per_second)
        # Some models encode a whole window, whose rest is silence.
        return rows[:expected] if len(rows) > 1.5 * expected + 2 else rows

    def _cast(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._model.dtype) if is_float else value


class ReferenceModel:
    """Compute the frames of the reference audio LLM's encoder, which its rule compresses.

    Args:
        path: Folder of a model or of a run's adapter.

    Raises:
        EncoderError: The model cannot be loaded.
    """

    default_rules: tuple[str, ...] = ENCODER_RULES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from fastcompress.decoder.generation import unwrap
        from fastcompress.lalm.loading import RunError, load_model

        self.path: str = os.fspath(path)
        try:
            model, self._processor = load_model(self.path)
        except (RunError, RuntimeError) as error:
            raise EncoderError(str(error)) from error
        self._model: Any = unwrap(model)
        self.sample_rate: int = self._processor.sampling_rate
        self.name: str = f"{self._model.config.audio_config.model_type} encoder of {Path(self.path).resolve().name}"

    @torch.no_grad()
    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        """Return the encoder's frames ``[T, D]`` fp32 and their rate per second.

        Raises:
            EncoderError: The audio is shorter than a frame, or the encoder cannot encode it.
        """
        try:
            features = self._processor.pad_features([self._processor.features(samples, self.sample_rate)])
            frames, lengths = self._model.encode(features["input_features"], features["feature_attention_mask"])
        except (ValueError, RuntimeError) as error:
            raise EncoderError(f"{self.path}: {first_line(error)}") from error
        rows = frames[0, : int(lengths[0])].float()
        if progress:
            progress(len(samples) / self.sample_rate, len(samples) / self.sample_rate)
        return rows, len(rows) * self.sample_rate / len(samples)
