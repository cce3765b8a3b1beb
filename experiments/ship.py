"""Write a trained model for shipping: in half precision, without buffers that are recomputed.

``python experiments/ship.py out/experiment/models/digits-1-base assets/models/digits``
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastcompress.lalm.loading import load_model


def main(source: str, target: str) -> None:
    model, processor = load_model(source)
    model.half().save_pretrained(target)
    processor.save_pretrained(target)
    for path in sorted(Path(target).iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
