"""The log of a training run: ``log.csv``, and TensorBoard events if tensorboard is installed."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

from fastcompress.files import write_file

COLUMNS = (
    "step", "loss", "lm_loss", "ctc_loss", "teacher_loss", "development_loss", "grad_norm", "learning_rate",
    "tokens_per_second", "seconds_per_step", "tokens", "audio_tokens", "audio_frames",
)  # fmt: skip


class Logs:
    """Log of the steps after ``step``. Lines of later steps, which a killed run had written, are dropped.

    Args:
        folder: Folder of the run.
        step: Steps that were done before.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.csv"
        rows = [row for row in read(path) if row["step"] <= step]
        lines = [",".join(COLUMNS), *(",".join(_text(row.get(c)) for c in COLUMNS) for row in rows)]
        write_file(path, "\n".join(lines) + "\n")
        self._file = path.open("a", encoding="utf-8", buffering=1, newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write a line with the measurements up to a step."""
        values = {"step": step, **row}
        self._writer.writerow([_text(values.get(column)) for column in COLUMNS])
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, float]]:
    """Read the lines of a ``log.csv``, except for a line that a kill has cut short."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return [{name: float(value) for name, value in row.items() if value} for row in rows if row.get("step")]


def _text(value: float | None) -> str:
    """Format a number with every digit, so that runs can be compared bit by bit."""
    if value is None:
        return ""
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(float(value))
