"""Draw docs/images/inspect.png: `python docs/images/draw_inspect.py [folder]`.

The picture is that of `fastcompress inspect`, for the encoder output of the shipped model, at 50 frames per second.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcompress import Rule
from fastcompress.audio import Progress
from fastcompress.inspection.picture import draw
from fastcompress.inspection.table import inspect_audio
from fastcompress.lalm.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
RULES = ("uniform:2", "uniform:3", "uniform:4", "top-k:rate=3", "local-max", "threshold:0.15")


class ShippedEncoder:
    """The encoder of the model in `assets/models/digits`."""

    name = "encoder of assets/models/digits"
    default_rules = RULES

    def __init__(self) -> None:
        self.model, self.processor = load_model(ROOT / "assets" / "models" / "digits")
        self.sample_rate: int = self.processor.sampling_rate

    @torch.inference_mode()
    def frames(self, samples: np.ndarray, progress: Progress | None = None) -> tuple[Tensor, float]:
        inputs = self.processor(text="<|audio|>", audio=samples, return_tensors="pt")
        frames, lengths = self.model.encode(inputs["input_features"], inputs["feature_attention_mask"])
        return frames[0, : int(lengths[0])].float().clone(), 50.0


def main(folder: str = str(Path(__file__).parent)) -> None:
    rules = [Rule.from_string(text) for text in RULES]
    draw(inspect_audio(ROOT / "assets" / "digits" / "1.wav", rules, ShippedEncoder()), Path(folder) / "inspect.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
