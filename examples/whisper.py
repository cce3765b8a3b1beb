"""Transcribe the clips of assets/speech with Whisper, from every frame and from a quarter of the tokens, untrained.

    python examples/whisper.py openai/whisper-tiny.en  # a folder or a name: a name is downloaded (150 MB)

The whole window of 30 s is pooled, with its silence, so that the decoder attends to 375 rows instead of 1,500.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.utils import logging

from fastcompress.audio import load_audio
from fastcompress.integrations.transformers import apply_to, revert

SPEECH = Path(__file__).resolve().parents[1] / "assets" / "speech"
RULES = ("every frame", "uniform:4", "min-variance:rate=4")


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a Whisper model")
    path = parser.parse_args(arguments).model
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    is_multilingual = getattr(model.generation_config, "is_multilingual", False)
    for clip in sorted(SPEECH.glob("*.wav")):
        if clip.stem == "german" and not is_multilingual:
            continue
        samples = load_audio(clip)
        inputs = processor(samples, sampling_rate=16000, return_tensors="pt")
        language = {"language": "de" if clip.stem == "german" else "en"} if is_multilingual else {}
        print(clip.name)
        for rule in RULES:
            if rule != "every frame":
                apply_to(model, rule, silence="pool")
            tokens = model.generate(**inputs, **language, max_new_tokens=64)
            if rule != "every frame":
                revert(model)
            print(f"  {rule:20}{processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()}")


if __name__ == "__main__":
    main()
