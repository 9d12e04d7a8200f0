"""What a run writes down while it trains: JSON Lines and CSV always, TensorBoard where it is asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avser_fast.errors import AvserError
from avser_fast.inference.whole_files import write_bytes

from .run_folder import read_lines

#: Columns of ``log.csv``, in order; ``log.jsonl`` holds what there is of them.
COLUMNS = (
    "stage",
    "step",
    "epoch",
    "loss",
    "speech_loss",
    "face_loss",
    "domain_loss",
    "fusion_loss",
    "lambda",
    "lr",
    "speech_accuracy",
    "face_accuracy",
    "domain_accuracy",
    "bad_share",
    "gradient_norm",
    "seconds",
)


class Lines:
    """A JSON Lines file that records are appended to; ``columns`` also writes them as CSV beside it."""

    def __init__(self, path: Path, columns: Sequence[str] = ()):
        self.path, self.columns = path, tuple(columns)

    def rewind(self, stage: str, step: int) -> None:
        """Forget what was written of ``stage`` after ``step``: a resumed run writes it again."""
        kept = [r for r in read_lines(self.path) if r["stage"] != stage or r["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        if self.columns:
            write_bytes(self.path.with_suffix(".csv"), self._csv([dict(zip(self.columns, self.columns)), *kept]))

    def _csv(self, records: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for record in records:
            writer.writerow(["" if record.get(c) is None else record[c] for c in self.columns])
        return text.getvalue().encode()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._append(self.path, "".join(json.dumps(r) + "\n" for r in records).encode())
        if self.columns:
            self._append(self.path.with_suffix(".csv"), self._csv(records))

    @staticmethod
    def _append(path: Path, text: bytes) -> None:
        try:
            with open(path, "ab") as file:
                file.write(text)
        except OSError as error:
            raise AvserError(f"{path}: expected to write the log, got an error ({error.strerror})") from error


class RunLog:
    """``log.jsonl`` and ``log.csv`` of steps, ``epochs.jsonl`` of epochs, TensorBoard's files below ``tensorboard/``.

    Without a folder (a process that is not the first) nothing is written.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False):
        self.steps = None if folder is None else Lines(folder / "log.jsonl", COLUMNS)
        self.epochs = None if folder is None else Lines(folder / "epochs.jsonl")
        self._board: Any = None
        if tensorboard and folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"--tensorboard: expected the package, pip install tensorboard ({error})") from error
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        for lines in (self.steps, self.epochs):
            if lines is not None:
                lines.rewind(stage, step)

    def step(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.steps is not None:
            self.steps.write(records)
        for record in records:
            self._show(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        if self.epochs is not None:
            self.epochs.write([record])
        self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{record['stage']}/{name}", value, record["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
