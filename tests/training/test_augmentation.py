"""Augmentation of features in training: masks, other speakers, other tempos."""

from __future__ import annotations

import random

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from fastcompress.training.examples import Augmentation


def test_augmentation():
    features = torch.randn(80, 200)
    masks = Augmentation(level=0.0, warp=0.0, tempo=0.0)
    plain = masks(features, random.Random(1))
    changed = plain != features
    assert torch.equal(plain, masks(features, random.Random(1)))
    rows, columns = changed.all(1).sum(), changed.all(0).sum()
    assert 0 < rows <= 24 and 0 < columns <= 20 and plain[changed].unique().numel() == 1
    assert not torch.equal(features, Augmentation(time_masks=0, frequency_masks=0)(features, random.Random(1)))
    tiny = torch.randn(80, 3)
    assert Augmentation(tempo=0.0)(tiny, random.Random(2)).shape == tiny.shape
    assert Augmentation()(tiny, random.Random(2)).shape[1] in (3, 2, 4)


def test_augmentation_imitates_other_speakers():
    """A tone moves to its new frequency. A slower tempo keeps the content in order."""
    quiet = {"time_masks": 0, "frequency_masks": 0, "level": 0.0}
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    time = np.arange(16000) / 16000

    def features(hertz: float) -> torch.Tensor:
        tone = np.sin(2 * np.pi * hertz * time).astype(np.float32)
        return extractor(tone, sampling_rate=16000, return_tensors="pt").input_features[0]

    for seed in range(6):
        scale = 1 + random.Random(seed).uniform(-0.2, 0.2)
        for hertz in (500.0, 1500.0, 3000.0):
            moved = Augmentation(**quiet, tempo=0.0)(features(hertz), random.Random(seed)).mean(1)
            expected = features(hertz / scale).mean(1)
            assert abs(int(moved.argmax()) - int(expected.argmax())) <= 1
    ramp = torch.arange(40.0).expand(80, 40)
    lengths = set()
    for seed in range(20):
        stretched = Augmentation(**quiet, warp=0.0)(ramp, random.Random(seed))
        lengths.add(stretched.shape[1])
        assert (stretched.diff(dim=1) > 0).all() and stretched[0, 0] == 0 and stretched[0, -1] == 39
    assert 34 <= min(lengths) < 38 and 42 < max(lengths) <= 46
    assert torch.equal(Augmentation(**quiet, warp=0.0, tempo=0.0)(ramp, random.Random(1)), ramp)
